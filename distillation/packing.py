"""Rows of token ids as packed trees in which the learnt tokens alone are scored."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

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


def learnt_rows(sequences: Sequence[Cut], tokens_per_row: int | None) -> Iterator[tuple[Row, list[int]]]:
    """Yield packed rows and which sequences each holds: its scored tokens are their learnt ones, one after another.

    Args:
        tokens_per_row: as for `trees.pack`.
    """
    rows, places = pack([(sequence.prompt, sequence.response) for sequence in sequences], tokens_per_row)
    members: list[list[int]] = [[] for _ in rows]
    for number, place in enumerate(places):
        members[place.row].append(number)
    for row, inside in zip(rows, members, strict=True):
        index = torch.cat([places[number].start + sequences[number].learnt for number in inside])  # (N,)
        yield replace(row, predictors=row.predictors[index], targets=row.targets[index]), inside
