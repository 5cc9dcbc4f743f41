"""`convert`: Baton's records from a file of any known shape, without duplicates and what is too short or too long.

The data is read twice: first to see what is repeated, then to write. Beside the near duplicates it holds 17 bytes a record.
"""

import logging
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from baton import jsonl
from baton.data.arguments import ConvertArguments, held_out_path
from baton.data.near import NearDuplicates
from baton.data.reading import Counts, Source, Tally
from baton.data.survey import characters, hashes_of
from baton.drops import Drops
from baton.jsonl import Record, dump
from baton.launch.check import check_processes
from baton.manifest import put_aside, read_manifest, remove
from baton.prompts import ordinals, source_inputs
from baton.records import prompt_id
from baton.shapes import parts_of
from baton.sources import refuse_input
from baton.stage import Stage

log = logging.getLogger("baton")

DUPLICATES = {"exact": "exact duplicate", "near": "near duplicate"}


def convert(arguments: ConvertArguments) -> None:
    """Write the output with its manifest. Raises InputError where the data cannot be read."""
    check_processes()
    output = arguments.output_dir
    held_out = held_out_path(output)
    inputs = source_inputs("dataset", arguments.dataset_name_or_path)
    if arguments.split:
        refuse_input(held_out, inputs, "OUT", output)
    stale = not arguments.split and was_split(output)
    stage = Stage.begin("data", arguments, output, inputs)
    if stage is None and arguments.split and not arguments.check and not held_out.exists():
        log.info("%s: is gone, so both files are written again", held_out)
        stage = Stage.begin("data", arguments.model_copy(update={"overwrite": True}), output, inputs)
    if stage is None:
        return
    if stale and held_out.exists():
        held_out.replace(put_aside(held_out))
    source = Source(arguments)
    log.info("%s: %s, read from %s", arguments.dataset_name_or_path, source.kind, source.shape.name)
    kept, prompts = kept_records(source, arguments)
    drops = Drops()
    records = chosen(source, arguments, kept, prompts, drops)
    written, aside = write(output, held_out if arguments.split else None, records)
    if arguments.split:
        log.info("%s: %d records; %s: %d", output, written, held_out, aside)
    if written == 0:
        log.warning("%s: holds no record: %s", output, drops)
    counts = {"records_in": written + aside + drops.counts.total(), "records_out": written + aside}
    stage.finish(**counts, drops=drops, data={"kind": source.kind, "rows": source.rows, "held out": aside})
    remove(put_aside(held_out))


def was_split(output: Path) -> bool:
    """Whether an output is there that has held-out records beside it, as its manifest says."""
    manifest = read_manifest(output) or {}
    return manifest.get("stage") == "data" and bool(manifest["arguments"].get("split"))


def kept_records(source: Source, arguments: ConvertArguments) -> tuple[np.ndarray, np.ndarray]:
    """Which records are kept (bool, shape (N,)), of those of a fit length, and the hashes of the prompts of the kept ones.

    Of equal or similar ones the first is kept.
    """
    contents, prompts, new = array("Q"), array("Q"), array("b")
    near = NearDuplicates(arguments.near_threshold) if arguments.dedup == "near" else None
    for _, record in fitting(source, arguments, Tally()):
        messages, responses = parts_of(record, source.kind)
        label = record.get("label") if source.kind == "labelled" else None
        content, prompt = hashes_of(messages, responses, label)
        contents.append(content)
        prompts.append(prompt)
        if near is not None:
            new.append(near.is_new("\n".join(m["content"] for m in messages), *responses, label=label))
    hashes = np.frombuffer(prompts, dtype=np.uint64)
    kept = np.ones(len(hashes), dtype=np.bool_)
    if near is not None:
        kept = np.frombuffer(new, dtype=np.bool_)
    elif arguments.dedup == "exact" and len(hashes):
        kept = ordinals(np.frombuffer(contents, dtype=np.uint64)) == 0
    return kept, hashes[kept]


def chosen(
    source: Source, arguments: ConvertArguments, kept: np.ndarray, prompts: np.ndarray, drops: Drops
) -> Iterator[tuple[Record, bool]]:
    """Yield each record that is kept, with an `id`, and whether it is held out; `drops` gets the others."""
    numbers = ordinals(prompts) if len(prompts) else prompts
    position = 0
    for keep, (where, record) in zip(kept, fitting(source, arguments, drops), strict=True):
        if not keep:
            drops.add(DUPLICATES[arguments.dedup], where)
            continue
        hash_ = int(prompts[position])
        yield {"id": prompt_id(hash_, int(numbers[position])), **record}, is_held_out(hash_, arguments.split)
        position += 1


def fitting(source: Source, arguments: ConvertArguments, left_out: Counts) -> Iterator[tuple[str, Record]]:
    """Yield ("where", record) of each of Baton's records of a fit length; `left_out` gets the others."""
    for where, records in source.read(left_out):
        for record in records:
            if reason := unfit(record, source, arguments):
                left_out.add(reason, where)
            else:
                yield where, record


def unfit(record: Record, source: Source, arguments: ConvertArguments) -> str | None:
    """Why a record is too short or too long, or None."""
    prompt, *responses = characters(*parts_of(record, source.kind))
    for name, lengths in (("prompt", [prompt]), ("response", responses)):
        least, most = (getattr(arguments, f"{end}_{name}_characters") for end in ("min", "max"))
        if lengths and min(lengths) < least:
            return f"{name} shorter than min_{name}_characters {least}"
        if lengths and most is not None and max(lengths) > most:
            return f"{name} longer than max_{name}_characters {most}"
    return None


def is_held_out(prompt_hash: int, split: float | None) -> bool:
    """Whether the prompt with this 64-bit hash is held out: the same in every run, whatever else a file holds."""
    return split is not None and (prompt_hash >> 11) / 2**53 < split


def write(output: Path, held_out: Path | None, records: Iterator[tuple[Record, bool]]) -> tuple[int, int]:
    """Write the records to `output`, those held out to `held_out`, both atomically; returns how many to each."""
    if held_out is None:
        return jsonl.write(output, (record for record, _ in records)), 0
    unfinished, aside = held_out.with_name(held_out.name + ".partial"), 0

    def others() -> Iterator[Record]:
        nonlocal aside
        with unfinished.open("wb") as file:
            for record, is_aside in records:
                if is_aside:
                    file.write(dump(record))
                    aside += 1
                else:
                    yield record
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(held_out)  # before the output, which says that both are complete

    return jsonl.write(output, others()), aside
