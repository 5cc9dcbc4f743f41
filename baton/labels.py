"""Labelled examples: one response to a prompt, and whether it is desirable, which is all that KTO learns from.

| record | desirable | undesirable | neither |
| --- | --- | --- | --- |
| {"prompt", "completion", "label"} | label true | label false | |
| {"prompt", "chosen", "rejected"} | chosen | rejected | both, where they are the same |
| {"prompt", "pos_answers", "neg_answers"} | the first | the second | |
| {"prompt", "responses", "rewards"} | reward above `desirable_above` | reward below `undesirable_below` | the others |

Prompts, pairs and scores have any of the shapes of `preferences.py`. A label is true or false, or 1 or 0.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from baton.conversations import as_messages, is_answered, short
from baton.demonstrations import RESPONSE_KEYS
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.pairs import IDENTICAL, PER_RESPONSE_KEYS, checked_pair
from baton.preferences import ANSWER_KEYS, preference_of, preferences_in
from baton.prompts import with_ids
from baton.records import CONVERSATION_KEYS, check_token_ids, how_sampled, named, prompt_as_written, prompt_of, rewards_of
from baton.scored import annotated_records

BETWEEN = "reward neither above desirable_above nor below undesirable_below"
AT_MEAN = "reward equal to the mean of its prompt's rewards"
TRUNCATED = "response cut off by length"

# What a pair record says of its two sides, and an example of its one: the text and its token ids, finish reason, reward.
SIDE_ENDINGS = ("", "_token_ids", "_finish_reason", "_reward")

LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


@dataclass(frozen=True)
class LabelSettings:
    """How annotated responses are labelled. Raises InputError for values that make no sense, before any record is read.

    The thresholds are in units of the reward; without them both are the mean of the rewards of the same prompt.
    `drop_truncated` leaves out responses with finish reason `length`, of any kind of record.
    """

    desirable_above: float | None = None
    undesirable_below: float | None = None
    drop_truncated: bool = False

    def __post_init__(self) -> None:
        above, below = self.desirable_above, self.undesirable_below
        if (above is None) != (below is None):
            raise InputError("`desirable_above` and `undesirable_below`: give both, or neither for the mean of each prompt")
        if above is not None and not (math.isfinite(above) and math.isfinite(below) and below <= above):
            raise InputError(f"`undesirable_below` ({below}) must not be above `desirable_above` ({above}), both finite")


def labelled_examples(
    records: Iterable[tuple[str, Record]],
    settings: LabelSettings,
    drops: Drops,
    counted: Counter[str],
    score: str | None = None,
) -> Iterator[Record]:
    """Yield the labelled examples of ("file:line", record)s of any of the three kinds; `drops` gets the other responses.

    An example has the `id` and `prompt` of its record, `completion` (a text), `label`, and where they are known
    `completion_token_ids`, `completion_finish_reason` and `completion_reward`; unknown keys stay. `counted` gets the
    numbers of `in` (examples and drops together), `desirable` and `undesirable`. `score` is the key of scores that have an
    unusual name. Raises InputError for the first bad record.
    """
    annotated = annotated_records(records, score)
    checked = ((where, each) for where, record in annotated for each in checked_records(record, where))
    for _, record in with_ids(checked):
        for example, label, reason in _candidates(record, settings):
            counted["in"] += 1
            if settings.drop_truncated and example.get("completion_finish_reason") == "length":
                drops.add(TRUNCATED, record["id"])
            elif label is None:
                drops.add(reason, record["id"])
            else:
                counted["desirable" if label else "undesirable"] += 1
                yield {**example, "label": label}


def check_both_kinds(desirable: int, undesirable: int, source: object, drops: Drops) -> None:
    """Raise InputError unless there are examples of both kinds."""
    if not desirable or not undesirable:
        raise InputError(
            f"{source}: {desirable} desirable and {undesirable} undesirable examples are left, and KTO learns from both "
            f"kinds; dropped: {drops}"
        )


def checked_records(record: Record, where: str) -> list[Record]:
    """A record of any kind with its prompt as messages and its responses as texts; of ReaL's answers, each pair."""
    if record.keys().isdisjoint(("responses", "chosen")) and any(name in record for name in ANSWER_KEYS):
        return preferences_in(record, where)
    return [_checked(record, where)]


