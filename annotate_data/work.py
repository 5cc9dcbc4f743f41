"""The work of annotation: which responses still lack a score; each score is on disk as soon as it is known."""

import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from baton.errors import InputError
from baton.jsonl import Record, dump
from baton.parallel import data_parallel
from baton.partial import PartialRecords
from baton.prompts import read_records, with_ids
from baton.records import Messages, prompt_of, responses_of


class Task(NamedTuple):
    """One record of which a scorer has yet to score the responses `missing`."""

    position: int  # of the record in the input, from 0
    where: str  # "file:line", for errors
    record: Record  # with its `id`
    prompt: Messages
    responses: list[str]
    missing: list[int]
    texts: list[str] | None = None  # prompt and response as one text each, where a client has applied a template itself


class Score(NamedTuple):
    """The score of response `index` of a task; None where there is none, and then `note` says why."""

    task: Task
    index: int
    value: float | None
    note: str | None = None
    again: bool = False  # there is none, but another try may give one: a call timed out, a service failed
    detail: str = ""  # what the log says beside the note, once for each note: a traceback, a server's words


class Annotated(NamedTuple):
    """One record with what the scorers say of its responses."""

    where: str  # "file:line"
    record: Record  # with its `id`
    scores: dict[str, list[float]]  # K by each scorer
    notes: list[str]  # of responses that have a score
    failures: list[str]  # why responses have none


# What every scorer is: a function from a stream of tasks to the score of each missing response, in any order.
Scorer = Callable[[Iterable[Task]], Iterator[Score]]


class Responses:
    """The generated records of one source, checked in full when this is made; 4 bytes a record are held."""

    def __init__(self, source: str, key: str | None = None, K: int | None = None):
        """Raises InputError for a record without prompt or responses or with other than `K`, and for no record."""
        self.source, self.key = source, key
        self.counts = array("I")
        for where, record in read_records(source):
            prompt_of(record, where, key)
            count = len(responses_of(record, where))
            if K is not None and count != K:
                raise InputError(f"{where}: {count} `responses`, but --K {K}; leave --K out to take what the file has")
            self.counts.append(count)
        if not self.counts:
            raise InputError(f"{source}: holds no records")

    def require_two(self) -> None:
        """Raise InputError if a record has a single response, which nothing can be compared with."""
        for count, (where, _) in zip(self.counts, self, strict=True):
            if count < 2:
                raise InputError(f"{where}: a pairwise scorer needs at least 2 `responses`, got 1")

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        """Yield ("file:line", record with `id`) in the order of the source."""
        return with_ids(read_records(self.source), self.key)


class Scores:
    """The scores of all responses under each of several scorers, those of earlier runs included.

    Every process makes one before any of them keeps a score, so that all see the same work as done; see `devices.barrier`.
    Holds 12 bytes for each response and scorer.
    """

    def __init__(self, output: Path, responses: Responses, scorers: list[str]):
        self.responses, self.scorers, self.output = responses, scorers, output
        self.total = sum(responses.counts)
        self.first = array("Q", [0])  # where each record's responses begin among all responses
        for count in responses.counts:
            self.first.append(self.first[-1] + count)
        self.partial = PartialRecords(output, self.total * len(scorers))
        self.shown: set[str | None] = set()  # the notes whose detail the log has

    def places(self, scorer: str, position: int) -> range:
        """Where the scores of a record's responses under `scorer` stand among all scores."""
        first = self.scorers.index(scorer) * self.total + self.first[position]
        return range(first, first + self.responses.counts[position])

    def missing(self, scorer: str) -> int:
        """How many responses `scorer` had not scored when this was made."""
        base = self.scorers.index(scorer) * self.total
        return sum(place not in self.partial for place in range(base, base + self.total))

    def has_any(self, scorer: str) -> bool:
        """Whether a response has a score by `scorer` on disk by now, kept by whichever process."""
        places = range(self.scorers.index(scorer) * self.total, (self.scorers.index(scorer) + 1) * self.total)
        now = PartialRecords(self.output, self.partial.count)
        return any(place in places and kept["score"] is not None for place, kept in now.records())

    def unscored(self, scorer: str) -> list[str]:
        """The ids of the records of which a response had neither a score by `scorer` nor a reason when this was made."""
        positions = {
            position
            for position in range(len(self.responses.counts))
            if any(place not in self.partial for place in self.places(scorer, position))
        }
        return [record["id"] for position, (_, record) in enumerate(self.responses) if position in positions]

    def tasks(self, scorer: str) -> Iterator[Task]:
        """Yield this process's share of the records that `scorer` has not finished.

        Each is assigned to the share with the least text so far, so shares are fair however many processes there are now.
        """
        share, shares = data_parallel()
        assigned = [0] * shares  # characters
        for position, (where, record) in enumerate(self.responses):
            places = self.places(scorer, position)
            missing = [index for index, place in enumerate(places) if place not in self.partial]
            if not missing:
                continue
            prompt = prompt_of(record, where, self.responses.key)
            smallest = assigned.index(min(assigned))
            before = sum(len(message["content"]) for message in prompt)
            assigned[smallest] += sum(before + len(record["responses"][index]) for index in missing)
            if smallest == share:
                yield Task(position, where, record, prompt, record["responses"], missing)

    def keep(self, scorer: str, score: Score) -> None:
        """Put one score on disk."""
        note = {} if score.note is None else {"note": score.note}
        self.partial.append(self.places(scorer, score.task.position)[score.index], {"score": score.value} | note)

    def all(self) -> Iterator[Annotated]:
        """Yield every record with its scores, in input order, once all of them are on disk."""
        self.partial.close()
        values, notes, failures = self._read()
        for position, (where, record) in enumerate(self.responses):
            places = {name: self.places(name, position) for name in self.scorers}
            yield Annotated(
                where,
                record,
                {name: [values[place] for place in span] for name, span in places.items()},
                [notes[place] for span in places.values() for place in span if place in notes],
                [failures[place] for span in places.values() for place in span if place in failures],
            )

    def _read(self) -> tuple[array, dict[int, str], dict[int, str]]:
        """From disk: the score at every place; what is noted of some; why there is none, where there is none."""
        values = array("d", [math.nan]) * (self.total * len(self.scorers))
        notes: dict[int, str] = {}
        failures: dict[int, str] = {}
        for place, kept in PartialRecords(self.output, len(values)).records():
            if kept["score"] is None:
                failures[place] = kept["note"]
                continue
            values[place] = kept["score"]
            if "note" in kept:
                notes[place] = kept["note"]
        return values, notes, failures


def check_output(output: Path) -> None:
    """Raise InputError if `output` is a folder."""
    if output.is_dir():
        raise InputError(
            f"--output_dir {output}: is a folder; give the name of the output file, {output}/rewards.jsonl for one"
        )


def write_records(output: Path, records: Iterator[Record]) -> int:
    """Write the finished output atomically; returns the number of records. A full disk leaves no part of it."""
    unfinished = output.with_name(output.name + ".sorting")
    count = 0
    try:
        with unfinished.open("wb", buffering=1 << 20) as file:
            for record in records:
                file.write(dump(record))
                count += 1
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(output)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(output)) from None
    return count
