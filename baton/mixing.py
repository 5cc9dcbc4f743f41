"""Which prompts a run takes: mixed from several sources, at most so many, and a window of them for each round."""

from dataclasses import dataclass

import numpy as np

from baton.errors import InputError


@dataclass(frozen=True)
class Selection:
    """How to choose prompts; the default takes all of them, source after source.

    `probs`: one weight for each source: prompts are drawn from the sources at these rates until one is used up.
    `max_samples`: of the mixture, no more than this. `batch_size`: of what is left, shuffled once, round
    `iteration` takes the prompts iteration * batch_size … (iteration + 1) * batch_size; past the end it goes on
    from the start in a new order.
    """

    probs: tuple[float, ...] | None = None
    max_samples: int | None = None
    iteration: int = 0
    batch_size: int | None = None
    seed: int = 42


def parse_probs(text: str | None, sources: int) -> tuple[float, ...] | None:
    """The weights in `--dataset_probs 0.5,0.5`. Raises InputError unless they are one for each source, sum 1."""
    if text is None:
        return None
    try:
        probs = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise InputError(f"--dataset_probs {text}: numbers with commas between, such as 0.5,0.5") from None
    if len(probs) != sources:
        raise InputError(f"--dataset_probs {text}: {len(probs)} numbers for {sources} datasets")
    if min(probs) <= 0 or abs(sum(probs) - 1) > 1e-6:
        raise InputError(f"--dataset_probs {text}: must be above 0 and sum to 1")
    return probs


def select_rows(lengths: list[int], selection: Selection) -> np.ndarray:
    """The rows to take of sources with `lengths` records, counted on from source to source.

    Returns int64, shape (prompts,), ascending, so that sources can be streamed; a window that wraps around may
    hold a row twice.
    """
    starts = np.cumsum([0, *lengths[:-1]])
    counts = _drawn_counts(lengths, selection)
    rows = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])
    if selection.batch_size is None or len(rows) == 0:
        return rows
    first = selection.iteration * selection.batch_size
    window = np.arange(first, first + selection.batch_size)
    taken = []
    for epoch in range(window[0] // len(rows), window[-1] // len(rows) + 1):
        order = np.random.default_rng((selection.seed, epoch)).permutation(rows)
        taken.append(order[window[window // len(rows) == epoch] % len(rows)])
    return np.sort(np.concatenate(taken))


def _drawn_counts(lengths: list[int], selection: Selection) -> list[int]:
    """How many of its first records each source gives to the mixture."""
    total = sum(lengths) if selection.max_samples is None else min(sum(lengths), selection.max_samples)
    if selection.probs is None:
        before = np.cumsum([0, *lengths[:-1]])
        return [int(np.clip(total - start, 0, length)) for start, length in zip(before, lengths, strict=True)]
    generator = np.random.default_rng(selection.seed)
    draws = generator.choice(len(lengths), size=total, p=np.array(selection.probs) / sum(selection.probs))
    for source, length in enumerate(lengths):
        # The draw that would take one more than the source holds ends the mixture.
        too_many = np.flatnonzero(draws == source)[length:]
        if len(too_many):
            draws = draws[: too_many[0]]
    return [int(count) for count in np.bincount(draws, minlength=len(lengths))]
