"""The arguments that every training program has beside its trainer's settings. Nothing heavy is imported with this file."""

from typing import Literal

from baton.arguments import StageArguments, option

ExportDtype = Literal["checkpoint", "float32"]


class TrainingProgramArguments(StageArguments):
    """Arguments of a program that trains a model and writes it as a plain folder."""

    export_dtype: ExportDtype = option(
        "checkpoint",
        "dtype of the finished model's weights, which are trained in float32: `checkpoint`, that of the model that training "
        "started from, or `float32`, which keeps updates that bfloat16 rounds away and takes twice the disk",
    )
