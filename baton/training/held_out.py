"""Which prompts of training data are held out: all that there is of a prompt is on one side. Nothing heavy is imported."""

from array import array
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from baton.errors import InputError
from baton.jsonl import Record
from baton.records import prompt_hash, prompt_of

NONE: frozenset[int] = frozenset()


def held_out_prompts(records: Iterable[tuple[str, Record]], every: int, source: str, least: int = 1) -> frozenset[int]:
    """The hashes of the prompts of ("where", record) that are held out: see `held_out_of`."""
    return held_out_of(prompt_hashes(records), every, source, least)


def prompt_hashes(records: Iterable[tuple[str, Record]]) -> np.ndarray:
    """The hash of the prompt of each ("where", record), uint64 (records,)."""
    return np.array(array("Q", (_hash(where, record) for where, record in records)), dtype=np.uint64)


def held_out_of(hashes: np.ndarray, every: int, source: str, least: int = 1) -> frozenset[int]:
    """Those of the different `hashes`, as they first come, that are held out: the last of every `every`.

    Where these are fewer than `least`, it is the last of fewer prompts. Raises InputError where `source` has fewer than twice
    `least` prompts, since as many are to be trained on.
    """
    first = np.sort(np.unique(hashes, return_index=True)[1])  # where each prompt first comes
    if len(first) < 2 * least:
        raise InputError(
            f"`eval_every`: {source} has {len(first)} different prompts, and {2 * least} or more are needed to hold {least} out"
        )
    every = min(every, len(first) // least)
    return frozenset(hashes[first[every - 1 :: every]].tolist())


def without(records: Iterable[tuple[str, Record]], prompts: Collection[int]) -> Iterator[tuple[str, Record]]:
    """Yield the records whose prompt is none of `prompts`, hashes; all as they are where there are no such prompts."""
    return (each for each in records if not prompts or _hash(*each) not in prompts)


def of_prompts(records: Iterable[tuple[str, Record]], prompts: Collection[int]) -> Iterator[tuple[str, Record]]:
    """Yield the records whose prompt is one of `prompts`, hashes."""
    return (each for each in records if _hash(*each) in prompts)


def _hash(where: str, record: Record) -> int:
    return prompt_hash(prompt_of(record, where))
