"""One pass over the data: every record converted, or counted with the reason why not. Holds one record at a time."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol

from baton.data.arguments import DataArguments, keys_of, probs_of
from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import given, usual_keys
from baton.program import harmless
from baton.prompts import mixed_records, read_records, split_sources
from baton.scored import with_rows_merged
from baton.shapes import Kind, Shape, baton_records, shape_of

log = logging.getLogger("baton")

LOOKED_AT = 100  # records, to see which shape a file has
REASONS = 50  # different ones that are counted apart
REASON_CHARACTERS = 120
NAMED = 5  # records that are named for each reason
OTHER = "refused: other reasons"


class Counts(Protocol):
    """What gets a reason and a record's name for each record that is left out: `Drops`, or a `Tally`."""

    def add(self, reason: str, name: str) -> None: ...


class Tally:
    """Reasons and how often each occurred, the first few by name; nothing is logged."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name)


class Source:
    """The data of some arguments, to be read as one kind. It can be read several times; `rows` counts those of the last."""

    def __init__(self, arguments: DataArguments):
        """See what the data is. Raises InputError where that cannot be told."""
        self.arguments = arguments
        probs_of(arguments)
        self.shape = self._shape()
        self.kind: Kind = arguments.kind or self.shape.kind
        self.rows = 0

    def read(self, left_out: Counts) -> Iterator[tuple[str, list[Record]]]:
        """Yield ("where", Baton's records) of each record that is understood; `left_out` gets the others and the reasons."""
        self.rows, reasons = 0, set()

        def refuse(where: str, error: InputError) -> None:
            reason = reason_of(error, where)
            if reason not in reasons and len(reasons) >= REASONS:
                reason = OTHER
            reasons.add(reason)
            left_out.add(reason, where)

        def unreadable(where: str, error: InputError) -> None:
            self.rows += 1
            refuse(where, error)

        arguments, renamed = self.arguments, given(keys_of(self.arguments, self.kind))
        name, split, probs, most = (
            arguments.dataset_name_or_path, arguments.dataset_split, probs_of(arguments), arguments.max_samples
        )  # fmt: skip

        def rows() -> Iterator[tuple[str, Record]]:
            for where, record in mixed_records(name, split, probs, max_samples=most, refused=unreadable):
                self.rows += 1
                try:
                    yield where, usual_keys(record, where, renamed)
                except InputError as error:
                    refuse(where, error)

        score, most_pairs = arguments.score_key, arguments.max_pairs_per_prompt
        merges = self.kind in ("preferences", "labelled")
        for where, record in with_rows_merged(rows(), score) if merges else rows():
            try:
                yield where, baton_records(record, where, self.kind, left_out, most_pairs, score)
            except InputError as error:
                refuse(where, error)

    def _shape(self) -> Shape:
        arguments = self.arguments
        renamed, found = given(keys_of(arguments, arguments.kind)), False
        unreadable: list[InputError] = []  # the first line that is no JSON object

        def note(where: str, error: InputError) -> None:
            unreadable[:] = unreadable or [error]

        for name in split_sources(arguments.dataset_name_or_path):
            records = read_records(name, arguments.dataset_split, note)
            for _, record in islice(records, LOOKED_AT):
                found = True
                named = [(usual, key) for usual, key in renamed.items() if key in record]
                others = {name: value for name, value in record.items() if name not in renamed.values()}
                if shape := shape_of(others | {usual: record[key] for usual, key in named}, arguments.score_key):
                    return shape
        if not found:
            raise unreadable[0] if unreadable else InputError(f"{arguments.dataset_name_or_path}: holds no records")
        if arguments.kind:
            return Shape("a shape of its own", arguments.kind)
        raise InputError(
            f"{arguments.dataset_name_or_path}: none of its first {LOOKED_AT} records has a known shape (docs/data.md); "
            "name its keys with --dataset_key, --output_key, --chosen_key, …, and say with --as what it holds"
        )


def reason_of(error: InputError, where: str) -> str:
    """Why a record was refused, without its place and its values, so that equal reasons can be counted."""
    text = str(error).removeprefix(f"{where}: ").split(", got ")[0].split("; got ")[0]
    text = harmless(text)
    return f"refused: {text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 1] + '…'}"


def refused(counts: Counter[str]) -> int:
    """How many records were refused, of what `Source.read` counted."""
    return sum(count for reason, count in counts.items() if reason.startswith("refused: "))


def in_lines(tally: Tally) -> Iterable[str]:
    """What was left out, a line a reason, the most frequent first."""
    for reason, count in tally.counts.most_common():
        yield f"{count:10,} {reason} ({', '.join(map(harmless, tally.names[reason]))}{', …' if count > NAMED else ''})"
