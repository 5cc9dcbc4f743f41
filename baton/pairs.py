"""Preference pairs: which two of a prompt's K responses are compared, and why some pairs are left out.

| choose_type | chosen | rejected |
| --- | --- | --- |
| `random`     | the better of two random responses | the other |
| `max_random` | the best | a random other |
| `max_min`    | the best | the worst; `west_of_n` is the same (West-of-N, arXiv 2401.12086) |
| `max_max`    | the best | the second best |
| `max_min_p`  | the best | the worst, both after `len_penalty` per character is subtracted from the reward |
| `sweet_spot` | the best | the one whose reward is nearest to two standard deviations below the mean (arXiv 2502.16825) |
"""

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.prompts import with_ids
from baton.records import check_finite, check_token_ids, how_sampled, prompt_hash, prompt_of, rewards_of

ChooseType = Literal["random", "max_random", "max_min", "max_max", "max_min_p", "west_of_n", "sweet_spot"]

# What holds one entry for each response, and so says nothing about a pair; every other key passes through.
PER_RESPONSE_KEYS = (
    "responses",
    "response_token_ids",
    "finish_reasons",
    "response_logps",
    "rewards",
    "rewards_by",
    "logps_by",
)

IDENTICAL = "identical responses"
TIE = "tied rewards"
TRUNCATED = "fewer than two responses that were not cut off by length"
SMALL_MARGIN = "margin below min_margin"
UNEQUAL_LENGTHS = "lengths further apart than max_length_ratio"
TOO_CLOSE = "texts closer than min_edit_distance"

DEVIATIONS_BELOW = 2  # of `sweet_spot`


@dataclass(frozen=True)
class PairSettings:
    """How pairs are chosen. Raises InputError for values that make no sense, before any record is read.

    `len_penalty` is per character; `min_margin` is in units of the reward; `max_length_ratio` compares
    characters, longer over shorter; `drop_truncated` leaves out responses with finish reason `length` before
    the pair is chosen. With `pairs_per_prompt` above 1 each further pair is chosen among the responses that
    no pair before has used.
    """

    choose_type: ChooseType = "max_min"
    len_penalty: float = 0.0
    pairs_per_prompt: int = 1
    min_margin: float = 0.0
    max_length_ratio: float | None = None
    drop_truncated: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.choose_type not in get_args(ChooseType):
            raise InputError(f"`choose_type`: {self.choose_type!r} is not one of {', '.join(get_args(ChooseType))}")
        if self.len_penalty and self.choose_type != "max_min_p":
            raise InputError(f"`len_penalty` acts with choose_type max_min_p only, not with {self.choose_type}")
        if self.pairs_per_prompt < 1:
            raise InputError(f"`pairs_per_prompt` must be at least 1, got {self.pairs_per_prompt}")
        if not self.min_margin >= 0:
            raise InputError(f"`min_margin` must be at least 0, got {self.min_margin}")
        if self.max_length_ratio is not None and not self.max_length_ratio >= 1:
            raise InputError(f"`max_length_ratio` must be at least 1, got {self.max_length_ratio}")


