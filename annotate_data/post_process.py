"""From annotated responses to what a training stage reads.

    python annotate_data/post_process.py --post_processor iter_dpo --choose_type max_min \\
        --dataset_name_or_path data/data_with_rewards.jsonl --output_dir data/pairs.jsonl

    iter_dpo    preference pairs (baton/pairs.py), for offline DPO or reward modelling
    rs          rejection sampling: the best response of each prompt as a demonstration for SFT
    ca          conditional SFT: every response as a demonstration, its binned reward written before the last user turn

In this order, before that: responses outside `reward_range`, cut off by length, or said before are left out; `len_penalty` is
subtracted for each character; rewards are normalised. A prompt that is left with too few responses is dropped, and counted.
"""

import bisect
import logging
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from annotate_data.work import check_output, write_records
from baton.arguments import StageArguments, option, parse
from baton.errors import InputError
from baton.jsonl import Record
from baton.pairs import PER_RESPONSE_KEYS, ChooseType, PairSettings, candidates, pairs_of
from baton.program import check_processes, run
from baton.prompts import read_records, with_ids
from baton.records import prompt_of, responses_of, rewards_of
from baton.stage import Drops, Stage

log = logging.getLogger("baton")

FEW = "too few responses left after the filters"
LOW = "best reward below min_reward"


class Arguments(StageArguments):
    dataset_name_or_path: str = option(..., "annotated responses: a file or a Hugging Face dataset", changes_result=False)
    output_dir: Path = option(..., "the output FILE, such as data/pairs.jsonl", changes_result=False)
    dataset_key: str | None = option(None, "key of the prompt (else `prompt` or `context_messages`)")
    post_processor: Literal["iter_dpo", "rs", "ca"] = option("iter_dpo", "what to make (see above)")
    normalise: Literal["none", "file", "prompt"] = option(
        "none", "make rewards of mean 0 and standard deviation 1 over the file, or within each prompt"
    )
    len_penalty: float = option(0.0, "subtracted from the reward for each character of the response")
    drop_truncated: bool = option(False, "leave out responses with finish reason `length`")
    drop_duplicates: bool = option(False, "leave out responses that the same prompt has already")
    reward_range: tuple[float, float] | None = option(None, "LOW HIGH: leave out responses with a reward outside")
    seed: int = option(0, "of random pairs")
    choose_type: ChooseType = option("max_min", "iter_dpo: how pairs are chosen")
    pairs_per_prompt: int = option(1, "iter_dpo: pairs of each prompt, each response in at most one", ge=1)
    min_margin: float = option(0.0, "iter_dpo: least difference of rewards, after normalisation", ge=0)
    max_length_ratio: float | None = option(None, "iter_dpo: longest ratio of the two lengths in characters", ge=1)
    min_reward: float | None = option(None, "rs: least reward of a demonstration, after normalisation")
    bins: int = option(5, "ca: reward levels, each with about as many responses", ge=2, le=100)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    check_processes()
    check_output(arguments.output_dir)
    settings = pair_settings(arguments)
    inputs = {"dataset": arguments.dataset_name_or_path}
    stage = Stage.begin("post_process", arguments, arguments.output_dir, inputs)
    if stage is None:
        return
    drops = Drops()
    scale = Scale(arguments)
    if arguments.post_processor == "iter_dpo":
        asked = Counted(lambda record: candidates(len(record["responses"]), settings))
        records = pairs_of(asked(enough(prepared(arguments, scale), drops, asked, 2)), settings, drops, arguments.dataset_key)
    elif arguments.post_processor == "rs":
        asked = Counted(lambda record: 1)
        records = best_of_n(asked(enough(prepared(arguments, scale), drops, asked, 1)), arguments, drops)
    else:
        asked = Counted(lambda record: len(record["responses"]))
        records = conditional(asked(enough(prepared(arguments, scale), drops, asked, 1)), arguments, scale)
    written = write_records(arguments.output_dir, records)
    if written == 0:
        log.warning("nothing is left: %s", drops)
    stage.finish(records_in=asked.total, records_out=written, drops=drops)


def pair_settings(arguments: Arguments) -> PairSettings:
    """The settings of the pairs; the length penalty is in the rewards by then, whatever the choose_type."""
    choose_type = "max_min" if arguments.choose_type == "max_min_p" else arguments.choose_type
    return PairSettings(
        choose_type,
        pairs_per_prompt=arguments.pairs_per_prompt,
        min_margin=arguments.min_margin,
        max_length_ratio=arguments.max_length_ratio,
        seed=arguments.seed,
    )


def kept(record: Record, where: str, arguments: Arguments) -> Record:
    """The record with the responses that pass the filters, and their rewards after the length penalty."""
    responses, rewards = responses_of(record, where), rewards_of(record, where)
    finish_reasons = record.get("finish_reasons") or [None] * len(responses)
    low, high = arguments.reward_range or (-math.inf, math.inf)
    indices = [
        i
        for i, (response, reward, reason) in enumerate(zip(responses, rewards, finish_reasons, strict=True))
        if low <= reward <= high
        and not (arguments.drop_truncated and reason == "length")
        and not (arguments.drop_duplicates and response in responses[:i])
    ]
    record = {**record, "rewards": [r - arguments.len_penalty * len(t) for t, r in zip(responses, rewards, strict=True)]}
    return only(record, indices)


