"""JSON Lines: read with line numbers in the errors, write one whole record at a time."""

import codecs
import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import orjson

from baton.errors import InputError, looked_in

Record = dict[str, Any]


def open_lines(path: Path) -> IO[bytes]:
    """Open a `.jsonl` or `.jsonl.gz` file for reading bytes."""
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        twins = [path.with_suffix(ending) for ending in (".jsonl", ".json")] if isinstance(error, FileNotFoundError) else []
        hint = next((f"; did you mean {twin}?" for twin in twins if twin.is_file()), looked_in(path) if twins else "")
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}{hint}") from None


def dump(record: object) -> bytes:
    """One record as a line, newline included; numbers, dates and times of other types than JSON's as numbers and texts.

    Raises InputError, naming the field, for what has no form in JSON, such as bytes.
    """
    try:
        return orjson.dumps(record, _in_json, orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        _refuse_field(record)
        raise


def _in_json(value: object) -> object:
    """A value of a type that JSON does not have, as Parquet's columns may, in one that it has."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return str(value)
    raise TypeError


def _refuse_field(record: object) -> None:
    """Raise InputError for the field of a record that has no form in JSON, if one is at fault."""
    for name, value in record.items() if isinstance(record, dict) else ():
        try:
            orjson.dumps(value, _in_json, orjson.OPT_SERIALIZE_NUMPY)
        except orjson.JSONEncodeError as error:
            raise InputError(
                f"`{name}` of a record cannot be written as JSON ({error}); leave this field out of the data"
            ) from None


def parse(line: bytes, where: str) -> Record:
    """One line as a record. Raises InputError, naming `where` (file:line), if it is not a JSON object."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{where}: {_other_format(line) or _not_finite(line) or f'not JSON: {error}'}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
    return record


def _other_format(line: bytes) -> str | None:
    """What to say of a line by which a file shows that it is no JSON Lines at all."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "in UTF-16; `iconv -f utf-16 -t utf-8 FILE > NEW.jsonl` makes it UTF-8"
    if line.startswith(b"\x1f\x8b"):
        return "compressed by gzip; give the file a name that ends in .jsonl.gz"
    if line.strip() in (b"{", b"["):
        return "a record, or a list, over several lines; JSON Lines have a record a line, and a .json file may hold a list"
    return None


def _not_finite(line: bytes) -> str | None:
    """What to say of a line that is no JSON only because some programs write NaN and Infinity into it."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    for name, field in record.items() if isinstance(record, dict) else ():
        inside = [field]
        while inside:
            value = inside.pop()
            if isinstance(value, float) and not math.isfinite(value):
                return f"`{name}` holds {value}, which is not finite; correct it or leave the record out"
            inside += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return None


def read(path: Path, refused: Callable[[str, InputError], None] | None = None) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record) for each line that is not blank; memory does not grow with the file.

    `refused` gets ("file:line", error) of each line that is no JSON object; without it the first such error is raised.
    """
    with open_lines(path) as lines:
        try:
            for number, found in enumerate(lines, 1):
                line = found.removeprefix(codecs.BOM_UTF8) if number == 1 else found  # editors on Windows write it
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = parse(line, where)
                except InputError as error:
                    if refused is None:
                        raise
                    refused(where, error)
                    continue
                yield where, record
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: broken gzip file: {error}") from None


def write(path: Path, records: Iterable[object]) -> int:
    """Write records to `path` atomically (a temporary name, then a rename); returns how many."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with partial.open("wb") as file:
        for record in records:
            file.write(dump(record))
            count += 1
        file.flush()
        os.fsync(file.fileno())  # else a machine that loses its power may keep the name without the content
    partial.replace(path)
    return count
