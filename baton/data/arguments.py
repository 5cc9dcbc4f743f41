"""The arguments of `check` and `convert`, and what follows from them alone."""

from pathlib import Path
from typing import Literal

from baton.arguments import StageArguments, option
from baton.errors import InputError
from baton.mixing import parse_probs
from baton.prompts import split_sources
from baton.shapes import Kind


class DataArguments(StageArguments):
    """What is read, and as what."""

    dataset_name_or_path: str = option(..., "FILE: a file or a dataset; several with commas between", changes_result=False)
    kind: Kind | None = option(None, "--as: what to read the file as; default: what its first record looks like")
    dataset_probs: str | None = option(None, "draw from several datasets at these rates, such as 0.7,0.3, until one is used up")
    dataset_split: str = option("train", "split of a Hugging Face dataset")
    max_samples: int | None = option(None, "read only the first N records", ge=1)
    dataset_key: str | None = option(None, "key of the prompt or the conversation, if it is an unusual one")
    chosen_key: str | None = option(None, "key of the better response, if it is not `chosen`")
    rejected_key: str | None = option(None, "key of the worse response, if it is not `rejected`")
    output_key: str | None = option(
        None, "key of the response of demonstrations and labelled responses, if it is an unusual one"
    )
    label_key: str | None = option(None, "key of the label, if it is not `label`")
    score_key: str | None = option(None, "key of the scores of UltraFeedback, HelpSteer and the like, if it is an unusual one")
    max_pairs_per_prompt: int | None = option(
        None, "most pairs of a record with several answers; default: all of ReaL's, one of scored responses", ge=1
    )


class CheckArguments(DataArguments):
    """What `check` adds."""

    tokenizer: str | None = option(None, "model whose tokenizer and chat template show what it would read and learn")
    chat_template: str | None = option(None, "Jinja file that replaces the tokenizer's chat template")
    all: bool = option(False, "count the tokens of all records, not of the first 10,000")
    show: int = option(3, "how many records to show", ge=0)


class ConvertArguments(DataArguments):
    """What `convert` adds."""

    output_dir: Path = option(..., "OUT: the output FILE, such as data/pairs.jsonl", changes_result=False)
    dedup: Literal["exact", "near"] | None = option(None, "leave out records that say (nearly) the same as earlier ones")
    near_threshold: float = option(0.8, "near: least Jaccard similarity of the words' 3-grams of duplicates", gt=0, lt=1)
    min_prompt_characters: int = option(0, "least length of a prompt", ge=0)
    max_prompt_characters: int | None = option(None, "greatest length of a prompt", ge=1)
    min_response_characters: int = option(0, "least length of each response", ge=0)
    max_response_characters: int | None = option(None, "greatest length of each response", ge=1)
    split: float | None = option(None, "part of the prompts to write to <OUT>.heldout.jsonl instead, such as 0.05", gt=0, lt=1)


def keys_of(arguments: DataArguments, kind: Kind | None) -> dict[str, str | None]:
    """The names that the file gives to what is read of it."""
    response = "completion" if kind == "labelled" else "response"
    return {
        "prompt": arguments.dataset_key,
        "chosen": arguments.chosen_key,
        "rejected": arguments.rejected_key,
        response: arguments.output_key,
        "label": arguments.label_key,
    }


def probs_of(arguments: DataArguments) -> tuple[float, ...] | None:
    """The rate of each dataset, or None. Raises InputError where there are not as many rates as datasets."""
    return parse_probs(arguments.dataset_probs, len(split_sources(arguments.dataset_name_or_path)))


def held_out_path(output: Path) -> Path:
    """Where `--split` writes: `pairs.heldout.jsonl` beside `pairs.jsonl`. Raises InputError for another ending."""
    if output.suffix != ".jsonl":
        raise InputError(f"{output}: the output is a JSON Lines file; give a name that ends in .jsonl")
    return output.with_suffix(".heldout.jsonl")
