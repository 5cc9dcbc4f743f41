"""Attention over packed trees: a prompt sees itself, a response sees its prompt and itself.

Registered with transformers as the attention implementation `shared_prefix`; every model that goes through
transformers' attention interface passes its keyword arguments on to it, the row's `Layout` among them. On a
GPU it is FlexAttention with a block mask; elsewhere it goes tree by tree and block by block, which computes
hardly a pair of tokens that do not see each other.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from baton.models.blockwise import causal_attention, for_each_head
from baton.models.trees import Layout

NAME = "shared_prefix"


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention of one row of trees.

    Args:
        query: (1, heads, T, D); key, value: (1, key heads, T, D). T may exceed the layout's length: what
            follows it is padding, whose output is meaningless.
        layout: where the trees lie. `attention_mask` is ignored, it says nothing of trees.
        sliding_window: a token sees the `sliding_window` positions up to its own (Gemma, Mistral).
        softcap: `softcap * tanh(score / softcap)` on the scores (Gemma 2).
    Returns:
        (1, T, heads, D) and None, as transformers expects.
    Raises:
        ValueError: called without a layout, that is by another forward pass than `forward.py`'s.
    """
    if layout is None:
        raise ValueError(f"the {NAME!r} attention needs the layout of a packed row; use model.forward(fused_lm_head=True)")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda:
        output = _flex(query, key, value, layout, scaling, sliding_window, softcap)
    else:
        output = _tree_by_tree(query, key, value, layout, scaling, dropout, sliding_window, softcap)
    return output.transpose(1, 2), None


def _tree_by_tree(query, key, value, layout, scaling, dropout, window, softcap) -> Tensor:
    key, value = for_each_head(key, value, query.shape[1] // key.shape[1])
    attend = functools.partial(_attend, scaling=scaling, dropout=dropout, window=window, softcap=softcap)
    lengths = [length for prompt, responses in layout.trees for length in (prompt, *responses)]
    lengths.append(query.shape[2] - layout.length)
    queries, keys, values = (iter(states.split(lengths, dim=2)) for states in (query, key, value))
    outputs = []
    for _, responses in layout.trees:
        prompt_key, prompt_value = next(keys), next(values)
        outputs.append(attend(next(queries), prompt_key, prompt_value))
        for length in responses:
            own_query, own_key, own_value = next(queries), next(keys), next(values)
            if length:
                own_key = torch.cat([prompt_key, own_key], dim=2)
                own_value = torch.cat([prompt_value, own_value], dim=2)
                outputs.append(attend(own_query, own_key, own_value))
    outputs.append(next(queries))
    return torch.cat(outputs, dim=2)


def _attend(query, key, value, *, scaling, dropout, window, softcap) -> Tensor:
    """Causal attention of the last Q positions to all K; query (1, heads, Q, D), key, value (1, heads, K, D)."""
    # Under autocast the rotary embedding leaves queries and keys in float32, while values are in the lower precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if softcap is None and not dropout:
        return causal_attention(query, key, value, scaling, window)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(_unseen(query.shape[2], key.shape[2], window, query.device), -math.inf)
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32), dropout).to(query.dtype)
    return weights @ value


def _unseen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """What each of the last `queries` positions must not see, bool (queries, keys): later keys, those out of its window."""
    positions = torch.arange(keys, device=device)
    distance = positions[keys - queries :, None] - positions
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def _flex(query, key, value, layout, scaling, window, softcap) -> Tensor:
    length = query.shape[2]
    if (window, length) not in layout.masks:
        layout.masks[window, length] = block_mask(layout, length, window, query.device)
    groups = query.shape[1] // key.shape[1]
    if groups.bit_count() > 1:  # FlexAttention shares keys among a power of two of query heads only
        key, value = for_each_head(key, value, groups)
    score_mod = None if softcap is None else _softcap(softcap)
    return _compiled_flex()(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=layout.masks[window, length],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _softcap(softcap: float):
    return lambda score, batch, head, q, k: softcap * torch.tanh(score / softcap)


def block_mask(layout: Layout, length: int, window: int | None, device: torch.device) -> BlockMask:
    """FlexAttention's mask of a row of `length` tokens: same tree, earlier, and prompt or same response."""
    tree, branch, position = (torch.full((length,), -1, dtype=torch.int32) for _ in range(3))
    start = 0
    for index, (prompt, responses) in enumerate(layout.trees):
        for number, size in enumerate((prompt, *responses)):
            offset = prompt if number else 0
            tree[start : start + size] = index
            branch[start : start + size] = number
            position[start : start + size] = torch.arange(offset, offset + size)
            start += size
    tree, branch, position = tree.to(device), branch.to(device), position.to(device)

    def sees(batch, head, q, k):
        seen = (tree[q] == tree[k]) & (q >= k) & ((branch[k] == 0) | (branch[q] == branch[k]))
        return seen if window is None else seen & (position[q] - position[k] < window)

    return create_block_mask(sees, B=None, H=None, Q_LEN=length, KV_LEN=length, device=device)


AttentionInterface.register(NAME, shared_prefix_attention)
