"""Prompt sets: records from a local file or a Hugging Face dataset, their ids, and their shards."""

import codecs
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import orjson

from baton import jsonl
from baton.conversations import is_answered, without_answer
from baton.errors import DATA_ENDINGS, InputError
from baton.jsonl import Record
from baton.mixing import Selection, select_rows
from baton.partial import shard_range
from baton.records import Messages, prompt_as_written, prompt_hash, prompt_id, prompt_of, with_prefix
from baton.sources import leave_silent_hub, refuse_cut_name

log = logging.getLogger("baton")


def read_records(
    source: str, split: str = "train", refused: Callable[[str, InputError], None] | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield ("where", record) of a local .jsonl, .jsonl.gz, .json or .parquet file or a Hugging Face dataset.

    All but `.json` are streamed. A `.json` file holds a list, {"instances": list}, or, as some toolkits write
    it, JSON Lines. `refused` gets ("where", error) of each line that is no JSON object; without it the first is raised.
    """
    path = Path(source)
    if source.endswith(".parquet"):
        yield from _read_parquet(path)
    elif source.endswith(".json"):
        yield from _read_json(path, refused)
    elif source.endswith(DATA_ENDINGS):
        yield from jsonl.read(path, refused)
    elif path.exists():
        raise InputError(f"{source}: expected a file ending in {', '.join(DATA_ENDINGS)}")
    else:
        yield from _read_hub(source, split)


class PromptSet:
    """The prompts that a run takes, in order, with ids that do not depend on the shard.

    Making it reads the sources once. It holds 20 bytes a prompt; the records themselves are streamed again for
    each shard. Several sources are named with commas between; `selection` says which of their prompts to take.
    A `system_prompt` is put before every conversation that has none. A conversation that ends with the assistant is a prompt
    without these last turns; `answered` is how many there were among all prompts of the sources.
    With a `prefix` the policy reads it before the last user turn: it is in the messages, and the record, whose prompt and id
    are those without it, names it as `prompt_prefix`.
    """

    def __init__(
        self,
        source: str,
        key: str | None = None,
        split: str = "train",
        selection: Selection | None = None,
        system_prompt: str | None = None,
        prefix: str | None = None,
    ):
        self.prefix = prefix
        self.sources, self.key, self.split, self.system_prompt = split_sources(source), key, split, system_prompt
        hashes, lengths, self.answered = array("Q"), [], 0
        for name in self.sources:
            before = len(hashes)
            for where, record in read_records(name, split):
                messages, answered = self._messages(record, where)
                hashes.append(prompt_hash(messages))
                self.answered += answered
            if len(hashes) == before:
                _no_records(name)
            lengths.append(len(hashes) - before)
        self.rows = select_rows(lengths, selection or Selection())
        self.hashes = np.frombuffer(hashes, dtype=np.uint64)[self.rows]
        self.ordinals = ordinals(self.hashes)
        if self.answered:
            log.warning("%s: %d prompts end with the assistant; that turn is left out", source, self.answered)

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, position: int) -> str:
        """The id of the prompt at `position`."""
        return prompt_id(int(self.hashes[position]), int(self.ordinals[position]))

    def shard(self, index: int, count: int) -> Iterator[tuple[int, str, Record, Messages]]:
        """Yield (position in the prompt set, where, record with `id` and `prompt`, messages) of one shard."""
        span = shard_range(len(self), index, count)
        records = _records_at(self.rows[span.start : span.stop], self.sources, self.split)
        for position, (where, record) in zip(span, records, strict=True):
            messages, _ = self._messages(record, where)
            numbered_record = {**record, "id": self.id(position), "prompt": messages}
            numbered_record.pop("prompt_prefix", None)  # of an earlier sampling
            if self.prefix:
                numbered_record["prompt_prefix"] = self.prefix
            yield position, where, numbered_record, with_prefix(messages, self.prefix, where)

    def _messages(self, record: Record, where: str) -> tuple[Messages, bool]:
        """The messages of a prompt, and whether it was answered already."""
        messages, keys = prompt_as_written(record, where, self.key)
        answered = is_answered(messages)
        if answered:
            messages = without_answer(messages, where, keys[0])
        if self.system_prompt is None or messages[0]["role"] == "system":
            return messages, answered
        return [{"role": "system", "content": self.system_prompt}, *messages], answered


def split_sources(source: str) -> list[str]:
    """The sources named in `A,B`; a path that exists as it stands is one source."""
    # Unlike pathlib's, this `exists` is False of a text that is too long to be a path.
    return [source] if os.path.exists(source) else [name for name in source.split(",") if name]


def source_inputs(name: str, source: str) -> dict[str, str]:
    """The sources named in `A,B` as inputs of a stage: `name`, then `name2`, …"""
    return {name if i == 0 else f"{name}{i + 1}": each for i, each in enumerate(split_sources(source))}


def mixed_records(
    source: str,
    split: str,
    probs: tuple[float, ...] | None,
    seed: int = Selection.seed,
    max_samples: int | None = None,
    refused: Callable[[str, InputError], None] | None = None,
) -> Iterator[tuple[str, Record]]:
    """Yield ("where", record) of all sources named in `A,B`, one after another; with `probs`, drawn at these rates.

    Drawn as `select_rows` says: until one source is used up; at most `max_samples`. `refused` gets the lines that are no JSON
    objects, as `read_records` says. Raises InputError for a source without records.
    """
    sources = split_sources(source)
    if probs is None:
        yield from islice(_one_after_another(sources, split, refused), max_samples)
        return
    skipped = refused and (lambda where, error: None)
    lengths = [sum(1 for _ in read_records(name, split, skipped)) or _no_records(name) for name in sources]
    rows = select_rows(lengths, Selection(probs=probs, max_samples=max_samples, seed=seed))
    ends = np.cumsum(lengths)
    for name, length, end in zip(sources, lengths, ends, strict=True):
        log.info("%s: %d of %d records taken", name, np.count_nonzero((end - length <= rows) & (rows < end)), length)
    yield from _records_at(rows, sources, split, refused)


def _one_after_another(
    sources: list[str], split: str, refused: Callable[[str, InputError], None] | None
) -> Iterator[tuple[str, Record]]:
    for name in sources:
        records = read_records(name, split, refused)
        yield next(records, None) or _no_records(name)
        yield from records


def _no_records(name: str) -> NoReturn:
    raise InputError(f"{name}: holds no records")


def _records_at(
    rows: Iterable[int], sources: list[str], split: str, refused: Callable[[str, InputError], None] | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield the records at `rows`, ascending and counted on from source to source; a row may come several times."""
    numbered = enumerate(chain.from_iterable(read_records(name, split, refused) for name in sources))
    at, found = -1, ("", {})
    for row in rows:
        while at < row:
            at, found = next(numbered)
        yield found


def ordinals(hashes: np.ndarray) -> np.ndarray:
    """For each of `hashes` (uint64, shape (N,)) how many equal ones stand before it (uint32, shape (N,))."""
    order = np.argsort(hashes, kind="stable")
    in_order = hashes[order]
    starts = np.flatnonzero(np.r_[True, in_order[1:] != in_order[:-1]])
    rank = np.arange(len(hashes)) - np.repeat(starts, np.diff(np.r_[starts, len(hashes)]))
    result = np.empty(len(hashes), dtype=np.uint32)
    result[order] = rank
    return result


def with_ids(records: Iterator[tuple[str, Record]], key: str | None = None) -> Iterator[tuple[str, Record]]:
    """Yield records with an `id`, made from the prompt (under `key`) where a file has none."""
    seen: Counter[int] = Counter()
    for where, record in records:
        if "id" not in record:
            hash_ = prompt_hash(prompt_of(record, where, key))
            yield where, {"id": prompt_id(hash_, seen[hash_]), **record}
            seen[hash_] += 1
        else:
            yield where, record


def _read_json(path: Path, refused: Callable[[str, InputError], None] | None) -> Iterator[tuple[str, Record]]:
    with jsonl.open_lines(path) as file:
        text = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        content = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        first = text[:4096].lstrip().partition(b"\n")[0].strip()
        if first.startswith(b"{") and first != b"{":
            yield from jsonl.read(path, refused)
            return
        raise InputError(f"{path}: not JSON: {error}") from None
    if isinstance(content, dict):
        content = content["instances"] if isinstance(content.get("instances"), list) else [content]
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list of records, got {type(content).__name__}")
    for number, record in enumerate(content, 1):
        if not isinstance(record, dict):
            raise InputError(f"{path}: item {number}: expected a JSON object, got {type(record).__name__}")
        yield f"{path}: item {number}", record


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise InputError(f"{path}: cannot be read as parquet: {error}") from None
    number = 0
    for batch in file.iter_batches(batch_size=1000):
        for record in batch.to_pylist():
            number += 1
            yield f"{path}: row {number}", record


def _read_hub(name: str, split: str) -> Iterator[tuple[str, Record]]:
    refuse_cut_name(name)
    leave_silent_hub()
    import datasets

    log.info("%s: not a local file, reading it as a Hugging Face dataset", name)
    try:
        dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{name}: neither a local file ({', '.join(DATA_ENDINGS)}) nor a Hugging Face dataset that can be loaded: {error}"
        ) from None
    for number, record in enumerate(dataset, 1):
        yield f"{name}: row {number}", record