def only(record: Record, indices: list[int]) -> Record:
    """The record with some of its responses."""
    columns = {key: record[key] for key in PER_RESPONSE_KEYS if record.get(key) is not None}
    return {**record, **{key: _pick(values, indices) for key, values in columns.items()}}


def _pick(values: Any, indices: list[int]) -> Any:
    if isinstance(values, dict):
        return {name: _pick(column, indices) for name, column in values.items()}
    return [values[i] for i in indices]


class Scale:
    """The mean, standard deviation and quantiles of all rewards in a file, after the filters; 8 bytes a response are held."""

    def __init__(self, arguments: Arguments):
        """Raises InputError if a record has no valid responses and rewards, or a single one for pairs, or if there is none."""
        rewards = array("d")
        empty = True
        for where, record in read_records(arguments.dataset_name_or_path):
            prompt_of(record, where, arguments.dataset_key)
            left = kept(record, where, arguments)["rewards"]
            if arguments.post_processor == "iter_dpo" and len(record["responses"]) < 2:
                raise InputError(f"{where}: a pair needs at least 2 `responses`, got 1; generate with --K 2 or more")
            empty = False
            rewards.extend(normalised(left) if arguments.normalise == "prompt" else left)
        if empty:
            raise InputError(f"{arguments.dataset_name_or_path}: holds no records")
        self.mean, self.deviation = moments(rewards)
        if arguments.normalise == "file":
            rewards = array("d", [(reward - self.mean) / self.deviation for reward in rewards])
        levels = np.arange(1, arguments.bins) / arguments.bins
        self.edges = np.quantile(rewards, levels).tolist() if rewards else []


def moments(rewards: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation; the latter is 1 where all are equal, so that it can be divided by."""
    mean = math.fsum(rewards) / max(1, len(rewards))
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards))
    return mean, math.sqrt(variance) or 1.0


def normalised(rewards: Sequence[float]) -> list[float]:
    """Rewards of mean 0 and standard deviation 1."""
    mean, deviation = moments(rewards)
    return [(reward - mean) / deviation for reward in rewards]


def prepared(arguments: Arguments, scale: Scale) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record), filtered and normalised."""
    for where, record in with_ids(read_records(arguments.dataset_name_or_path), arguments.dataset_key):
        left = kept(record, where, arguments)
        left["prompt"] = prompt_of(record, where, arguments.dataset_key)
        if arguments.normalise == "prompt":
            left["rewards"] = normalised(left["rewards"])
        elif arguments.normalise == "file":
            left["rewards"] = [(reward - scale.mean) / scale.deviation for reward in left["rewards"]]
        yield where, left


class Counted:
    """How many output records the input asks for, so that records out and drops can be checked against it."""

    def __init__(self, count: Callable[[Record], int]):
        self.count, self.total = count, 0

    def __call__(self, records: Iterator[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
        for where, record in records:
            self.total += self.count(record)
            yield where, record


def enough(records: Iterator[tuple[str, Record]], drops: Drops, asked: Counted, least: int) -> Iterator[tuple[str, Record]]:
    """Yield the records that have `least` responses left, and drop the others, one drop each."""
    for where, record in records:
        if len(record["responses"]) >= least:
            yield where, record
        else:
            drops.add(FEW, record["id"])
            asked.total += 1


def demonstration(record: Record, index: int, prompt: list[dict[str, str]]) -> Record:
    """Response `index` of a record as a conversation to learn from."""
    rest = {key: value for key, value in record.items() if key not in (*PER_RESPONSE_KEYS, "prompt", "context_messages")}
    messages = [*prompt, {"role": "assistant", "content": record["responses"][index]}]
    return {**rest, "messages": messages, "reward": record["rewards"][index]}


def best_of_n(records: Iterator[tuple[str, Record]], arguments: Arguments, drops: Drops) -> Iterator[Record]:
    """Yield each prompt's best response as a demonstration."""
    for _, record in records:
        rewards = record["rewards"]
        best = max(range(len(rewards)), key=rewards.__getitem__)
        if arguments.min_reward is not None and rewards[best] < arguments.min_reward:
            drops.add(LOW, record["id"])
        else:
            yield demonstration(record, best, record["prompt"])


def conditional(records: Iterator[tuple[str, Record]], arguments: Arguments, scale: Scale) -> Iterator[Record]:
    """Yield every response as a demonstration whose last user turn begins with its reward level, `<reward_1>` the lowest.

    At inference, asking for the highest level gives what such a model holds for its best.
    """
    for where, record in records:
        turn = next((i for i in reversed(range(len(record["prompt"]))) if record["prompt"][i]["role"] == "user"), None)
        if turn is None:
            raise InputError(f"{where}: the prompt has no user turn to write the reward level into")
        for index, reward in enumerate(record["rewards"]):
            level = 1 + bisect.bisect_right(scale.edges, reward)
            prompt = [dict(message) for message in record["prompt"]]
            prompt[turn]["content"] = f"<reward_{level}> {prompt[turn]['content']}"
            yield {**demonstration(record, index, prompt), "reward_level": level}


if __name__ == "__main__":
    run(main)
