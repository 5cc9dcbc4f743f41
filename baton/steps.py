"""Responses as steps, of which a process reward model scores each: how they are read, how they are joined, where they are cut.

stepwise    prompt, completions: the steps of one response, labels: for each step, true where it is right
"""

import math
from collections.abc import Iterable, Iterator
from operator import itemgetter
from statistics import fmean
from typing import Literal

from baton.conversations import short
from baton.errors import InputError
from baton.jsonl import Record
from baton.records import prompt_of

SEPARATOR = "\n\n"
OUTPUT = "step"  # what a process reward model's output is called in its configuration

StepReward = Literal["min", "mean", "last", "product"]


def separator_of(given: str | None) -> str:
    """What stands between steps, SEPARATOR if nothing is given; `\\n` in it is a line break. Raises InputError if empty."""
    if given == "":
        raise InputError("`step_separator` must not be empty; leave it out for an empty line")
    return SEPARATOR if given is None else given.replace("\\n", "\n")


def is_stepwise(record: Record) -> bool:
    """Whether a record holds the steps of a response with a label each, as TRL's PRMTrainer takes them. Checks nothing else."""
    completions = record.get("completions")
    return "labels" in record and isinstance(completions, list) and all(isinstance(step, str) for step in completions)


def stepwise_records(records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    """Yield ("where", record) with `prompt` as messages, and the others checked: raises InputError.

    Steps lose spaces and line breaks at their ends; labels are true or false, 1 or 0 too.
    """
    for where, record in records:
        steps, labels = record.get("completions"), record.get("labels")
        if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
            raise InputError(
                f"{where}: `completions` must be a list of at least one step, texts that are not empty; got {short(steps)}"
            )
        if not isinstance(labels, list) or len(labels) != len(steps) or not all(label in (True, False) for label in labels):
            raise InputError(
                f"{where}: `labels` must be a list of true or false, one for each of the {len(steps)} `completions`; got "
                f"{short(labels)}"
            )
        checked = {"completions": [step.strip() for step in steps], "labels": [bool(label) for label in labels]}
        yield where, record | {"prompt": prompt_of(record, where)} | checked


def steps_of(response: str, separator: str) -> list[int]:
    """Where the steps of a response end, as numbers of characters: before each `separator`, and at the end.

    Between two separators, and after the last, there is a step only where there is more than spaces.
    """
    ends, start = [], 0
    for step in response.split(separator):
        if step.strip():
            ends.append(start + len(step.rstrip()))
        start += len(step) + len(separator)
    return ends


def reward_of_steps(probabilities: list[float], how: StepReward) -> float:
    """The reward of a response by the probabilities that its steps are right.

    `min` is that of Math-Shepherd (Wang et al., 2024, arXiv 2312.08935), `product` that of Lightman et al. (2023, arXiv
    2305.20050, section 2: that every step is right).
    """
    return {"min": min, "mean": fmean, "last": itemgetter(-1), "product": math.prod}[how](probabilities)
