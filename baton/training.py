"""What every training program does around a Hugging Face trainer: settings, rows on disk, resume, progress, a clean model.

Imported after a stage has found that there is work to do, since `transformers` takes seconds to import.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import orjson
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import is_torch_cuda_available
from transformers.utils import logging as transformers_logging

from baton import program
from baton.arguments import build_config
from baton.errors import InputError
from baton.progress import Progress
from baton.stage import Stage

log = logging.getLogger("baton")


def trainer_config(config_class: type, settings: dict[str, Any], own_names: Iterable[str], stage: Stage) -> Any:
    """The trainer's configuration, working in `<output>.partial`. Raises InputError on a bad setting.

    Unless set: no reports to outside services, no GPU where there is none, the last checkpoint kept.
    """
    settings = dict(settings)
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):  # the names that Transformers deprecates
        if name in settings:
            settings[name.replace("gradient", "activation")] = settings.pop(name)
    defaults = {
        "report_to": "none",
        "use_cpu": not is_torch_cuda_available(),
        "activation_checkpointing": True,
        "save_total_limit": 1,
    }
    config = build_config(config_class, defaults | settings | {"output_dir": str(stage.partial_folder)}, own_names)
    config.disable_tqdm = True
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    set_seed(config.seed)
    return config


def rows_on_disk(rows: Callable[[], Iterator[dict[str, Any]]], config: Any, name: str) -> datasets.Dataset:
    """Training rows as a memory-mapped dataset: process 0 writes them once, every process maps the same file.

    `rows` must yield at least one. An InputError that it raises is raised here as it is.
    """
    folder = Path(config.output_dir, "rows", name)
    with config.main_process_first(local=False):
        if program.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                written = datasets.Dataset.from_generator(rows, cache_dir=str(folder / "cache"), fingerprint=name)
            except datasets.exceptions.DatasetGenerationError as error:
                raise error.__cause__ if isinstance(error.__cause__, InputError) else error from None
            written.save_to_disk(folder / "rows")
    return datasets.load_from_disk(str(folder / "rows"))


def log_training(trainer: Any) -> None:
    """Say what the training really runs on."""
    accelerator, args = trainer.accelerator, trainer.args
    program.log_what_runs(
        device=accelerator.device,
        processes=accelerator.num_processes,
        distributed=accelerator.distributed_type.value,
        dtype=f"{trainer.model.dtype} weights, {accelerator.mixed_precision} mixed precision",
        attention=trainer.model.config._attn_implementation,
        parameters=f"{sum(p.numel() for p in trainer.model.parameters()):,}",
        global_batch=args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
    )


def train(trainer: Any, stage: Stage) -> dict[str, float]:
    """Train from the last whole checkpoint, or from the start; returns the training metrics.

    At the end `<output>.partial` holds the model and the tokenizer and nothing else.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLines())
    metrics = trainer.train(resume_from_checkpoint=last_whole_checkpoint(stage.partial_folder)).metrics
    trainer.save_model(str(stage.partial_folder))
    if program.rank() == 0:
        for leftover in (*stage.partial_folder.glob("checkpoint-*"), stage.partial_folder / "rows"):
            shutil.rmtree(leftover, ignore_errors=True)
        (stage.partial_folder / "training_args.bin").unlink(missing_ok=True)
    return metrics


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-N` that was written to its end; ones that a killed run left half-written are passed over.

    The trainer writes `trainer_state.json` last.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            step = orjson.loads((checkpoint / "trainer_state.json").read_bytes())["global_step"]
        except (FileNotFoundError, orjson.JSONDecodeError, KeyError):
            log.info("%s: half-written, passed over", checkpoint)
            continue
        log.info("going on from %s (step %d)", checkpoint, step)
        return str(checkpoint)
    return None


class ProgressLines(TrainerCallback):
    """Steps done, rate and time left as every stage shows them, and the trainer's metrics as lines of the log."""

    def __init__(self) -> None:
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.progress = Progress(state.max_steps, "steps", done=state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.progress is not None:
            self.progress.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            log.info("step %d: %s", state.global_step, ", ".join(f"{name} {_short(value)}" for name, value in logs.items()))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.progress is not None:
            self.progress.close()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
