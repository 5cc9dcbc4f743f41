"""Promise 3 for JSONL outputs: finished records on disk at once, in any order, and in input order at the end.

A part file holds a line `[position, record]` for each finished record, where position counts the input's
records from 0. Every process appends to a part of its own, so no two write to one file; all parts together
say what is done, whatever number of processes wrote them.
"""

import errno
import glob
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from baton import program
from baton.errors import InputError
from baton.jsonl import Record, dump, parse


class PartialRecords:
    """One output's finished records: `in` says whether one is done, `append` adds one, `assemble` makes the final file.

    Holds 12 bytes a record, whatever the record's length.
    """

    def __init__(self, output: Path, count: int, span: range | None = None, part: str | None = None):
        """Read which of `count` records are finished; cut this process's half-written last line.

        `span` are the positions that this process is responsible for (all of them if None), `part` is the ending of its own
        part's name (if None: its rank, nothing for process 0).
        """
        self.output, self.span = output, range(count) if span is None else span
        self.part_of = array("i", [-1]) * count
        self.offset_of = array("q", [0]) * count
        self.count = len(self.span)
        self.parts = [part for part in part_files(output) if _may_hold(part, self.span, count)]
        for number, path in enumerate(self.parts):
            for position, offset, _ in _lines(path):
                self.part_of[position], self.offset_of[position] = number, offset
        self.done = sum(1 for position in self.span if position in self)
        self.own = output.with_name(f"{output.name}.partial{(program.rank() or '') if part is None else part}")
        if self.own.exists():
            os.truncate(self.own, max((offset + len(line) for _, offset, line in _lines(self.own)), default=0))
        self.file = None

    def __contains__(self, position: int) -> bool:
        return self.part_of[position] >= 0

    def records(self) -> Iterator[tuple[int, Record]]:
        """Yield (position, record) for everything of the span that was finished before this process started."""
        for part in self.parts:
            for position, offset, line in _lines(part):
                if position in self.span:
                    yield parse_line(line, f"{part} at byte {offset}")

    def append(self, position: int, record: Record) -> None:
        """Put a finished record on disk. A full disk raises OSError and leaves only whole lines behind."""
        if self.file is None:
            self.file = self.own.open("ab", buffering=0)
        start, line = self.file.tell(), b"[%d,%b]\n" % (position, dump(record)[:-1])
        try:
            written = self.file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.truncate(self.own, start)
            raise OSError(error.errno, error.strerror, str(self.own)) from None

    def assemble(self, target: Path | None = None) -> int:
        """Write the span's records to `target` (the output if None) in input order, atomically; returns their number."""
        self.close()
        target = target or self.output
        merged = PartialRecords(self.output, len(self.part_of), self.span)
        in_order = target.with_name(target.name + ".sorting")
        written = 0
        with ExitStack() as open_files:
            file = open_files.enter_context(in_order.open("wb", buffering=1 << 16))
            sources = [open_files.enter_context(part.open("rb")) for part in merged.parts]
            for position in self.span:
                if position in merged:
                    source = sources[merged.part_of[position]]
                    source.seek(merged.offset_of[position])
                    line = source.readline()
                    file.write(line[line.index(b",") + 1 : -2] + b"\n")
                    written += 1
            file.flush()
            os.fsync(file.fileno())
        in_order.replace(target)
        return written

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def parse_line(line: bytes, where: str) -> tuple[int, Record]:
    """A part file's line as (position, record)."""
    comma = line.index(b",")
    return int(line[1:comma]), parse(line[comma + 1 : -2], where)


def part_files(output: Path) -> list[Path]:
    """The part files of an output: `<output>.partial` of process 0, `.partial1` of process 1, `.partial0-of-8` of a shard, …"""
    name = glob.escape(output.name)
    return sorted([*output.parent.glob(f"{name}.partial"), *output.parent.glob(f"{name}.partial[0-9]*")])


def shard_range(total: int, index: int, count: int) -> range:
    """The positions of shard `index` of `count`: contiguous, in one shard each, sizes at most one apart."""
    if not 0 <= index < count:
        raise InputError(f"shard {index} of {count}: --local_index must be within 0..{count - 1} (0..my_world_size-1)")
    return range(total * index // count, total * (index + 1) // count)


def _may_hold(part: Path, span: range, total: int) -> bool:
    """Whether a part can hold positions of `span`: a shard's part, whose name says which shard, holds that shard's alone."""
    shard = re.search(r"\.partial(\d+)-of-(\d+)$", part.name)
    if not shard:
        return True
    held = shard_range(total, int(shard[1]), int(shard[2]))
    return held.start < span.stop and span.start < held.stop


def _lines(part: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (position, byte offset, line) of each whole line: all but what a killed process half wrote."""
    offset = 0
    with part.open("rb") as file:
        for line in file:
            if line.endswith(b"]\n"):
                yield int(line[1 : line.index(b",")]), offset, line
            offset += len(line)
