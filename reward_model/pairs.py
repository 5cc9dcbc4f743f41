"""The pairs that a reward model learns from, or what another `loss_type` takes in their place, and which are held out.

`arguments` are those of run_rm.py.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.preferences import preference_records
from baton.prompts import mixed_records
from baton.steps import stepwise_records
from baton.training.data import dataset_probs
from reward_model.score_rows import scored_records

log = logging.getLogger("baton")


def count_pairs(arguments: Any) -> tuple[int, int, Drops]:
    """How many pairs the training files hold, of how many prompts, and what of them makes no pair.

    Raises InputError where there are too few.
    """
    drops, source, count, prompts = Drops(), arguments.dataset_name_or_path, 0, 0
    for number, _ in numbered(all_pairs(arguments, drops)):
        count, prompts = count + 1, number + 1
    what = "pairs" if arguments.loss_type == "bradley_terry" else "records"
    if count < 2:
        raise InputError(f"{source}: holds {count} {what}, at least 2 are needed; dropped: {drops}")
    if prompts < 2 and not arguments.eval_dataset_name_or_path:
        raise InputError(f"{source}: all {what} are of one prompt, so none can be held out: give --eval_dataset_name_or_path")
    if drops.counts:
        log.info("%s: %d pairs; what makes none: %s", source, count, drops)
    return count, prompts, drops


def training_pairs(arguments: Any, prompts: int) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of each pair that is trained on, of files with pairs of so many prompts."""
    for number, pair in numbered(all_pairs(arguments)):
        if arguments.eval_dataset_name_or_path or not _is_held_out(number, arguments, prompts):
            yield pair


def held_out_pairs(arguments: Any, prompts: int) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of each held-out pair: all of the held-out file, else those of some of the `prompts`."""
    if arguments.eval_dataset_name_or_path:
        records = mixed_records(arguments.eval_dataset_name_or_path, arguments.eval_dataset_split, None)
        yield from _preferences(records, arguments)
        return
    for number, pair in numbered(all_pairs(arguments)):
        if _is_held_out(number, arguments, prompts):
            yield pair


def numbered(pairs: Iterable[tuple[str, Record]]) -> Iterator[tuple[int, tuple[str, Record]]]:
    """Yield each pair with the number of its prompt: several pairs in a row may be of one, and are held out together."""
    for number, (_, of_prompt) in enumerate(groupby(pairs, key=lambda pair: pair[1]["prompt"])):
        for pair in of_prompt:
            yield number, pair


def all_pairs(arguments: Any, drops: Drops | None = None) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of the training files; `drops` gets what makes no pair."""
    split, probs, most = arguments.dataset_split, dataset_probs(arguments), arguments.max_samples
    records = mixed_records(arguments.dataset_name_or_path, split, probs, max_samples=most)
    return _preferences(records, arguments, drops)


def _preferences(
    records: Iterable[tuple[str, Record]], arguments: Any, drops: Drops | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair), or what another `loss_type` learns from in its place."""
    if arguments.loss_type != "bradley_terry":
        records = with_usual_keys(records, {"prompt": arguments.dataset_key})
        of_steps = arguments.loss_type == "process"
        return stepwise_records(records) if of_steps else scored_records(records, arguments.score_key, arguments.heads)
    keys = {"prompt": arguments.dataset_key, "chosen": arguments.chosen_key, "rejected": arguments.rejected_key}
    most, score = arguments.max_pairs_per_prompt, arguments.score_key
    return preference_records(with_usual_keys(records, keys), most, score, drops)


def _is_held_out(number: int, arguments: Any, prompts: int) -> bool:
    """Whether a prompt of the training file is held out: the last of every `eval_every`, at least one where there are fewer."""
    every = min(arguments.eval_every, prompts)
    return number % every == every - 1
