"""A batch divided by what its members cost: among processes, so that they end together, and into the rows of each.

A member is a prompt with its responses, one tree of a packed row: a pair, a demonstration, a prompt with all its samples. The
functions are plain arithmetic on numbers and know no trainer.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from accelerate.utils import is_peft_model
from torch import nn

from baton.training.metrics import weights_of

CLOSE_ENOUGH = 1.001  # longest over the least possible, where the search for a better division ends


class ModelSize(NamedTuple):
    """What a model computes for a token: weights that multiply, and the width of all its layers' attention together."""

    body: int
    head: int
    attention: int


def model_size(model: nn.Module) -> ModelSize:
    """The size of a causal language model, or of one with an adapter."""
    model = model.get_base_model() if is_peft_model(model) else model
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)  # none where layers are no attention
    width = heads and (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return ModelSize(*weights_of(model), config.num_hidden_layers * heads * width)


def tree_tokens(prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """Tokens of a row that trees take, int64 (N,): a response's last token is never an input.

    Args:
        prompts: lengths, int64 (N,).
        responses: lengths of each tree's responses, int64 (N, K).
    """
    return prompts + np.maximum(responses - 1, 0).sum(axis=1)


def tree_costs(prompts: np.ndarray, responses: np.ndarray, size: ModelSize) -> np.ndarray:
    """What a pass over trees costs, int64 (N,), in thousandths of a token's matrix products in the layers.

    By floating-point operations: a forward pass takes 2 for each weight and token, the head's on response tokens alone, and 4
    times attention's width for each token that a token sees, itself and those before it (scores, and the mean of values).
    Whole numbers, so that all processes deal alike on whatever machine. Arguments as in `tree_tokens`.
    """
    inputs = np.maximum(responses - 1, 0)
    seen = prompts * (prompts + 1) // 2 + (inputs * prompts[:, None] + inputs * (inputs + 1) // 2).sum(axis=1)
    of_head, of_attention = size.head / size.body * responses.sum(axis=1), 2 * size.attention / size.body * seen
    return np.rint(1000 * (tree_tokens(prompts, responses) + of_head + of_attention)).astype(np.int64)


def deal(costs: Sequence[int], shares: int) -> list[list[int]]:
    """The members of each share, indices in ascending order, so that the costliest share costs little more than it must.

    The costliest member first, each to the share that costs least so far; then the costliest share gives a member away, or
    swaps one, as long as that helps. Deterministic; fewer members than shares leave some empty.
    """
    loads = [(0, share) for share in range(shares)]
    owner = np.zeros(len(costs), dtype=np.int64)
    for member in sorted(range(len(costs)), key=lambda member: -costs[member]):
        load, share = loads[0]
        owner[member] = share
        heapq.heapreplace(loads, (load + costs[member], share))
    if shares > 1 and len(costs) > shares:
        _even_out(np.array(costs), owner, shares)
    return [np.flatnonzero(owner == share).tolist() for share in range(shares)]


def _even_out(costs: np.ndarray, owner: np.ndarray, shares: int) -> None:
    """Make the costliest share cheaper by moves and swaps, in `owner`, until none helps."""
    load = np.zeros(shares, dtype=np.int64)
    np.add.at(load, owner, costs)
    enough = CLOSE_ENOUGH * max(int(costs.max()), int(costs.sum()) / shares)
    # A move is a swap with one of the members that cost nothing, one for each share.
    costs_too = np.append(costs, np.zeros(shares, dtype=np.int64))
    owner_too = np.append(owner, np.arange(shares))
    while load.max() > enough:
        costliest = int(load.argmax())
        own = np.flatnonzero(owner == costliest)
        given = costs[own, None] - costs_too  # (own, all): what a swap takes from the costliest share
        after = np.maximum(load[costliest] - given, load[owner_too] + given)
        after[:, owner_too == costliest] = load[costliest]
        mine, other = np.unravel_index(after.argmin(), after.shape)
        if after[mine, other] >= load[costliest]:
            return
        member, share = own[mine], owner_too[other]
        load[[costliest, share]] += np.array([-1, 1]) * given[mine, other]
        owner[member] = owner_too[member] = share
        if other < len(costs):
            owner[other] = owner_too[other] = costliest


def rows_of_shares(shares: Sequence[Sequence[int]], tokens: Sequence[int], most: int | None) -> list[list[list[int]]]:
    """The members of each share in rows, as many rows in every share; where a share has too few members, its last are empty.

    Args:
        shares: those of `deal`.
        tokens: of each member.
        most: tokens of a row, but for a member that alone is longer; None: each share is one row.
    Returns:
        for each share its rows, the longest first, of about equally many tokens: what processes compute at a time is alike.
    """
    count = 1 if most is None else max(1, *(-(-sum(min(tokens[i], most) for i in share) // most) for share in shares))
    while True:
        divided = [_rows(share, tokens, count) for share in shares]
        rows = [row for rows in divided for row in rows]
        if most is None or all(len(row) < 2 or sum(tokens[i] for i in row) <= most for row in rows):
            return divided
        count += 1


def _rows(share: Sequence[int], tokens: Sequence[int], count: int) -> list[list[int]]:
    """So many rows of a share's members, the longest first."""
    rows = [[share[place] for place in row] for row in deal([tokens[i] for i in share], count)]
    return sorted(rows, key=lambda row: -sum(tokens[i] for i in row))
