"""Which annotated responses are left, and what their rewards become: filters, then length penalty, then normalisation."""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from baton.arguments import StageArguments, option
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.pairs import PER_RESPONSE_KEYS
from baton.prompts import read_records, with_ids
from baton.records import prompt_of, rewards_of

FEW = "too few responses left after the filters"


class FilterArguments(StageArguments):
    dataset_name_or_path: str = option(..., "annotated responses: a file or a Hugging Face dataset", changes_result=False)
    dataset_key: str | None = option(None, "key of the prompt (else `prompt` or `context_messages`)")
    normalise: Literal["none", "file", "prompt"] = option(
        "none", "make rewards of mean 0 and standard deviation 1 over the file, or within each prompt"
    )
    len_penalty: float = option(0.0, "subtracted from the reward for each character of the response")
    drop_truncated: bool = option(False, "leave out responses with finish reason `length`")
    drop_duplicates: bool = option(False, "leave out responses that the same prompt has already")
    reward_range: tuple[float, float] | None = option(None, "LOW HIGH: leave out responses with a reward outside")


class Filtered:
    """The records of an annotated file with the responses that pass the filters, and their final rewards.

    The whole file is checked, and its rewards are read, when this is made; 8 bytes a response and 4 a record are held.
    """

    def __init__(self, arguments: FilterArguments, least: int):
        """Raises InputError if a record has no valid responses and rewards, or fewer than `least`, or if there is none."""
        self.arguments, self.least = arguments, least
        source = arguments.dataset_name_or_path
        self.rewards = array("d")  # normalised within the prompt, but not yet over the file
        self.responses = 0  # of all records, before the filters
        self.left = array("I")  # how many responses of each record pass the filters
        for where, record in read_records(source):
            prompt_of(record, where, arguments.dataset_key)
            left = kept(record, where, arguments)["rewards"]
            self.left.append(len(left))
            self.responses += len(record["responses"])
            self.rewards.extend(normalised(left, *moments(left)) if arguments.normalise == "prompt" else left)
            if len(record["responses"]) < least:
                raise InputError(f"{where}: a pair needs at least 2 `responses`, got 1; generate with --K 2 or more")
        if not self.left:
            raise InputError(f"{source}: holds no records")
        self.mean, self.deviation = moments(self.rewards) if arguments.normalise == "file" else (0.0, 1.0)

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        """Yield ("file:line", record with `id` and `prompt`); a record may be left without any response."""
        arguments = self.arguments
        for where, record in with_ids(read_records(arguments.dataset_name_or_path), arguments.dataset_key):
            left = kept(record, where, arguments)
            of = moments(left["rewards"]) if arguments.normalise == "prompt" else (self.mean, self.deviation)
            rewards = normalised(left["rewards"], *of)
            yield where, {**left, "rewards": rewards, "prompt": prompt_of(record, where, arguments.dataset_key)}

    def with_enough(self, drops: Drops) -> Iterator[tuple[str, Record]]:
        """Yield the records that have `least` responses left; each of the others is one drop."""
        for where, record in self:
            if len(record["responses"]) < self.least:
                drops.add(FEW, record["id"])
            else:
                yield where, record

    def expected(self, of_prompt: Callable[[int], int]) -> int:
        """How many records an output holds, drops included, if a prompt gives `of_prompt(responses left)` of them.

        A prompt with fewer than `least` responses left is one drop.
        """
        return sum(of_prompt(count) if count >= self.least else 1 for count in self.left)

    def quantiles(self, levels: int) -> list[float]:
        """The rewards that cut all of them into `levels` groups of about the same size."""
        cuts = np.quantile(self.rewards, np.arange(1, levels) / levels).tolist() if self.rewards else []
        return normalised(cuts, self.mean, self.deviation)


def kept(record: Record, where: str, arguments: FilterArguments) -> Record:
    """The record with the responses that pass the filters, and their rewards after the length penalty."""
    rewards, responses = rewards_of(record, where), record["responses"]
    finish_reasons = record.get("finish_reasons") or [None] * len(responses)
    low, high = arguments.reward_range or (-math.inf, math.inf)
    indices = [
        i
        for i, (reward, reason) in enumerate(zip(rewards, finish_reasons, strict=True))
        if low <= reward <= high and not (arguments.drop_truncated and reason == "length")
    ]
    if arguments.drop_duplicates:  # the first of equal ones among those that are left
        indices = sorted({responses[i]: i for i in reversed(indices)}.values())
    penalised = [reward - arguments.len_penalty * len(text) for text, reward in zip(responses, rewards, strict=True)]
    return only({**record, "rewards": penalised}, indices)


def only(record: Record, indices: list[int]) -> Record:
    """The record with some of its responses."""
    columns = {key: record[key] for key in PER_RESPONSE_KEYS if record.get(key) is not None}
    return {**record, **{key: _pick(values, indices) for key, values in columns.items()}}


def _pick(values: Any, indices: list[int]) -> Any:
    if isinstance(values, dict):
        return {name: _pick(column, indices) for name, column in values.items()}
    return [values[i] for i in indices]


def normalised(rewards: Sequence[float], mean: float, deviation: float) -> list[float]:
    """How many deviations each reward is above the mean."""
    return [(reward - mean) / deviation for reward in rewards]


def moments(rewards: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation; the latter is 1 where all are equal, so that it can be divided by."""
    if len(rewards) and min(rewards) == max(rewards):
        return rewards[0], 1.0  # the mean of equal numbers is not always that number
    mean = math.fsum(rewards) / max(1, len(rewards))
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards))
    return mean, math.sqrt(variance) or 1.0
