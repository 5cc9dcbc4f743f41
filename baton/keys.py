"""Names that a file gives to the fields of its records, replaced by the usual ones before anything else is read."""

from collections.abc import Iterable, Iterator, Mapping

from baton.errors import InputError
from baton.jsonl import Record
from baton.records import named

# The usual name of a field, and the flag that gives its name in a file.
FLAGS = {
    "prompt": "--dataset_key",
    "chosen": "--chosen_key",
    "rejected": "--rejected_key",
    "response": "--output_key",
    "completion": "--output_key",
    "label": "--label_key",
    "text": "--dataset_key",
}

# Fields that say how a response was sampled, by what follows the name of the response in a pair.
SAMPLED = {
    "response": {"_token_ids": "response_token_ids", "_finish_reason": "finish_reason"},
    **{
        name: {ending: f"{name}{ending}" for ending in ("_token_ids", "_finish_reason")}
        for name in ("completion", "chosen", "rejected")
    },
}

Keys = Mapping[str, str | None]  # usual name: the file's name, None where that is the usual one


def with_usual_keys(records: Iterable[tuple[str, Record]], keys: Keys) -> Iterator[tuple[str, Record]]:
    """Yield ("where", record) with the fields in `keys` under their usual names. Raises InputError where one is missing."""
    renamed = given(keys)
    for where, record in records:
        yield where, usual_keys(record, where, renamed)


def given(keys: Keys) -> dict[str, str]:
    """The fields of `keys` that have another name than the usual one."""
    return {usual: key for usual, key in keys.items() if key and key != usual}


def usual_keys(record: Record, where: str, renamed: Mapping[str, str]) -> Record:
    """A record with the fields in `renamed` (usual name: the file's name) under their usual names.

    Beside a response its token ids and finish reason are renamed too: with `chosen`, `chosen_token_ids`, for example.
    """
    if not renamed:
        return record
    for usual, key in renamed.items():
        if key not in record:
            raise InputError(f"{where}: the record has no `{key}` ({FLAGS[usual]}), it has {named(record)}")
    sampled = {name: f"{key}{ending}" for usual, key in renamed.items() for ending, name in SAMPLED.get(usual, {}).items()}
    keys = {**renamed, **sampled}
    others = {name: value for name, value in record.items() if name not in keys.values()}
    return others | {usual: record[key] for usual, key in keys.items() if key in record}
