"""The arguments that every training program has beside its trainer's settings. Nothing heavy is imported with this file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from baton.arguments import Accept, StageArguments, check_known, option, parse_with_rest
from baton.openrlhf import own_names
from baton.training.known import CONFIGS, config_fields, refuse_foreign

ExportDtype = Literal["checkpoint", "float32"]
Compile = Literal["auto", "on", "off"]


class TrainingProgramArguments(StageArguments):
    """Arguments of a program that trains a model and writes it as a plain folder."""

    export_dtype: ExportDtype = option(
        "checkpoint",
        "dtype of the finished model's weights, which are trained in float32: `checkpoint`, that of the model that training "
        "started from, or `float32`, which keeps updates that bfloat16 rounds away and takes twice the disk",
    )
    metrics_path: str | None = option(
        None, "file for the trainer's numbers, a JSON object a line; default: <output_dir>.metrics.jsonl", changes_result=False
    )


def compile_option() -> Any:
    """The argument `compile` of a program whose trainer takes it (`compiling.py`)."""
    return option(
        "auto",
        "compile the model's layers before the first step, which takes minutes and makes every step faster: on, off, or auto, "
        "in trainings that are long enough for it to pay, where it is possible",
        changes_result=False,
    )


def tokens_per_row_option(member: str) -> Any:
    """The argument `tokens_per_row` of a program whose trainer packs rows; `member` is what a step has, such as `pair`."""
    return option(
        4096,
        "most tokens of a packed row, which one forward and backward pass computes: it bounds the memory of activations. A "
        f"step runs as many rows as its {member}s fill; a longer {member} has a row of its own",
        ge=1,
        changes_result=False,
    )


def keep_checkpoints_option() -> Any:
    """The argument `keep_checkpoints` of a program that calls `checkpoints.keep_checkpoints`."""
    return option(
        0,
        "leave so many checkpoints in the finished folder, each a model's folder `step-N`: the last ones, and with "
        "`load_best_model_at_end` the best one first",
        ge=0,
        changes_result=False,
    )


def early_stopping_option() -> Any:
    """The argument `early_stopping` of a program whose trainer evaluates, for `checkpoints.train`."""
    return option(
        None,
        "end the training after so many evaluations in a row that are no better than the best one before; needs "
        "`load_best_model_at_end`",
        ge=1,
    )


def metrics_file(output: str | Path, metrics_path: str | None) -> Path:
    """The file of a training's metrics: `metrics_path`, by default `<output>.metrics.jsonl`."""
    return Path(metrics_path or f"{output}.metrics.jsonl")


A = TypeVar("A", bound=TrainingProgramArguments)


def parse_training(
    program: str,
    model: type[A],
    description: str,
    config_class: Callable[[], type],
    argv: Sequence[str] | None = None,
    rewrite: Accept = dict,
) -> tuple[A, dict[str, Any]]:
    """`parse_with_rest` of a training program, named as in `known.CONFIGS`, without a heavy import.

    Raises InputError for a setting that neither the program nor its trainer has, with the nearest one, or with the program that
    has it. `rewrite` gives settings of other toolkits the names that this program knows; OpenRLHF's are known too.
    """
    own = set(model.model_fields)
    before: dict[str, Any] = {}  # what the file says, when the flags come

    def accept(settings: dict[str, Any]) -> dict[str, Any]:
        known, given = own | config_fields(CONFIGS[program]), rewrite(settings)
        settings = own_names(given, known, before)
        before.update(given)
        refuse_foreign(settings, program, own)
        check_known(settings, known)
        return settings

    return parse_with_rest(model, description, config_class, argv, accept)
