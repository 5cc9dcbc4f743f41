"""Conversations as trees of packed rows: a prompt once, then all that follows it, each read at some of its tokens."""

from typing import Any

import numpy as np
import pyarrow
import torch

from baton.models.router import count_sequences
from baton.models.sequences import without_padding
from baton.models.trees import cut_after, pack, with_prompts
from baton.training.learnt import padded

SIDES = ("chosen_ids", "rejected_ids")


class Collator:
    """Makes rows of `chosen_ids` and `rejected_ids`, perhaps with `margin`, one packed row.

    `row` is the packed row, and `ends`, int64 (B, 2), where the rewards of chosen and rejected are read in it; `margin` is
    float32 (B,). `input_ids` and `attention_mask`, int64 (2 B, L), are as in TRL: all that are chosen, then all rejected.
    `balanced`: whether forward passes keep what the router's loss needs.
    """

    def __init__(self, pad: int, balanced: bool = False):
        self.pad, self.balanced = pad, balanced

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        # Transformers reads a reward at the last token that is not the padding token.
        pairs = [[without_padding(row[side], self.pad) for side in SIDES] for row in rows]
        (packed,), places = pack([part for pair in pairs for part in with_prompts(pair)], None, whole=True)
        if self.balanced:
            count_sequences([packed], places)
        batch = padded([row[side] for side in SIDES for row in rows], self.pad)
        if "margin" in rows[0]:
            batch["margin"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        return {**batch, "row": packed, "ends": torch.tensor([place.last for place in places]).view(-1, 2)}


def collate_scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Make rows of `score_rows.row_of` one packed row.

    `row` is the packed row, and `ends`, int64 (N, 1), where it is read: at the places of one conversation after another.
    `targets` are what should be read there, float32 (N, outputs), and `reads`, int64 (N, 2), the same places as numbers of a
    conversation and of its token. `input_ids` and `attention_mask`, int64 (S, L), are the conversations.
    """
    sequences = [ids for row in rows for ids in row["sequences"]]
    (packed,), found = pack([part for row in rows for part in cut_after(row["sequences"], row["shared"])], None, whole=True)
    every = (of_one for row in rows for of_one in row["places"])
    reads = [(number, place) for number, of_one in enumerate(every) for place in of_one]
    ends = [found[number].last - len(sequences[number]) + 1 + place for number, place in reads]
    targets = torch.tensor([value for row in rows for value in row["targets"]], dtype=torch.float32).view(len(reads), -1)
    batch = {"row": packed, "ends": torch.tensor(ends)[:, None], "reads": torch.tensor(reads), "targets": targets}
    return {**padded(sequences), **batch}


def lengths_of_scores(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """As `lengths_of`, of rows of `score_rows.row_of`: int64 (N,) and (N, K), 0 where a row has fewer than K conversations."""
    prompts, lengths = np.array(rows["shared"][:], dtype=np.int64), rows["lengths"][:]
    responses = np.zeros((len(lengths), max(map(len, lengths))), dtype=np.int64)
    for number, of_row in enumerate(lengths):
        responses[number, : len(of_row)] = of_row
    return prompts, np.maximum(responses - prompts[:, None], 0)


def lengths_of(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair of a Dataset the tokens that chosen and rejected share, int64 (N,), and those after them, int64 (N, 2)."""
    shared, lengths = [], []
    for batch in rows.select_columns(list(SIDES)).with_format("arrow").iter(batch_size=10_000):
        sides = [_sequences(batch.column(side)) for side in SIDES]
        for chosen, rejected in zip(*sides, strict=True):
            most = min(len(chosen), len(rejected))
            differ = np.flatnonzero(chosen[:most] != rejected[:most])
            shared.append(differ[0] if len(differ) else most)
            lengths.append((len(chosen), len(rejected)))
    prompts = np.array(shared, dtype=np.int64)
    return prompts, np.array(lengths, dtype=np.int64) - prompts[:, None]


def _sequences(column: pyarrow.ChunkedArray) -> list[np.ndarray]:
    whole = column.combine_chunks()
    return np.split(whole.flatten().to_numpy(), np.cumsum(whole.value_lengths().to_numpy())[:-1])
