"""Which prompts of training data are held out: all that there is of a prompt is on one side. Nothing heavy is imported."""

from array import array
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from baton.errors import InputError
from baton.jsonl import Record
from baton.records import prompt_hash, prompt_of

NONE: frozenset[int] = frozenset()


def held_out_prompts(records: Iterable[tuple[str, Record]], every: int, source: str) -> frozenset[int]:
    """The hashes of the prompts that are held out: of the different ones, as they first come, the last of every `every`.

    Where there are fewer, it is the last one. It holds 8 bytes a record ("where", record). Raises InputError where `source`
    has fewer than two prompts, since one is to be trained on.
    """
    hashes = np.array(array("Q", (_hash(where, record) for where, record in records)), dtype=np.uint64)
    first = np.sort(np.unique(hashes, return_index=True)[1])  # where each prompt first comes
    if len(first) < 2:
        raise InputError(f"`eval_every`: {source} has {len(first)} prompt, and 2 or more are needed to hold one out")
    every = min(every, len(first))
    return frozenset(hashes[first[every - 1 :: every]].tolist())


def without(records: Iterable[tuple[str, Record]], prompts: Collection[int]) -> Iterator[tuple[str, Record]]:
    """Yield the records whose prompt is none of `prompts`, hashes; all as they are where there are no such prompts."""
    return (each for each in records if not prompts or _hash(*each) not in prompts)


def of_prompts(records: Iterable[tuple[str, Record]], prompts: Collection[int]) -> Iterator[tuple[str, Record]]:
    """Yield the records whose prompt is one of `prompts`, hashes."""
    return (each for each in records if _hash(*each) in prompts)


def _hash(where: str, record: Record) -> int:
    return prompt_hash(prompt_of(record, where))
