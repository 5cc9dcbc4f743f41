"""The arguments that say which data a training program reads. Nothing heavy is imported with this file."""

import logging
from pathlib import Path
from typing import Any

from baton.arguments import StageArguments, option
from baton.mixing import parse_probs
from baton.prompts import split_sources

log = logging.getLogger("baton")


class DataArguments(StageArguments):
    """Arguments of a program that trains on `dataset_name_or_path`, which each describes in its own words."""

    dataset_name_or_path: str = option(..., "the data; several files or datasets with commas between", changes_result=False)
    dataset_probs: str | None = option(None, "draw from several datasets at these rates, such as 0.7,0.3, until one is used up")
    dataset_split: str = option("train", "split of a Hugging Face dataset")
    dataset_key: str | None = option(None, "key of the prompt or the conversation, if it is an unusual one (docs/data.md)")
    chat_template: str | None = option(None, "Jinja file that replaces the tokenizer's chat template", changes_result=False)


def dataset_probs(arguments: DataArguments) -> tuple[float, ...] | None:
    """The rate of each dataset, or None. Raises InputError where there are not as many rates as datasets."""
    return parse_probs(arguments.dataset_probs, len(split_sources(arguments.dataset_name_or_path)))


def warn_of_trained_on(arguments: Any) -> None:
    """Warn where the held-out data of a program, `eval_dataset_name_or_path`, is among what it trains on."""
    source = arguments.eval_dataset_name_or_path
    if not source or source not in split_sources(arguments.dataset_name_or_path):
        return
    if Path(source).exists() or arguments.eval_dataset_split == arguments.dataset_split:
        log.warning("`eval_dataset_name_or_path` is data that is trained on, so what is evaluated is not held out")
