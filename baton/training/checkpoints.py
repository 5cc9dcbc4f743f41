"""From the last whole checkpoint, or from the start, to a clean model folder."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import torch
from accelerate.utils import is_peft_model
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from baton import program
from baton.errors import InputError
from baton.models.templates import end_token_id
from baton.records import Messages
from baton.stage import Stage
from baton.training.adapters import merge_adapter
from baton.training.arguments import ExportDtype, metrics_file
from baton.training.card import write_card
from baton.training.export import copies_without_zero, export, recast
from baton.training.float32_copy import start_from_files
from baton.training.layouts import fit_layout
from baton.training.metrics_file import MetricsFile
from baton.training.progress import ProgressLines
from baton.training.sharding import keep_outputs

log = logging.getLogger("baton")

# What of `<output>.partial` is not the model or the tokenizer; for `Stage.finish`.
CHECKPOINTS = "checkpoint-*"
SCRATCH = (CHECKPOINTS, "rows", "training_args.bin")
# What of a checkpoint is for the trainer alone.
TRAINERS_OWN = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "trainer_state.json"),
    *("global_step*", "latest*", "zero_to_fp32.py", "pytorch_model_fsdp*"),
)


def train(
    trainer: Any,
    stage: Stage,
    export_dtype: ExportDtype = "checkpoint",
    metrics_path: Path | None = None,
    counts: dict[str, Any] | None = None,
    early_stopping: int | None = None,
) -> dict[str, float]:
    """Train from the last whole checkpoint, or from the start, and export the model; returns metrics of both.

    The checkpoints stay until `Stage.finish`, so that a death in what a program does before that costs no training.

    Args:
        metrics_path: the file for what the trainer logs; default: `<output>.metrics.jsonl`.
        counts: of records, for the model's card; None: process 0 writes none. `trainer.create_model_card()` writes it again.
        early_stopping: evaluations in a row without a better one that end the training.
    """
    if trainer.is_fsdp_enabled:
        keep_outputs(trainer.accelerator.state.fsdp_plugin)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLines())
    trainer.add_callback(MetricsFile(metrics_path or metrics_file(stage.output, None)))
    if early_stopping is not None:
        trainer.add_callback(StopEarly(early_stopping))
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or is_peft_model(trainer.model)):
        load_as_written(trainer)
    trainer.add_callback(BestIsHere())
    # TRL writes a card of its own with each checkpoint, and to the hub.
    trainer.create_model_card = lambda *_, **__: _write_card(trainer, stage, counts)
    checkpoint = last_whole_checkpoint(stage.partial_folder)
    if checkpoint is not None:
        fit_layout(trainer, checkpoint)
        state = _state_of(checkpoint)
        stopped = early_stopping is not None and no_better_for(trainer.args, state["log_history"]) >= early_stopping
        if stopped or state["global_step"] >= state["max_steps"]:
            # Transformers looks for the end after each step, so it would train one more where that is within an epoch.
            trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    elif trainer.is_deepspeed_enabled and not is_peft_model(trainer.model):
        trainer.add_callback(StartFromFiles(trainer))
    metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    metrics |= export(trainer, stage.partial_folder, export_dtype)
    trainer.create_model_card()
    return metrics


def load_as_written(trainer: Any) -> None:
    """Have a trainer load a whole model's checkpoints, to go on and for the best one, by the names that these have.

    Its own way goes by the model's names and passes over all others. Those of a mixture's experts are among them, which
    Transformers joins when it loads a model: they would stay what they were at the start of the run.
    """

    def load(folder: str, *_: Any) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())

    trainer._load_from_checkpoint = load
    trainer._load_best_model = lambda: load(trainer.state.best_model_checkpoint)


class BestIsHere(TrainerCallback):
    """Has a training that goes on find its best checkpoint in the folder as it is called now.

    A checkpoint names it by the path of the run that wrote it. Where that is another, since the folder was moved or the program
    started elsewhere, Transformers takes it that there is no best one until it saves again, and would export the last weights.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if state.best_global_step is not None and best.is_dir():
            state.best_model_checkpoint = str(best)


class StartFromFiles(TrainerCallback):
    """Has DeepSpeed's float32 copy start from all bits of the start's files; a checkpoint holds the copy itself.

    A trainer names modules that it has `drawn_anew` since it loaded them.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        anew = getattr(self.trainer, "drawn_anew", ())
        start_from_files(model, copies_without_zero(self.trainer.optimizer.optimizer), anew)


class StopEarly(TrainerCallback):
    """Ends a training after `patience` evaluations in a row without a better one, by `metric_for_best_model`.

    It counts in the log's history, which checkpoints hold, so a training that goes on after a death ends at the same step.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        since = no_better_for(args, state.log_history)
        if since >= self.patience and not control.should_training_stop:
            log.info(
                "step %d: the last %d evaluations are no better than the best: the training ends", state.global_step, since
            )
            control.should_training_stop = True


def no_better_for(args: Any, history: list[dict[str, Any]]) -> int:
    """How many evaluations of a log's history came after the best one, by `metric_for_best_model` of a TrainingArguments."""
    name = args.metric_for_best_model
    name = name if name.startswith("eval_") else f"eval_{name}"
    values = [line[name] for line in history if name in line]
    if not values:
        if any("eval_loss" in line for line in history):
            raise InputError(f"`metric_for_best_model`: an evaluation has no {name}")
        return 0
    return len(values) - 1 - values.index((max if args.greater_is_better else min)(values))


