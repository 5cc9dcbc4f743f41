"""What a pass over the data remembers of each record, in a few bytes: two hashes and its lengths in characters."""

from array import array

import numpy as np
import xxhash

from baton.jsonl import Record, dump
from baton.records import Messages, prompt_hash
from baton.shapes import COLUMNS, Kind, parts_of


class Survey:
    """Of each record 8 bytes for all that it says, 8 for its prompt, and 4 for the length of each part."""

    def __init__(self, kind: Kind):
        self.kind = kind
        self.contents, self.prompts = array("Q"), array("Q")
        self.lengths = {name: array("I") for name in COLUMNS[kind]}
        self.columns = tuple(self.lengths.values())
        self.empty = 0

    def __len__(self) -> int:
        return len(self.contents)

    def add(self, record: Record) -> None:
        """Remember one of Baton's records."""
        prompt, responses = parts_of(record, self.kind)
        content, opening = hashes_of(prompt, responses, record.get("label") if self.kind == "labelled" else None)
        self.contents.append(content)
        self.prompts.append(opening)
        for column, length in zip(self.columns, characters(prompt, responses), strict=True):
            column.append(length)
        for response in responses:
            self.empty += not response or response.isspace()

    def repeated(self) -> tuple[int, int]:
        """How many records say the same as an earlier one, and how many have its prompt. The order of `self` is lost."""
        return _repeated(self.contents), _repeated(self.prompts)

    def statistics(self) -> dict[str, tuple[float, int, int, int]]:
        """Mean, median, 95th percentile and maximum of each part's length. The order of `self` is lost."""
        return {name: statistics(column) for name, column in self.lengths.items() if len(column)}


def hashes_of(prompt: Messages, responses: tuple[str, ...], label: bool | None) -> tuple[int, int]:
    """64-bit hashes of all that a record says, and of its prompt; where it has none the former is both."""
    opening = prompt_hash(prompt)
    content = xxhash.xxh3_64_intdigest(dump([opening, *responses, label]))
    return content, opening if prompt else content


def characters(prompt: Messages, responses: tuple[str, ...]) -> list[int]:
    """The lengths of the prompt, all its messages together, and of each response."""
    total = 0
    for message in prompt:
        total += len(message["content"])
    return [total, *map(len, responses)]


def statistics(column: array) -> tuple[float, int, int, int]:
    """Mean, median, 95th percentile and maximum of an array of integers, which is sorted in place."""
    values = np.frombuffer(column, dtype=np.uint32)
    values.sort()
    count = len(values)
    return float(values.mean(dtype=np.float64)), int(values[count // 2]), int(values[int(0.95 * (count - 1))]), int(values[-1])


def _repeated(hashes: array) -> int:
    if not hashes:
        return 0
    values = np.frombuffer(hashes, dtype=np.uint64)
    values.sort()
    return int(np.count_nonzero(values[1:] == values[:-1]))
