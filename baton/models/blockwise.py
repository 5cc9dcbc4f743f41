"""Causal attention in blocks of queries, for models on a CPU: at most half the time of torch's own in bfloat16.

`causal_attention` is the computation, forward and backward. Packed trees use it (attention.py), and models that read plain
sequences: for those it is registered with transformers as the attention implementation `blockwise_causal`. It applies no
padding mask: sequences stand alone or are padded on the right, see batching.py.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "blockwise_causal"

# Their attention is causal, windowed or not, and nothing else.
MODEL_TYPES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")

QUERY_BLOCK = 128  # queries: the block's weights stay in the cache, its matrix products are still large
LATER = torch.ones(QUERY_BLOCK, QUERY_BLOCK, dtype=torch.bool).triu(1)  # within a block, what a query must not see


def use(model: Any) -> None:
    """Have `model` attend blockwise, if it is of a type that can."""
    if model.config.model_type in MODEL_TYPES:
        model.set_attn_implementation(NAME)


def blockwise_causal(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention; query (B, heads, L, D), key and value (B, key heads, L, D); returns (B, L, heads, D) and None.

    With a `sliding_window` a token sees that many positions up to its own.
    """
    key, value = for_each_head(key, value, query.shape[1] // key.shape[1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scaling, sliding_window).transpose(1, 2), None


def for_each_head(key: Tensor, value: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, key heads, L, D), repeated for each of the `groups` query heads that share one."""
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Attention of the last Q of K positions, each to itself and those before it; returns (B, heads, Q, D).

    Args:
        query: (B, heads, Q, D); key, value: (B, heads, K, D), of one dtype.
        scaling: factor on the scores.
        window: a token sees the `window` positions up to its own; None: all of them.
    """
    if torch.is_grad_enabled():
        return _CausalAttention.apply(query, key, value, scaling, window)
    return _attend(*_prepared(query, key, scaling), value, window)


class _CausalAttention(torch.autograd.Function):
    """Each block of queries against the keys that it can see; the backward pass computes the weights again.

    Matrix products and fused softmaxes only, and no more memory than torch's own scaled dot product attention.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, window):
        query, key = _prepared(query, key, scaling)
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.window = scaling, window
        return _attend(query, key, value, window)

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value = ctx.saved_tensors
        if _is_one_block(query, ctx.window):
            ((_, _, hidden),) = _blocks(query, key, None)
            weights = _weights(query, key, hidden)
            grad_scores = _grad_of_scores(weights, grad_output @ value.transpose(2, 3))
            grad_query = grad_scores @ key.transpose(2, 3) * ctx.scaling
            return grad_query, grad_scores.transpose(2, 3) @ query, weights.transpose(2, 3) @ grad_output, None, None
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key.transpose(2, 3), dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        for rows, keys, hidden in _blocks(query, key, ctx.window):
            weights = _weights(query[:, :, rows], key[..., keys], hidden)
            grad = grad_output[:, :, rows]
            grad_value[:, :, keys] += weights.transpose(2, 3) @ grad
            grad_scores = _grad_of_scores(weights, grad @ value[:, :, keys].transpose(2, 3))
            grad_query[:, :, rows] = grad_scores @ key[..., keys].transpose(2, 3)
            grad_key[:, :, keys] += grad_scores.transpose(2, 3) @ query[:, :, rows]
        return grad_query * ctx.scaling, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _prepared(query: Tensor, key: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The query scaled; the key as (B, heads, D, K), contiguous: up to a fifth faster where sequences are long."""
    return query * scaling, key.transpose(2, 3).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """The forward pass, of a query and key that are prepared."""
    if _is_one_block(query, window):
        ((_, _, hidden),) = _blocks(query, key, None)
        return _weights(query, key, hidden) @ value
    output = torch.empty_like(query)
    for rows, keys, hidden in _blocks(query, key, window):
        output[:, :, rows] = _weights(query[:, :, rows], key[..., keys], hidden) @ value[:, :, keys]
    return output


def _is_one_block(query: Tensor, window: int | None) -> bool:
    """Whether the queries are one block that sees all keys: a short text, of which calls take longer than products."""
    return window is None and 0 < query.shape[2] <= QUERY_BLOCK


def _blocks(query: Tensor, key: Tensor, window: int | None) -> Iterator[tuple[slice, slice, list[tuple[slice, Tensor]]]]:
    """Yield blocks of queries, the keys that some query of each can see, and the parts of those that not all of it can see.

    Such a part is a slice of the block's keys with a mask, bool (queries, keys of the part), of what must not be seen.
    """
    queries, before = query.shape[2], key.shape[3] - query.shape[2]
    later = LATER.to(query.device)
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        size = stop - start
        first = 0 if window is None else max(0, start + before - window + 1)
        hidden = [(slice(start + before - first, stop + before - first), later[:size, :size])]
        if window is not None:
            # Of the block's last query, the last key that is too early is `size - 2` keys after the first
            early = torch.ones(size, min(size, stop + before - first), dtype=torch.bool, device=query.device)
            hidden.append((slice(0, early.shape[1]), early.tril(start + before - first - window)))
        yield slice(start, stop), slice(first, stop + before), hidden


def _weights(query: Tensor, key: Tensor, hidden: list[tuple[slice, Tensor]]) -> Tensor:
    """Attention weights of one block, (B, heads, queries, keys); the query scaled, the key (B, heads, D, keys)."""
    scores = query @ key
    for part, mask in hidden:
        scores[..., part].masked_fill_(mask, -math.inf)
    return torch.softmax(scores, dim=-1)


def _grad_of_scores(weights: Tensor, grad_weights: Tensor) -> Tensor:
    """The gradient of the scores whose softmax the weights are; all (B, heads, queries, keys)."""
    return torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)


AttentionInterface.register(NAME, blockwise_causal)
