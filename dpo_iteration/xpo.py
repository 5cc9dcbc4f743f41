"""Pairs of one response of the policy and one of the reference, which XPO learns from (arXiv 2405.21046, Algorithm 1).

The policy's are those of an annotated record, the reference's stand beside it as extra responses. A pair says with
`reference_side`, `chosen` or `rejected`, which one is the reference's: the loss needs it (`own_losses.optimism`).
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from baton.conversations import short
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.pairs import PER_RESPONSE_KEYS, PairSettings, pairs_of
from baton.records import rewards_of

SIDE = "reference_side"
COLUMN = "reference_is_chosen"  # of a row of token ids

NO_REFERENCE = "no response of the reference"
CUT_OFF = "all responses of the policy, or of the reference, cut off by length"

OF_ONE = ("responses", "rewards", "response_token_ids", "finish_reasons")  # what a pair says of a response


def pairs_of_each(
    records: Iterable[tuple[str, Record]], settings: PairSettings, drops: Drops, extra: Mapping[str, Record]
) -> Iterator[Record]:
    """Yield the pairs of ("file:line", annotated record) as `pairs_of`, each of a random response and a random one of `extra`.

    Each response is in at most one of a prompt's `pairs_per_prompt` pairs. `drops` gets one entry for a prompt without a
    response of the reference. Raises as `pairs_of`.
    """
    for where, record in records:
        rewards_of(record, where)
        more = extra.get(record["id"])
        if more is None:
            drops.add(NO_REFERENCE, record["id"])
            continue
        generator = random.Random(f"{settings.seed} {record['id']}")
        both = list(zip(_shuffled(record, settings, generator), _shuffled(more, settings, generator), strict=False))
        if not both:
            drops.add(CUT_OFF, record["id"])
        for own, other in islice(both, settings.pairs_per_prompt):
            one, text = {record["id"]: _alone(more, other)}, more["responses"][other]
            for pair in pairs_of([(where, _alone(record, own))], replace(settings, pairs_per_prompt=1), drops, one):
                # The texts differ, or it would have been dropped.
                yield {**pair, SIDE: "chosen" if pair["chosen"] == text else "rejected"}


def _shuffled(record: Record, settings: PairSettings, generator: random.Random) -> list[int]:
    """The places of a record's responses in random order, with `drop_truncated` without those that were cut off by length."""
    reasons = record.get("finish_reasons") or [None] * len(record["responses"])
    places = [place for place, reason in enumerate(reasons) if not (settings.drop_truncated and reason == "length")]
    generator.shuffle(places)
    return places


def _alone(record: Record, place: int) -> Record:
    """A record with one of its responses alone."""
    others = {name: value for name, value in record.items() if name not in PER_RESPONSE_KEYS}
    return others | {name: [record[name][place]] for name in OF_ONE if record.get(name)}


def reference_is_chosen(pair: Record, where: str) -> bool | None:
    """Whether a pair's chosen response is the reference's, None where it does not say so. Raises InputError, naming `where`."""
    side = pair.get(SIDE)
    if side not in (None, "chosen", "rejected"):
        raise InputError(
            f"{where}: `{SIDE}` names the side of the reference's response, chosen or rejected, or is absent; got {short(side)}"
        )
    return None if side is None else side == "chosen"


def check_sides(rows: Any) -> None:
    """Raise InputError where rows of token ids, a Dataset, do not all say which response is the reference's."""
    if without := rows.data.column(COLUMN).null_count:
        raise InputError(
            f"`xpo_alpha` needs the side of the reference's response, and {without} of {len(rows)} pairs have no `{SIDE}`: "
            "give annotated responses, and the reference's to the same prompts with --extra_responses, or pairs of such a run"
        )