def finish_policy(trainer: Any, arguments: Any, folder: Path, said: tuple[Messages, str] | None) -> dict[str, float]:
    """Do what is left to do to a policy that was exported to `folder`, and keep checkpoints beside it; for process 0.

    With `--merge_adapter` the adapter is merged. `said` is a conversation and its place in the data, whose end engines stop at
    (`stop_at_end_of_turn`), or None where only plain texts were learnt. Returns metrics of the merge.
    """

    def finish(finished: Path) -> None:
        if said is not None:
            stop_at_end_of_turn(finished, trainer.processing_class, *said)

    metrics = {}
    if arguments.merge_adapter:
        metrics = merge_adapter(arguments.model_name_or_path, folder, trainer.args, arguments.export_dtype)
    finish(folder)
    keep_checkpoints(trainer, arguments, folder, finish)
    return metrics


def keep_checkpoints(
    trainer: Any, arguments: Any, folder: Path, finish: Callable[[Path], None] = lambda _: None, **classifier: Any
) -> None:
    """Leave `--keep_checkpoints` checkpoints of a training in `folder`, each as a model's folder `step-N`; for process 0.

    They are exported as the model itself: in the dtype of `--export_dtype`, and merged where the adapter is. What the trainer
    needs to go on is left out, and the checkpoints themselves stay until `Stage.finish`.

    Args:
        arguments: those of the program.
        finish: what the program does to a finished folder, such as `stop_at_end_of_turn`.
        classifier: of a reward model, `pad_token_id` and `outputs` of `merge_adapter`.
    """
    for checkpoint in checkpoints_to_keep(trainer, folder, arguments.keep_checkpoints):
        kept = folder / f"step-{_step_of(checkpoint)}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(checkpoint, kept, ignore=shutil.ignore_patterns(*TRAINERS_OWN))
        model, dtype = arguments.model_name_or_path, arguments.export_dtype
        if not is_peft_model(trainer.model):
            recast(kept, model, dtype)
        elif arguments.merge_adapter:
            merge_adapter(model, kept, trainer.args, dtype, **classifier)
        finish(kept)
        log.info("%s: kept as %s", checkpoint.name, kept.name)


def checkpoints_to_keep(trainer: Any, folder: Path, count: int) -> list[Path]:
    """So many checkpoints of a folder: the best one first, where the training has one, then the last ones."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    best_step = _step_of(Path(best)) if best else None
    return sorted(folder.glob(CHECKPOINTS), key=lambda path: (_step_of(path) != best_step, -_step_of(path)))[:count]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _write_card(trainer: Any, stage: Stage, counts: dict[str, Any] | None) -> None:
    if counts is not None and program.rank() == 0:
        write_card(stage.partial_folder, stage.manifest, counts, history_of_export(trainer))


def history_of_export(trainer: Any) -> list[dict[str, Any]]:
    """What was logged up to the step whose weights are exported: the best one's with `load_best_model_at_end`."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    step = _step_of(Path(best)) if best else trainer.state.global_step
    return [line for line in trainer.state.log_history if line["step"] <= step]


def last_evaluation(trainer: Any) -> dict[str, float]:
    """The numbers of the last evaluation of the weights that are exported, or of those before them."""
    last = next((line for line in reversed(history_of_export(trainer)) if "eval_loss" in line), {})
    return {name: value for name, value in last.items() if name.startswith("eval_")}


def stop_at_end_of_turn(folder: Path, tokenizer: Any, messages: Messages, where: str) -> None:
    """Have engines stop a finished model's responses at the token that it has learnt to end them with.

    That token, which ends the response of `messages` in the chat template, is added to those of generation_config.json. To be
    called by one process, when `folder` is complete; an adapter alone stays as it is, since engines read its model's.
    """
    if not (folder / "config.json").exists():
        return
    try:
        end = end_token_id(tokenizer, messages, where)
    except InputError as error:  # all responses came with sampled token ids, else the rows would have been refused
        log.warning("generation_config.json stays as it is: %s", error)
        return
    if end is None:
        log.warning("the chat template ends a response with no token of its own: sample with --stop where it ends with a text")
        return
    path = folder / "generation_config.json"
    settings = orjson.loads((path if path.exists() else folder / "config.json").read_bytes())
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    if end in known and path.exists():
        return
    log.info("generation_config.json: %r ends a response, beside %s", tokenizer.convert_ids_to_tokens(end), known)
    settings = settings if path.exists() else {}
    settings.pop("_from_model_config", None)  # or else Transformers makes it again from config.json
    path.write_bytes(orjson.dumps({**settings, "eos_token_id": sorted({end, *known})}, option=orjson.OPT_INDENT_2))


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest `checkpoint-N` that was written to its end; ones that a killed run left half-written are passed over.

    The trainer writes `trainer_state.json` last.
    """
    for checkpoint in sorted(folder.glob(CHECKPOINTS), key=_step_of, reverse=True):
        try:
            step = _state_of(checkpoint)["global_step"]
        except (FileNotFoundError, json.JSONDecodeError, KeyError):
            log.info("%s: half-written, passed over", checkpoint)
            continue
        log.info("going on from %s (step %d)", checkpoint, step)
        return checkpoint
    return None


def _state_of(checkpoint: Path) -> dict[str, Any]:
    """How far the training was when a checkpoint was written (Transformers' TrainerState).

    Its numbers may be NaN or Infinity, such as a gradient's norm that fp16 could not hold: no JSON, and yet whole.
    """
    return json.loads((checkpoint / "trainer_state.json").read_bytes())
