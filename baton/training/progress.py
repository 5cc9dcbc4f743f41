"""Steps done, rate and time left of a training, as every stage shows them."""

import logging
from typing import Any

from transformers import TrainerCallback

from baton.progress import Progress

log = logging.getLogger("baton")

# What a line of the log shows of a trainer's numbers, of an evaluation with `eval_` before; the file of metrics has them all.
SHOWN = (
    *("loss", "train_loss", "accuracy", "margin", "rewards/accuracies", "rewards/margins"),
    *("kl_on_pairs", "kl", "kd_loss", "nll"),
    *("grad_norm", "learning_rate", "tokens_per_second", "mfu", "train_runtime"),
)


class ProgressLines(TrainerCallback):
    """Steps done, rate and time left as every stage shows them, and the trainer's main numbers as lines of the log."""

    def __init__(self) -> None:
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # A resumed trainer takes the intervals of lines and checkpoints from its checkpoint, not from its own settings.
        state.compute_steps(args, state.max_steps)
        if state.is_world_process_zero:
            if args.get_warmup_steps(state.max_steps) >= state.max_steps > 0:
                log.warning(
                    "the training has %d steps, and the warm-up takes %d, so the learning rate never reaches %g: make "
                    "`warmup_steps` smaller",
                    state.max_steps, args.get_warmup_steps(state.max_steps), args.learning_rate,
                )  # fmt: skip
            self.progress = Progress(state.max_steps, "steps", done=state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.progress is not None:
            self.progress.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            shown = {name: value for name, value in logs.items() if name.removeprefix("eval_") in SHOWN}
            line = ", ".join(f"{name} {_short(value)}" for name, value in (shown or logs).items())
            log.info("step %d: %s", state.global_step, line)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.progress is not None:
            self.progress.close()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
