"""Attention in blocks of queries is causal attention, in value and in gradient, whatever the lengths and the window."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from baton.models.blockwise import blockwise_causal, causal_attention


def sees(queries: int, keys: int, window: int | None) -> torch.Tensor:
    """Which keys each of the last `queries` positions sees, bool (queries, keys)."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance < (window or keys))


@settings(max_examples=30)
@given(st.integers(1, 400), st.sampled_from([1, 2, 4]), st.none() | st.integers(1, 450))
def test_a_model_that_attends_blockwise_attends_causally(length, heads, window):
    query, key, value = torch.randn(2, 4, length, 8), *torch.randn(2, 2, heads, length, 8)
    ours, _ = blockwise_causal(None, query, key, value, sliding_window=window)
    mask = sees(length, length, window)
    own = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ours, own.transpose(1, 2), atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(0, 300), st.none() | st.integers(1, 350))
def test_the_last_positions_attend_to_all_before_them_and_gradients_are_those_of_autograd(queries, before, window):
    keys = before + queries
    inputs = [torch.randn(2, 3, length, 8, requires_grad=True) for length in (queries, keys, keys)]
    ours = causal_attention(*inputs, 0.3, window)
    own = scaled_dot_product_attention(*inputs, attn_mask=sees(queries, keys, window), scale=0.3)
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(own)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(own, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)
