"""Rows of token ids, of which some are learnt: what is held of all, and packed trees in which the learnt tokens are scored."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from torch import Tensor

from baton.models.router import count_sequences
from baton.models.trees import Row, Tokens, pack


class Cut(NamedTuple):
    """A row of token ids cut at its first learnt token, and the places of the learnt tokens in the response, int64 (n,)."""

    prompt: Tokens
    response: Tokens
    learnt: Tensor


def cut(input_ids: Tokens, labels: Tokens) -> Cut:
    """A row of token ids, of which some are learnt, and not the first."""
    places = torch.tensor([place for place, label in enumerate(labels) if label != -100])
    start = int(places[0])
    return Cut(input_ids[:start], input_ids[start:], places - start)


def learnt_rows(
    sequences: Sequence[Cut], tokens_per_row: int | None, balanced: bool = False
) -> Iterator[tuple[Row, list[int]]]:
    """Yield packed rows and which sequences each holds: its scored tokens are their learnt ones, one after another.

    Args:
        tokens_per_row: as for `trees.pack`.
        balanced: whether forward passes keep what the router's loss needs (`router.py`).
    """
    rows, places = pack([(sequence.prompt, sequence.response) for sequence in sequences], tokens_per_row, whole=balanced)
    if balanced:
        count_sequences(rows, places)
    members: list[list[int]] = [[] for _ in rows]
    for number, place in enumerate(places):
        members[place.row].append(number)
    for row, inside in zip(rows, members, strict=True):
        index = torch.cat([places[number].start + sequences[number].learnt for number in inside])  # (N,)
        yield replace(row, predictors=row.predictors[index], targets=row.targets[index]), inside


class Outline(NamedTuple):
    """What is held of all rows: tokens before the first learnt one, those from it on, and learnt ones, int64 (rows,) each."""

    prompts: np.ndarray
    responses: np.ndarray
    learnt: np.ndarray


def outline(rows: Any) -> Outline:
    """The outline of a Dataset of `input_ids` and `labels`."""
    parts = []
    for lengths, _, labels in flat_batches(rows, 1_000):
        starts = np.cumsum(lengths) - lengths
        learnt = labels != -100
        places = np.flatnonzero(learnt)
        first = places[np.searchsorted(places, starts)] - starts
        parts.append((first, lengths - first, np.add.reduceat(learnt.astype(np.int64), starts)))
    return Outline(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def flat_batches(rows: Any, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the lengths, and one after another the token ids and the labels, of `size` rows at a time, int64 each."""
    for batch in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=size):
        ids, labels = (_flat(batch.column(name)) for name in ("input_ids", "labels"))
        lengths = batch.column("input_ids").combine_chunks().value_lengths().to_numpy().astype(np.int64)
        yield lengths, ids, labels


def _flat(column: pyarrow.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy()


def collate(rows: Sequence[dict[str, Any]], balanced: bool = False) -> dict[str, Any]:
    """Rows of token ids as one packed row.

    `input_ids`, `attention_mask`, `labels` are int64 (B, L), padded on the right; `row` is the packed row, whose N scored
    tokens are the learnt ones of one row of token ids after another; `members` are the numbers of those, in that order.
    `balanced` is as in `learnt_rows`.
    """
    ((packed, members),) = learnt_rows([cut(row["input_ids"], row["labels"]) for row in rows], None, balanced)
    return {
        **padded([row["input_ids"] for row in rows]),
        "labels": right_padded([row["labels"] for row in rows], -100),
        "row": packed,
        "members": members,
    }


def padded(sequences: Sequence[Tokens], pad: int = 0) -> dict[str, Tensor]:
    """Token ids as `input_ids` and `attention_mask`, int64 (B, L) each, padded on the right."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": right_padded(sequences, pad), "attention_mask": mask}


def right_padded(sequences: Sequence[Tokens], value: int) -> Tensor:
    """Sequences of numbers as one tensor, int64 (B, L), filled up with `value`."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
