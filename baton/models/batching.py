"""Batches of token sequences: of nearly equal length, up to a number of tokens.

Padding stands on the right. A causal model's states before it do not depend on it, so no mask is needed, attention keeps
its fastest kernel, and a sequence's result does not depend on what it is batched with.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

WINDOW = 4096  # sequences that are sorted by length together; what is read ahead, and held in memory


def windows(items: Iterable[T], size: int = WINDOW) -> Iterator[list[T]]:
    """Cut a stream into lists of `size` items, the last one shorter."""
    items = iter(items)
    while window := list(islice(items, size)):
        yield window


def batches(lengths: Sequence[int], tokens: int, least_filled: float) -> Iterator[list[int]]:
    """Yield the indices of each batch, longest sequences first.

    A batch holds at most `tokens` tokens, padding included (or one longer sequence), and no sequence shorter than
    `least_filled` of its longest.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else lengths[index]
        if batch and ((len(batch) + 1) * longest > tokens or lengths[index] < least_filled * longest):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), padded on the right, and lengths (B,), both int64 on `device`."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.full((len(sequences), int(lengths.max())), pad_token_id)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids.to(device), lengths.to(device)
