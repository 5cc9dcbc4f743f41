"""A GPU's attention over packed trees: who sees whom, and that the numbers are those of the attention by trees.

A CPU compiles FlexAttention's forward pass, without gradients. Only a GPU can show that the Triton kernels are right, that
they fit its shared memory, and what the backward pass gives. Where there is a GPU, these tests run there as well, gradients
included; a training on one checks its first batch besides (test_agreement.py).
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from baton.models import attention
from baton.models.attention import NAME, block_mask, by_blocks, by_sequences, by_trees, padded_length
from baton.models.forward import score
from baton.models.trees import Layout
from tests.models.tiny_models import model_of, random_pairs

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# Of prompts and responses: none, within a block, whole blocks, more than one.
lengths = st.integers(0, 5) | st.integers(100, 300) | st.sampled_from([128, 256])
layouts = st.builds(Layout, st.lists(st.tuples(lengths.map(lambda n: n + 1), st.lists(lengths, max_size=3)), max_size=3))
windows = st.none() | st.integers(1, 5) | st.integers(100, 300) | st.just(128)


def sees(layout: Layout, length: int, window: int | None) -> torch.Tensor:
    """Which tokens each token of a row must see, bool (length, length); padding sees the padding before it and itself."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    start = 0
    for prompt, responses in [*layout.trees, (length - layout.length, [])]:
        whole = [range(start, start + prompt)]
        for response in responses:
            begin = whole[-1].stop
            whole.append(range(begin, begin + response))
        for part in whole:
            tokens = [*whole[0], *part] if part is not whole[0] else [*part]
            distance = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
            mask = (distance >= 0) & (distance < (window or length))
            own = slice(len(tokens) - len(part), None)
            seen[torch.tensor(part, dtype=torch.int64)[:, None], torch.tensor(tokens, dtype=torch.int64)] = mask[own]
        start = whole[-1].stop
    return seen


# The mask


@settings(max_examples=60)
@given(layouts, windows, st.integers(0, 140))
def test_the_mask_and_its_blocks_are_those_of_the_tokens_that_see_each_other(layout, window, padding):
    length = max(layout.length + padding, 1)
    ours, seen = block_mask(layout, length, window, torch.device("cpu")), sees(layout, length, window)
    token = torch.arange(length)
    assert torch.equal(ours.mask_mod(0, 0, token[:, None], token), seen)
    assert seen.any(dim=1).all()  # a softmax of no key is not a number
    torchs = create_block_mask(lambda batch, head, q, k: seen[q, k], None, None, length, length, device="cpu")
    assert ours.shape == torchs.shape
    assert torch.equal(ours.to_dense(), torchs.to_dense())
    for numbers, indices in itertools.product(("kv", "q"), ("", "full_")):
        count = getattr(torchs, f"{indices}{numbers}_num_blocks")
        assert torch.equal(getattr(ours, f"{indices}{numbers}_num_blocks"), count)
        listed = torch.arange(count.shape[-1]) < count[..., None]  # what follows in a row means nothing
        wanted = getattr(torchs, f"{indices}{numbers}_indices")
        assert torch.equal(getattr(ours, f"{indices}{numbers}_indices")[listed], wanted[listed])


@pytest.mark.parametrize("window", [None, 1000])
def test_the_mask_of_a_long_row_takes_no_memory_for_pairs_of_tokens(window):
    length = 65536
    layout = Layout([(100, [150, 0, 70]), (5, [])] * 200)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        block_mask(layout, length, window, torch.device("cpu"))
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 0 < allocated < 200e6  # all of it together; one byte for each pair would be 4.3e9


# The numbers

LAYOUTS = [
    Layout([(30, [150, 9]), (5, [40])]),
    Layout([(300, [350, 9, 0]), (5, [400])]),
    Layout([(1, [1]), (700, [])]),
    Layout([(17, [3, 5])] * 20),
    Layout([(128, [128, 256])]),
]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def both(layout, device, heads, dtype, window, softcap=None, width=16, attend=by_blocks, gradients=False):
    """Queries, keys and values, and the attention by `attend` and by trees of a padded row; with gradients on any GPU."""
    torch.manual_seed(0)
    length = padded_length(layout.length)
    inputs = []
    for count in (heads, 2, 2):
        projected = torch.randn(1, length, count * width).to(device, dtype)  # as models lay them out in memory
        inputs.append(projected.view(1, length, count, width).transpose(1, 2))
    for states in inputs:
        states.requires_grad_(gradients or device.type == "cuda")
    layout = Layout(layout.trees)  # its masks are of one device
    options = (window, softcap) if attend is by_blocks else (window,)
    ours = attend(*inputs, layout, width**-0.5, *options)
    trees = by_trees(*inputs, layout, width**-0.5, 0.0, window, softcap)
    return inputs, ours, trees


