"""Promise 3 for JSONL outputs: finished records on disk at once, in any order, and in input order at the end.

A part file holds a line `[position, record]` for each finished record, where position counts the input's
records from 0. Every process appends to a part of its own, so no two write to one file; all parts together
say what is done.
"""

import errno
import glob
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

from baton import program
from baton.jsonl import Record, dump, parse


class PartialRecords:
    """One output's finished records: `in` tells what is done, `append` adds, `assemble` makes the final file.

    Holds 12 bytes a record, whatever the record's length.
    """

    def __init__(self, output: Path, count: int):
        """Read what earlier runs finished of `count` records; cut this process's half-written last line."""
        self.output, self.count = output, count
        self.part_of = array("i", [-1]) * count
        self.offset_of = array("q", [0]) * count
        self.parts = part_files(output)
        for number, part in enumerate(self.parts):
            for position, offset, _ in _lines(part):
                self.part_of[position], self.offset_of[position] = number, offset
        self.done = sum(1 for part in self.part_of if part >= 0)
        self.own = output.with_name(f"{output.name}.partial{program.rank() or ''}")
        if self.own.exists():
            os.truncate(self.own, max((offset + len(line) for _, offset, line in _lines(self.own)), default=0))
        self.file = None

    def __contains__(self, position: int) -> bool:
        return self.part_of[position] >= 0

    def records(self) -> Iterator[tuple[int, Record]]:
        """Yield (position, record) for everything finished before this process started."""
        for part in self.parts:
            for _, offset, line in _lines(part):
                position, record = parse_line(line, f"{part} at byte {offset}")
                yield position, record

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

    def assemble(self) -> int:
        """Write all parts to the output in input order, atomically; returns the number of records."""
        self.close()
        merged = PartialRecords(self.output, self.count)
        in_order = self.output.with_name(self.output.name + ".sorting")
        with in_order.open("wb", buffering=1 << 16) as file:
            sources = [part.open("rb") for part in merged.parts]
            written = 0
            for number, offset in zip(merged.part_of, merged.offset_of, strict=True):
                if number >= 0:
                    sources[number].seek(offset)
                    line = sources[number].readline()
                    file.write(line[line.index(b",") + 1 : -2] + b"\n")
                    written += 1
            for source in sources:
                source.close()
            file.flush()
            os.fsync(file.fileno())
        in_order.replace(self.output)
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
    """The part files of an output: `<output>.partial` of process 0, `<output>.partial1` of process 1, …"""
    name = glob.escape(output.name)
    return sorted([*output.parent.glob(f"{name}.partial"), *output.parent.glob(f"{name}.partial[0-9]*")])


def _lines(part: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (position, byte offset, line) of each whole line: all but what a killed process half wrote."""
    offset = 0
    with part.open("rb") as file:
        for line in file:
            if line.endswith(b"]\n"):
                yield int(line[1 : line.index(b",")]), offset, line
            offset += len(line)
