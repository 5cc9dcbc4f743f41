"""Join the shards of a generation in order, once all of them are there, finished and of one task.

    python generation/merge_data.py --base_path data/gen_data --num_datasets 8 --output_dir data/gen.jsonl

reads data/gen_data0.jsonl … data/gen_data7.jsonl. Lines are copied, not parsed, so memory stays flat. Shards
by another toolkit, which have no manifests, are taken as they are.
"""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from baton import program
from baton.ahead import is_up_to_date, will_be_made
from baton.arguments import StageArguments, option, parse
from baton.drops import Drops
from baton.errors import InputError
from baton.manifest import in_progress, manifest_path, read_manifest
from baton.shards import finished_number, refused_path, shard_manifests, shard_path, task_difference
from baton.stage import Stage

log = logging.getLogger("baton")

CHUNK = 1 << 16  # bytes copied at a time; writes of 256 KiB and more take several times as long on ext4


class Arguments(StageArguments):
    base_path: str = option(..., "shard i is <base_path>i.jsonl", changes_result=False)
    output_dir: str = option(..., "the merged FILE, such as data/gen_data.jsonl", changes_result=False)
    num_datasets: int = option(..., "how many shards", ge=1, changes_result=False)


def main() -> None:
    arguments = parse(Arguments, __doc__ or "")
    base, output = arguments.base_path, Path(arguments.output_dir)
    shards = [Path(f"{base}{index}.jsonl") for index in range(number_of_shards(base, arguments.num_datasets))]
    manifests, facts = [], {}
    if not any(map(will_be_made, shards)):
        for shard in shards:
            check_there(base, shard)
        manifests = [read_manifest(shard) for shard in shards]
        facts = check_one_run(shards, manifests)

    stage = Stage.begin("merge", arguments, output, {f"shard{i}": shard for i, shard in enumerate(shards)})
    if stage is None:
        return
    lines = merge(shards, manifests, output)
    stage.finish(records_in=lines, records_out=lines, drops=Drops(), **facts)


def number_of_shards(base: str, requested: int) -> int:
    """How many shards to merge: `requested`, or the number in which the task was finished where that is another."""
    if base.endswith("/"):  # 0.jsonl, 1.jsonl, … in a folder are of another toolkit
        return requested
    prefix = Path(base)
    number = finished_number(shard_manifests(prefix))
    if number is None or number == requested:
        return requested
    if any(refused_path(shard_path(prefix, index)).exists() for index in range(max(number, requested))):
        return requested
    log.warning("--num_datasets %d: the task was finished in %d shards, so these are merged", requested, number)
    return number


def check_there(base: str, shard: Path) -> None:
    """Raise InputError if a shard is missing or unfinished, or if the last program that was to make it refused to."""
    refused = refused_path(shard)
    if refused.exists() and not is_up_to_date(shard):  # else its program would delete the word of an earlier one
        raise InputError(
            f"{shard}: is of an earlier task: the last program for this shard refused to replace it: "
            f"{refused.read_text(encoding='utf-8').strip()}"
        )
    if not shard.is_file():
        if not base.endswith("/") and manifest_path(in_progress(Path(base))).exists():
            raise InputError(f"{shard}: unfinished; run its get_hf2.py again (same arguments) to complete it")
        raise InputError(f"{shard}: missing; generate this shard, or give the right --base_path and --num_datasets")


def check_one_run(shards: list[Path], manifests: list[dict[str, Any] | None]) -> dict[str, Any]:
    """What the shards' manifests say of the whole: prompts, drops, tokens.

    Raises InputError if the shards are of different tasks, or not all of one.
    """
    if not any(manifests):
        log.info("no shard has a manifest: taken as they are")
        return {}
    first = manifests[0]
    for index, (shard, manifest) in enumerate(zip(shards, manifests, strict=True)):
        if first is None or manifest is None:
            without = shards[0] if first is None else shard
            raise InputError(f"{without}: has no manifest, but other shards have one: generate it again")
        place = manifest.get("shard")
        if place != [index, len(shards)]:
            made = f"made as shard {place[0]} of {place[1]}" if place else "not made as a shard"
            raise InputError(
                f"{shard}: {made}, taken for shard {index} of {len(shards)}; give the right --num_datasets, or generate the "
                "shards again"
            )
        if difference := task_difference(first, manifest):
            raise InputError(f"{shard}: of another task than {shards[0]}: it has another {difference}")
    dropped = Counter()
    for manifest in manifests:
        dropped.update(manifest["counts"]["dropped"])
    prompts = sum(manifest["counts"]["in"] for manifest in manifests)
    if prompts != first["prompts"]:
        raise InputError(f"{shards[0]}: the shards hold {prompts} prompts, the prompt set {first['prompts']}")
    tokens = sum(manifest["tokens"] for manifest in manifests)
    return {"prompts": prompts, "dropped_in_shards": dict(dropped), "tokens": tokens}


def merge(shards: list[Path], manifests: list[dict[str, Any] | None], output: Path) -> int:
    """Copy the shards one after another into `output`, atomically; returns the number of lines.

    Raises InputError if a shard has not as many lines as its manifest says.
    """
    partial, total, buffer = in_progress(output), 0, bytearray(CHUNK)
    try:
        with partial.open("wb", buffering=0) as target:
            for shard, manifest in zip(shards, manifests, strict=True):
                lines = copy_lines(shard, target, buffer)
                if manifest and lines != manifest["counts"]["out"]:
                    expected = manifest["counts"]["out"]
                    raise InputError(f"{shard}: {lines} lines, but {expected} in its manifest; generate it again")
                total += lines
            os.fsync(target.fileno())
    except InputError:
        partial.unlink(missing_ok=True)  # or it would stand in the way of the shards that are generated again
        raise
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(output)) from None
    partial.replace(output)
    return total


def copy_lines(source: Path, target: BinaryIO, buffer: bytearray) -> int:
    """Append a file to `target` (unbuffered), with a line break at its end; returns the number of lines.

    One `buffer` serves all reads: memory fresh from the system for each would cost more than the copying.
    """
    lines, last, view = 0, ord("\n"), memoryview(buffer)
    with source.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            lines += buffer.count(b"\n", 0, size)
            last = buffer[size - 1]
            _write_all(target, view[:size])
    if last != ord("\n"):
        lines += 1
        _write_all(target, memoryview(b"\n"))
    return lines


def _write_all(target: BinaryIO, rest: memoryview) -> None:
    while rest:
        rest = rest[target.write(rest) :]


if __name__ == "__main__":
    program.run(main)
