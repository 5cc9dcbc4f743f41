"""The pairs that a reward model learns from, or what another `loss_type` takes in their place, and which are held out.

`arguments` are those of run_rm.py.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.preferences import preference_records
from baton.prompts import mixed_records
from baton.steps import stepwise_records
from baton.training.data import dataset_probs
from baton.training.held_out import NONE, held_out_of, of_prompts, prompt_hashes, without
from reward_model.score_rows import scored_records

log = logging.getLogger("baton")


def count_pairs(arguments: Any) -> tuple[int, frozenset[int], Drops]:
    """How many pairs the training files hold, the hashes of the prompts that are held out, and what makes no pair.

    Raises InputError where there are too few.
    """
    drops, source = Drops(), arguments.dataset_name_or_path
    hashes = prompt_hashes(all_pairs(arguments, drops))
    count = len(hashes)
    what = "pairs" if arguments.loss_type == "bradley_terry" else "records"
    if count < 2:
        raise InputError(f"{source}: holds {count} {what}, at least 2 are needed; dropped: {drops}")
    if drops.counts:
        log.info("%s: %d pairs; what makes none: %s", source, count, drops)
    aside = NONE if arguments.eval_dataset_name_or_path else held_out_of(hashes, arguments.eval_every, source)
    return count, aside, drops


def training_pairs(arguments: Any, aside: frozenset[int]) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of each pair that is trained on, all but those of the held-out prompts `aside`."""
    return without(all_pairs(arguments), aside)


def held_out_pairs(arguments: Any, aside: frozenset[int]) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of each held-out pair: all of the held-out file, else those of the prompts `aside`."""
    if arguments.eval_dataset_name_or_path:
        records = mixed_records(arguments.eval_dataset_name_or_path, arguments.eval_dataset_split, None)
        return _preferences(records, arguments)
    return of_prompts(all_pairs(arguments), aside)


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
