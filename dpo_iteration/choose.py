"""Which pairs a round trains on: chosen among annotated responses, given as they are, or those of earlier rounds again."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from baton import jsonl
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.pairs import PER_RESPONSE_KEYS, PairSettings, checked_pair, far_apart, pairs_of, why_left_out
from baton.preferences import ANSWER_KEYS, preference_records, preferences_in
from baton.prompts import read_records, with_ids
from baton.records import named, prompt_hash, prompt_of, rewards_of
from baton.scored import ALONE, annotated_of, has_completions, with_rows_merged
from dpo_iteration.account import IN, Account

log = logging.getLogger("baton")

Extra = Mapping[str, Record]  # further annotated responses, by the id of their prompt
# What makes pairs of annotated records, and drops for those that it does not make, as `pairs_of` does.
PairUp = Callable[[Iterable[tuple[str, Record]], PairSettings, Drops, Extra | None], Iterator[Record]]

NO_MARGIN = "pairs without a margin"
EARLIER = "pairs of earlier rounds"
EXTRA = "prompts with extra responses"
HELD_OUT = "pairs of earlier rounds whose prompt is held out"
BEYOND = "beyond max_training_samples"


def write_pairs(
    path: Path,
    records: Iterable[tuple[str, Record]],
    source: str,
    settings: PairSettings,
    most: int = -1,
    score: str | None = None,
    min_edit_distance: float = 0.0,
    extra: Extra | None = None,
    pair_up: PairUp = pairs_of,
) -> Account:
    """Write the pairs of the records of `source` to `path`, the first `most` of them, all if that is below 1.

    Returns what became of the records. `min_edit_distance` is that of `far_apart`, `extra` that of `pairs_of`, or of what else
    is to `pair_up` responses. Raises as `at_least_one`, and InputError where no record has a prompt of `extra`.
    """
    account = Account()
    pairs = choose_pairs(records, settings, account.drops, account.counted, score, extra, pair_up)
    pairs = _with_extra(pairs, extra, account.counted)
    if min_edit_distance:
        pairs = far_apart(pairs, min_edit_distance, account.drops)
    jsonl.write(path, at_least_one(first_pairs(pairs, most, account.drops), source, account.drops))
    return account


def first_pairs(pairs: Iterable[Record], most: int, drops: Drops) -> Iterator[Record]:
    """Yield the first `most` pairs, all if that is below 1; `drops` gets the others."""
    for number, pair in enumerate(pairs):
        if 0 < most <= number:
            drops.add(BEYOND, pair["id"])
        else:
            yield pair


def extra_responses(source: str | None, split: str) -> Extra | None:
    """The annotated responses of a file, held in memory by the id of their prompt; None without a file.

    Raises InputError for a record without valid responses and rewards, and for one id on two records.
    """
    if source is None:
        return None
    kept: dict[str, Record] = {}
    for where, record in with_ids(read_records(source, split)):
        rewards_of(record, where)
        if record["id"] in kept:
            raise InputError(f"{where}: the id {record['id']!r} has come before; leave one of the records out")
        known = {name: record[name] for name in PER_RESPONSE_KEYS if record.get(name)}
        kept[record["id"]] = {**known, "prompt_hash": prompt_hash(prompt_of(record, where))}
    return kept


def choose_pairs(
    records: Iterable[tuple[str, Record]],
    settings: PairSettings,
    drops: Drops,
    counted: Counter[str],
    score: str | None = None,
    extra: Extra | None = None,
    pair_up: PairUp = pairs_of,
) -> Iterator[Record]:
    """Yield the pairs of ("file:line", record): chosen among annotated responses, or as a preference file gives them.

    What a pair holds beside its texts (token ids, rewards, margin, finish reasons) stays. When all are read, `counted["in"]`
    is the number of pairs that the records could give: pairs and drops together. `score` is the key of scores that have an
    unusual name.
    """
    for where, record in with_ids(_readable(records, score, drops, counted)):
        if "responses" in record:
            before = drops.counts.total()
            pairs = list(pair_up([(where, record)], settings, drops, extra))
            counted[IN] += len(pairs) + drops.counts.total() - before
            if extra is not None and record["id"] in extra:
                counted[EXTRA] += 1
            yield from pairs
            continue
        pair = checked_pair(record, where)
        counted[IN] += 1
        if reason := why_left_out(pair, settings):
            drops.add(reason, pair["id"])
        else:
            counted[NO_MARGIN] += pair.get("margin") is None
            yield pair


def _with_extra(pairs: Iterator[Record], extra: Extra | None, counted: Counter[str]) -> Iterator[Record]:
    """Yield the pairs of `choose_pairs`. Raises InputError where no record had a prompt of `extra`."""
    yield from pairs
    if extra is not None and not counted[EXTRA]:
        raise InputError("`extra_responses`: no prompt is one of the data's; `id` joins them, which a prompt's text gives")


def _readable(
    records: Iterable[tuple[str, Record]], score: str | None, drops: Drops, counted: Counter[str]
) -> Iterator[tuple[str, Record]]:
    """Yield responses with scores as annotated records, and preferences in one shape. Raises InputError for what is neither.

    Data sets with scores have prompts with one response alone, which are dropped.
    """
    for where, record in with_rows_merged(records, score):
        if has_completions(record) and len(record["completions"]) < 2:
            counted[IN] += 1
            drops.add(ALONE, where)
        elif "responses" in record or has_completions(record):
            yield where, annotated_of(record, where, score)
        elif any(name in record for name in ("chosen", "rejected", *ANSWER_KEYS)):
            yield from ((where, pair) for pair in preferences_in(record, where))
        else:
            found = named(record)
            raise InputError(f"{where}: needs `responses` and `rewards`, or `chosen` and `rejected`; the record has {found}")


def earlier_pairs(pairs: Path, rounds: int) -> list[Path]:
    """The pairs files of the `rounds` rounds before that of `pairs`, which is a file in a folder named `round<i>`.

    They have the same name in the folders beside it; those that do not exist are left out, which the log says. Raises
    InputError if the folder has another name.
    """
    if not rounds:
        return []
    folder = pairs.absolute().parent
    match = re.fullmatch(r"round([0-9]+)", folder.name)
    if match is None:
        raise InputError(
            f"`history` finds the rounds before by their folders, round1, round2, …, but {pairs} is in `{folder.name}`: "
            "give --pairs_path RUN/round<i>/pairs.jsonl, or leave `history` out"
        )
    number = int(match[1])
    paths = [folder.with_name(f"round{i}") / pairs.name for i in range(max(0, number - rounds), number)]
    found = [path for path in paths if path.is_file()]
    log.info("history of %d rounds: %s", rounds, ", ".join(map(str, found)) or "no earlier round has pairs")
    return found


def pairs_again(paths: Iterable[Path], counted: Counter[str]) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", pair) of the pairs files of earlier rounds, added to `counted["in"]`."""
    for path in paths:
        for where, record in preference_records(jsonl.read(path)):
            pair = checked_pair(record, where)
            counted[IN] += 1
            counted[EARLIER] += 1
            counted[NO_MARGIN] += pair.get("margin") is None
            yield where, pair


def not_held_out(pairs: Iterable[tuple[str, Record]], prompts: Collection[int], drops: Drops) -> Iterator[tuple[str, Record]]:
    """Yield the pairs whose prompt is none of the held-out `prompts`, hashes; `drops` gets the others."""
    for where, pair in pairs:
        if prompts and prompt_hash(pair["prompt"]) in prompts:
            drops.add(HELD_OUT, pair["id"])
        else:
            yield where, pair


def at_least_one(pairs: Iterator[dict[str, Any]], source: str, drops: Drops, what: str = "pair") -> Iterator[dict[str, Any]]:
    """Yield the pairs, or `what` else, of `source`. Raises InputError if there is none, saying which filter took how many."""
    empty = True
    for pair in pairs:
        empty = False
        yield pair
    if empty:
        raise InputError(f"{source}: no {what} is left; dropped: {drops}; loosen what drops the most")
