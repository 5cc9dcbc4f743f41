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

from baton.models.trees import Layout

NAME = "shared_prefix"

# Queries of one block outside of a GPU: its weights fit the cache, its matrix products are still large ones.
QUERY_BLOCK = 128


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


def _for_each_head(key: Tensor, value: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for each of the `groups` query heads that share one."""
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _tree_by_tree(query, key, value, layout, scaling, dropout, window, softcap) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = _for_each_head(key, value, groups)
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
        return _BlockwiseCausal.apply(query[0], key[0], value[0], scaling, window)[None]
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = query.shape[2], key.shape[2]
    unseen = _unseen(slice(0, queries), slice(0, keys), keys - queries, window, query.device)
    scores = scores.masked_fill(unseen, -math.inf)
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32), dropout).to(query.dtype)
    return weights @ value


class _BlockwiseCausal(torch.autograd.Function):
    """Causal attention in blocks of queries, each against the keys it can see; the backward computes weights again.

    Matrix products and fused softmaxes only. On a CPU in bfloat16 it takes about 0.4 of the time of torch's own scaled
    dot product attention, and no more memory.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, window):
        """query (heads, Q, D), key and value (heads, K, D), the queries being the last Q positions."""
        query = query * scaling
        output = torch.empty_like(query)
        for rows, keys in _blocks(query.shape[1], key.shape[1], window):
            output[:, rows] = _weights(query, key, rows, keys, window) @ value[:, keys]
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.window = scaling, window
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(states, dtype=torch.float32) for states in (key, value))
        for rows, keys in _blocks(query.shape[1], key.shape[1], ctx.window):
            weights = _weights(query, key, rows, keys, ctx.window)
            grad = grad_output[:, rows]
            grad_value[:, keys] += weights.transpose(1, 2) @ grad
            grad_weights = grad @ value[:, keys].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_query[:, rows] = grad_scores @ key[:, keys]
            grad_key[:, keys] += grad_scores.transpose(1, 2) @ query[:, rows]
        return grad_query * ctx.scaling, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _blocks(queries: int, keys: int, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries, and for each the keys that some query of it can see."""
    before = keys - queries  # positions that precede the first query
    blocks = []
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        first = 0 if window is None else max(0, start + before - window + 1)
        blocks.append((slice(start, stop), slice(first, stop + before)))
    return blocks


def _weights(query: Tensor, key: Tensor, rows: slice, keys: slice, window: int | None) -> Tensor:
    """Attention weights of one block, (heads, rows, keys); the query already scaled."""
    scores = query[:, rows] @ key[:, keys].transpose(1, 2)
    before = keys.stop - rows.stop
    # Without a window only the last keys, those of the block itself, are hidden from some of its queries
    masked = keys if window is not None else slice(rows.start + before, keys.stop)
    unseen = _unseen(rows, masked, before, window, scores.device)
    scores[:, :, masked.start - keys.start :].masked_fill_(unseen, -math.inf)
    return torch.softmax(scores, dim=-1)


def _unseen(rows: slice, keys: slice, before: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query must not see, bool (rows, keys): those after it and those out of its window."""
    positions = torch.arange(rows.start + before, rows.stop + before, device=device)
    distance = positions[:, None] - torch.arange(keys.start, keys.stop, device=device)
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def _flex(query, key, value, layout, scaling, window, softcap) -> Tensor:
    length = query.shape[2]
    if (window, length) not in layout.masks:
        layout.masks[window, length] = block_mask(layout, length, window, query.device)
    groups = query.shape[1] // key.shape[1]
    if groups.bit_count() > 1:  # FlexAttention shares keys among a power of two of query heads only
        key, value = _for_each_head(key, value, groups)
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