def compare(inputs, ours, trees, used, tolerance):
    """Outputs of the first `used` tokens are equal, and so are their gradients; all are finite, in the padding too."""
    torch.testing.assert_close(ours[:, :, :used], trees[:, :, :used], atol=tolerance, rtol=tolerance)
    assert ours.isfinite().all()  # nobody reads the padding, but a gradient of it would spread
    if inputs[0].requires_grad:
        upstream = torch.randn_like(trees)
        upstream[:, :, used:] = 0
        gradients = [torch.autograd.grad(output, inputs, upstream) for output in (ours, trees)]
        for gradient, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, expected, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_attention_by_blocks_is_attention_by_trees_and_all_layouts_share_one_compilation(device, dtype):
    # Groups of three and of two heads; heads narrower than a GPU multiplies; a soft cap of the model type below
    heads, width, softcap = (6, 16, None) if dtype is torch.float32 else (4, 8, 2.0)
    tolerance = 2e-5 if dtype is torch.float32 else 3e-2
    before = counters["stats"]["unique_graphs"]
    for layout, window in zip(LAYOUTS, [None, 20, None, 4, 200], strict=True):
        inputs, blocks, trees = both(layout, device, heads, dtype, window, softcap, width)
        compare(inputs, blocks, trees, layout.length, tolerance)
    assert counters["stats"]["unique_graphs"] - before <= 1


def sequence_by_sequence(query, key, value, sequences, scaling, window):
    """What FlashAttention computes, which a CPU does not have: the last queries of a sequence's keys, each up to its own."""
    outputs = []
    parts = [(ends[:-1].tolist(), ends[1:].tolist()) for ends in (sequences.query_ends, sequences.key_ends)]
    for q_from, q_to, k_from, k_to in zip(*parts[0], *parts[1], strict=True):
        q, k, v = query[q_from:q_to], key[k_from:k_to], value[k_from:k_to]
        assert len(q) <= sequences.most_queries
        assert len(k) <= sequences.most_keys
        k, v = (states.repeat_interleave(q.shape[1] // states.shape[1], dim=1) for states in (k, v))
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scaling
        scores = scores.masked_fill((distance < 0) | (distance >= (window or len(k))), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 20])
def test_attention_by_sequences_is_attention_by_trees(device, window, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(attention, "_flash", sequence_by_sequence)
    dtype, tolerance = (torch.bfloat16, 3e-2) if device.type == "cuda" else (torch.float32, 2e-5)
    for layout in LAYOUTS:
        inputs, ours, trees = both(layout, device, 6, dtype, window, width=64, attend=by_sequences, gradients=True)
        compare(inputs, ours, trees, layout.length, tolerance)


def logps(model, sequences) -> torch.Tensor:
    device = model.device.type
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        return score(model, sequences, None)[0].log_probs


def test_a_model_under_autocast_has_the_same_log_probabilities_by_blocks(device, monkeypatch):
    """Gemma 2: a soft cap, windows in some layers; under autocast its queries and keys are float32, its values bfloat16."""
    model = model_of("gemma2").to(device)
    model.config._attn_implementation = NAME
    sequences = [(row["prompt_ids"], row[side]) for row in random_pairs(8) for side in ("chosen_ids", "rejected_ids")]
    monkeypatch.setattr(attention, "by_blocks", lambda *a: by_trees(*a[:5], 0.0, *a[5:]))
    trees = logps(model, sequences)
    monkeypatch.setattr(attention, "by_blocks", by_blocks)
    monkeypatch.setattr(attention, "by_trees", lambda *a: by_blocks(*a[:5], *a[6:]))
    blocks = logps(model, sequences)
    torch.testing.assert_close(blocks, trees, atol=0.1, rtol=0)
    assert (blocks - trees).abs().mean() < 0.01


def test_layers_that_run_again_in_the_backward_pass_find_the_masks_of_their_forward_pass(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "by_trees", lambda *a: seen.append(a[3].masks) or by_trees(*a))
    model = model_of("llama").train()
    model.config._attn_implementation = NAME
    model.gradient_checkpointing_enable()
    score(model, [([3, 4], [5, 6, 7]), ([3, 4], [8, 9])], None)[0].log_probs.sum().backward()
    assert len(seen) == 2 * model.config.num_hidden_layers
    assert all(masks is seen[0] for masks in seen)