def candidates(count: int, settings: PairSettings) -> int:
    """How many pairs are requested of `count` responses: each response is in at most one pair."""
    return min(settings.pairs_per_prompt, count // 2)


def scores(responses: Sequence[str], rewards: Sequence[float], settings: PairSettings) -> list[float]:
    """What responses are compared by: the reward, less `len_penalty` for each character."""
    return [reward - settings.len_penalty * len(text) for text, reward in zip(responses, rewards, strict=True)]


def choose_pair(scores: Sequence[float], choose_type: ChooseType, generator: random.Random) -> tuple[int, int]:
    """The indices (chosen, rejected) of one pair among at least two responses, the higher score first.

    Of equal scores the earlier response counts as the better one. With up to 5 responses `sweet_spot` is `max_min`, since no
    score lies further than sqrt(K - 1) standard deviations below the mean.
    """
    ranked = sorted(range(len(scores)), key=lambda index: -scores[index])
    if choose_type == "random":
        first, second = sorted(generator.sample(range(len(ranked)), 2))
        return ranked[first], ranked[second]
    if choose_type == "max_random":
        return ranked[0], generator.choice(ranked[1:])
    if choose_type == "max_max":
        return ranked[0], ranked[1]
    if choose_type == "sweet_spot":
        goal = statistics.fmean(scores) - DEVIATIONS_BELOW * statistics.pstdev(scores)
        return ranked[0], min(reversed(ranked[1:]), key=lambda index: abs(scores[index] - goal))
    return ranked[0], ranked[-1]


def why_dropped(chosen: str, rejected: str, margin: float, settings: PairSettings) -> str | None:
    """The reason to leave out a pair, or None for a pair to keep."""
    if chosen == rejected:
        return IDENTICAL
    if margin <= 0:
        return TIE
    if margin < settings.min_margin:
        return SMALL_MARGIN
    if settings.max_length_ratio is not None:
        shorter, longer = sorted((len(chosen), len(rejected)))
        if longer > settings.max_length_ratio * shorter:
            return UNEQUAL_LENGTHS
    return None


def far_apart(pairs: Iterable[Record], least: float, drops: Drops) -> Iterator[Record]:
    """Yield the pairs whose texts differ by `least` of the longer one's characters, from 0 to 1; `drops` gets the others.

    DPO makes a chosen response less likely where the rejected one is nearly the same (arXiv 2402.13228).
    """
    for pair in pairs:
        chosen, rejected = pair["chosen"], pair["rejected"]
        wanted = least * max(len(chosen), len(rejected))
        # The difference of lengths is a lower bound.
        if abs(len(chosen) - len(rejected)) >= wanted or edit_distance(chosen, rejected) >= wanted:
            yield pair
        else:
            drops.add(TOO_CLOSE, pair["id"])


def edit_distance(first: str, second: str) -> int:
    """The fewest characters to insert, delete or replace to get from one text to the other.

    A column of the usual table is two integers of a bit for each character of `first`, which say where the next row is one
    more or one less (Hyyrö, "A bit-vector algorithm for computing Levenshtein and Damerau edit distances", 2003).
    """
    if not first:
        return len(second)
    places: dict[str, int] = {}
    for number, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << number
    every, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    more, less, distance = every, 0, len(first)
    for character in second:
        equal = places.get(character, 0)
        diagonal = (((equal & more) + more) ^ more) | equal | less
        right_more, right_less = less | (every & ~(diagonal | more)), diagonal & more
        distance += bool(right_more & last) - bool(right_less & last)
        right_more, right_less = right_more << 1 | 1, right_less << 1
        more, less = every & (right_less | ~(diagonal | right_more)), every & right_more & diagonal
    return distance


def why_left_out(pair: Record, settings: PairSettings) -> str | None:
    """The reason to leave out a pair that a file gives as it is, or None; what the file does not say is no reason."""
    if settings.drop_truncated and "length" in (pair.get("chosen_finish_reason"), pair.get("rejected_finish_reason")):
        return TRUNCATED
    margin = pair.get("margin")
    return why_dropped(pair["chosen"], pair["rejected"], math.inf if margin is None else margin, settings)


def checked_pair(pair: Record, where: str) -> Record:
    """A pair record whose numbers are finite and whose token ids are integers, with its `margin` if that is known.

    Raises InputError, naming `where` (file:line) and the field.
    """
    for name in ("chosen_reward", "rejected_reward", "margin"):
        if pair.get(name) is not None:
            check_finite(pair[name], where, name)
    for name in ("chosen_token_ids", "rejected_token_ids"):
        if pair.get(name) is not None:
            check_token_ids(pair[name], where, name)
    chosen, rejected = pair.get("chosen_reward"), pair.get("rejected_reward")
    if pair.get("margin") is None and chosen is not None and rejected is not None:
        return {**pair, "margin": chosen - rejected}
    return pair


def pairs_of(
    records: Iterable[tuple[str, Record]], settings: PairSettings, drops: Drops, extra: Mapping[str, Record] | None = None
) -> Iterator[Record]:
    """Yield the pair records of annotated records, given as ("file:line", record); `drops` gets the others.

    Each prompt gives `candidates(K, settings)` pairs or drops, so pairs + drops is that number summed over
    the records. `margin` is the difference of the `scores` that the pair was chosen by; `chosen_reward` and
    `rejected_reward` are the rewards as annotated. Random choices derive from the seed and the prompt's id,
    whatever the order of the records. `extra` holds further annotated responses by the id of their prompt, which stand
    beside the record's own; K counts both. Raises InputError for records without valid responses and rewards, and for K = 1.
    """
    for where, record in with_ids(iter(records)):
        rewards_of(record, where)
        prompt, more = prompt_of(record, where), (extra or {}).get(record["id"])
        if more and more.get("prompt_hash", prompt_hash(prompt)) != prompt_hash(prompt):
            raise InputError(f"{where}: `extra_responses` has another prompt under this `id`; remove `id` from both files")
        whole = joined({**record, "prompt": prompt}, more)
        if len(whole["responses"]) < 2:
            raise InputError(f"{where}: a pair needs at least 2 `responses`, got 1; generate with --K 2 or more")
        yield from _pairs_of_record(whole, settings, drops)


def joined(record: Record, extra: Record | None) -> Record:
    """An annotated record with another one's responses after its own; what one of them does not know of its own is None."""
    if extra is None:
        return record
    both = {name: value for name, value in record.items() if name not in PER_RESPONSE_KEYS}
    for name in ("responses", "rewards", "response_token_ids", "finish_reasons"):
        if record.get(name) or extra.get(name):
            both[name] = [value for part in (record, extra) for value in part.get(name) or [None] * len(part["responses"])]
    return both


def _pairs_of_record(record: Record, settings: PairSettings, drops: Drops) -> Iterator[Record]:
    responses = record["responses"]
    compared = scores(responses, record["rewards"], settings)
    reasons = record.get("finish_reasons") or [None] * len(responses)
    open_ = [i for i, reason in enumerate(reasons) if not (settings.drop_truncated and reason == "length")]
    generator = random.Random(f"{settings.seed} {record['id']}")
    for _ in range(candidates(len(responses), settings)):
        if len(open_) < 2:
            drops.add(TRUNCATED, record["id"])
            continue
        best, other = choose_pair([compared[i] for i in open_], settings.choose_type, generator)
        chosen, rejected = open_[best], open_[other]
        open_ = [i for i in open_ if i not in (chosen, rejected)]
        margin = compared[chosen] - compared[rejected]
        if reason := why_dropped(responses[chosen], responses[rejected], margin, settings):
            drops.add(reason, record["id"])
        else:
            yield pair_record(record, chosen, rejected, margin)


def pair_record(record: Record, chosen: int, rejected: int, margin: float) -> Record:
    """The pair record of two responses of an annotated record, given by their indices."""
    pair = {name: value for name, value in record.items() if name not in PER_RESPONSE_KEYS}
    for side, index in (("chosen", chosen), ("rejected", rejected)):
        pair[side] = record["responses"][index]
        known = how_sampled(record, index, f"{side}_token_ids", f"{side}_finish_reason")
        pair |= {name: value for name, value in known.items() if value is not None}
        pair[f"{side}_reward"] = record["rewards"][index]
    return {**pair, "margin": margin}