def _checked(record: Record, where: str) -> Record:
    if "responses" in record:
        rewards_of(record, where)
        return {**record, "prompt": prompt_of(record, where)}
    if "chosen" in record or "rejected" in record:
        return checked_pair(record | preference_of(record, where), where)
    example, keys = _completed(record, where)
    if record.get("completion_token_ids") is not None:
        check_token_ids(record["completion_token_ids"], where, "completion_token_ids")
    others = {name: value for name, value in record.items() if name not in keys}
    return {**others, **example, "label": label_of(record, where)}


def label_of(record: Record, where: str) -> bool:
    """The label of a record: true for desirable. Raises InputError unless it is true, false, 1 or 0, also as a text."""
    value = record.get("label")
    label = LABELS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if label is None:
        raise InputError(
            f"{where}: `label` must be true (desirable) or false (undesirable), or 1 or 0, got {short(value)}; name its key "
            "with --label_key"
        )
    return label


def _completed(record: Record, where: str) -> tuple[Record, tuple[str, ...]]:
    """The `prompt` and `completion` of a record, and the keys that they were read from."""
    names = () if any(name in record for name in CONVERSATION_KEYS) else RESPONSE_KEYS
    key = next((name for name in ("completion", *names) if name in record), None)
    if key is not None:
        prompt, keys = prompt_as_written(record, where)
        return {"prompt": prompt, "completion": _completion_of(record, key, where)}, (*keys, key)
    if not names:
        messages, keys = prompt_as_written(record, where)
        if len(messages) > 1 and is_answered(messages) and messages[-1]["content"].strip():
            return {"prompt": messages[:-1], "completion": messages[-1]["content"]}, keys
        raise InputError(f"{where}: `{keys[0]}` must end with the response of the assistant that `label` is about")
    raise InputError(
        f"{where}: expected `prompt`, `completion` and `label`, or `chosen` and `rejected`, or `responses` and `rewards`; "
        f"the record has {named(record)}"
    )


def _completion_of(record: Record, key: str, where: str) -> str:
    """The text of a completion, given as it stands or as one message of the assistant."""
    value = record[key]
    if isinstance(value, list):
        messages = as_messages(value, where, key)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise InputError(f"{where}: `{key}` must be one message of the assistant; earlier turns belong in `prompt`")
        value = messages[0]["content"]
    # A policy that stopped at once said nothing in text, but something in tokens.
    if not isinstance(value, str) or not (value.strip() or record.get("completion_token_ids")):
        raise InputError(f"{where}: `{key}` must be a text or a message that is not empty, got {value!r}")
    return value


def _candidates(record: Record, settings: LabelSettings) -> Iterator[tuple[Record, bool | None, str]]:
    """Yield (example, label or None, why there is none) for each response of a checked record."""
    if "responses" in record:
        yield from _annotated(record, settings)
    elif "chosen" in record:
        yield from _preference(record)
    else:
        yield record, record["label"], ""


def _annotated(record: Record, settings: LabelSettings) -> Iterator[tuple[Record, bool | None, str]]:
    shared = {name: value for name, value in record.items() if name not in PER_RESPONSE_KEYS}
    above, below, reason = settings.desirable_above, settings.undesirable_below, BETWEEN
    if above is None:
        # `statistics.mean` is exact, so that equal rewards are neither above nor below their mean.
        above = below = statistics.mean(record["rewards"])
        reason = AT_MEAN
    for index, reward in enumerate(record["rewards"]):
        example = {**shared, "completion": record["responses"][index], "completion_reward": reward}
        example |= how_sampled(record, index, "completion_token_ids", "completion_finish_reason")
        yield example, True if reward > above else False if reward < below else None, reason


def _preference(record: Record) -> Iterator[tuple[Record, bool | None, str]]:
    names = {side: {f"{side}{ending}": f"completion{ending}" for ending in SIDE_ENDINGS} for side in ("chosen", "rejected")}
    of_pair = {*names["chosen"], *names["rejected"], "margin"}
    shared = {name: value for name, value in record.items() if name not in of_pair}
    identical = record["chosen"] == record["rejected"]
    for side, completion_names in names.items():
        own = {renamed: record[name] for name, renamed in completion_names.items() if name in record}
        yield {**shared, **own}, None if identical else side == "chosen", IDENTICAL
