"""Responses with scores, as data sets publish them, read as annotated records: `responses` and `rewards`.

UltraFeedback   {"instruction", "completions": [{"response", a score}]}
HelpSteer       rows of one prompt that follow each other, each {"prompt", "response", a score}
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from baton.conversations import short
from baton.errors import InputError
from baton.jsonl import Record
from baton.records import check_finite, named, responses_of

ALONE = "fewer than two scored responses"

# The first of these that a completion or a row has, unless --score_key names another.
SCORE_KEYS = ("score", "fine-grained_score", "overall_score", "helpfulness", "rating")


def annotated_records(records: Iterable[tuple[str, Record]], score: str | None = None) -> Iterator[tuple[str, Record]]:
    """Yield ("where", record): what has scores (under the key `score`) as annotated records, others as they are.

    Raises InputError for completions without scores.
    """
    for where, record in with_rows_merged(records, score):
        yield where, annotated_of(record, where, score)


def rewards_by_name(
    records: Iterable[tuple[str, Record]], names: Sequence[str]
) -> Iterator[tuple[str, Record, dict[str, list[float]]]]:
    """Yield ("where", record with `responses`, {name: K rewards}), each name's rewards from the record's `rewards_by`.

    Of rows of one prompt, such as HelpSteer's, they are those of the columns with these names. Raises InputError for a record
    that has not all of them.
    """
    for where, record in with_rows_merged(records, names[0]):
        annotated = annotated_of(record, where, names[0])
        if "responses" not in annotated:
            raise InputError(
                f"{where}: the record has neither `responses` nor a `response` with a number `{names[0]}` (--heads), it has "
                f"{named(record)}"
            )
        count, by = len(responses_of(annotated, where)), annotated.get("rewards_by")
        if annotated is not record:
            columns = {name: annotated.get(name) for name in names[1:]}
            columns = {name: column if isinstance(column, list) else [column] * count for name, column in columns.items()}
            by = {names[0]: annotated["rewards"]} | columns
        if not isinstance(by, dict) or not by.keys() >= set(names):
            held = named(by) if isinstance(by, dict) else "none"
            raise InputError(
                f"{where}: `rewards_by` must hold rewards by the names {', '.join(names)}, it has {held}; annotate with "
                "scorers of these names, or give other --heads"
            )
        for name in names:
            if not isinstance(by[name], list) or len(by[name]) != count:
                raise InputError(f"{where}: `rewards_by`: `{name}` must be a list of {count} numbers, one for each response")
            for reward in by[name]:
                check_finite(reward, where, f"rewards_by: {name}")
        yield where, annotated, {name: by[name] for name in names}


def with_rows_merged(records: Iterable[tuple[str, Record]], score: str | None = None) -> Iterator[tuple[str, Record]]:
    """Yield ("where", record): rows of one prompt that follow each other as one record with `completions`, others as they are.

    Where the rows have different values under another key, the record has a list of them, of `id` the first. It holds the rows
    of one prompt at a time, and checks nothing.
    """
    number = 0

    def prompt_or_own(both: tuple[str, Record]) -> object:
        nonlocal number
        number += 1
        return (both[1]["prompt"],) if is_scored_row(both[1], score) else number

    for prompt, group in groupby(records, prompt_or_own):
        if isinstance(prompt, tuple):
            rows = list(group)
            yield rows[0][0], _merged([row for _, row in rows], score)
        else:
            yield from group


# What a stage or a data set has made of a record already: then the columns of scored responses only pass through.
MADE = frozenset({"responses", "chosen", "rejected", "label"})


def is_scored_row(record: Record, score: str | None = None) -> bool:
    """Whether a record is one response of a prompt with its score."""
    if not isinstance(record.get("response"), str) or "prompt" not in record or record.keys() & MADE:
        return False
    return score_key(record, score) is not None


def score_key(scored: Record, score: str | None = None) -> str | None:
    """The key of the score of a row or a completion, `score` if that is given, or None."""
    return next((name for name in ((score,) if score else SCORE_KEYS) if scored.get(name) is not None), None)


def has_completions(record: Record) -> bool:
    """Whether a record holds completions, as UltraFeedback does."""
    completions = record.get("completions")
    if record.keys() & MADE or not isinstance(completions, list):
        return False
    return all(isinstance(each, dict) and "response" in each for each in completions)


def annotated_of(record: Record, where: str, score: str | None = None) -> Record:
    """UltraFeedback's completions as `responses` and `rewards`; any other record as it is. Raises InputError."""
    if not has_completions(record):
        return record
    responses, rewards = [], []
    for number, completion in enumerate(record["completions"], 1):
        key = score_key(completion, score)
        if key is None:
            raise InputError(
                f"{where}: `completions`: number {number} has no score ("
                f"{', '.join(f'`{name}`' for name in ((score,) if score else SCORE_KEYS))}); name its key with --score_key"
            )
        check_finite(completion[key], where, f"completions: {key}")
        if not isinstance(completion["response"], str):
            raise InputError(f"{where}: `completions`: `response` must be a text, got {short(completion['response'])}")
        responses.append(completion["response"])
        rewards.append(completion[key])
    others = {name: value for name, value in record.items() if name != "completions"}
    return others | {"responses": responses, "rewards": rewards}


def _merged(rows: list[Record], score: str | None) -> Record:
    key = score_key(rows[0], score)
    merged: Record = {"prompt": rows[0]["prompt"]}
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "response", key)):
        values = [row.get(name) for row in rows]
        merged[name] = values[0] if name == "id" or all(value == values[0] for value in values) else values
    return merged | {"completions": [{"response": row["response"], key: row.get(key)} for row in rows]}
