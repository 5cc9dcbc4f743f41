"""Scores of tokens under an LM head, block by block: the values and gradients of a plain log-softmax."""

import pytest
import torch
from torch._dynamo.utils import counters

from baton.models import logps
from baton.models.logps import token_logps, token_scores

TOKENS, VOCABULARY, HIDDEN = 7, 11, 5
ONE_BLOCK, TWO_TOKENS = None, 2 * 4 * VOCABULARY  # bytes of a block in float32

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]  # where there is a GPU, what is compiled there as well


def inputs_of(tokens=TOKENS, targets=None, bias=False, vocabulary=VOCABULARY, device="cpu"):
    """Hidden states, head and bias (or None), which take gradients, and targets (N,) or (N, K)."""
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, HIDDEN), torch.randn(vocabulary, HIDDEN)
    ids = torch.rand(tokens, vocabulary).argsort(dim=1)[:, : targets or 1]
    tensors = hidden, weight, torch.randn(vocabulary) if bias else None
    tensors = (None if tensor is None else tensor.to(device).requires_grad_() for tensor in tensors)
    return *tensors, (ids if targets else ids[:, 0]).to(device)


def plain_scores(hidden, weight, bias, targets, scale=1.0, softcap=None) -> dict[str, torch.Tensor]:
    """The scores from all logits at once, by autograd's own functions, in float64."""
    hidden, weight, bias = (None if tensor is None else tensor.double() for tensor in (hidden, weight, bias))
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    full = logits.log_softmax(-1)
    several = targets if targets.dim() == 2 else targets[:, None]
    return {
        "log_probs": full.gather(1, several).view(targets.shape),
        "entropy": -(full.exp() * full).sum(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": (logits.argmax(-1, keepdim=True) == several).view(targets.shape),
        "log_sum_sq_probs": full.exp().square().sum(-1).log(),
    }


def assert_scores_and_gradients(inputs, block_bytes, of_entropy, atol=1e-5, **settings):
    scores = token_scores(*inputs, **settings, block_bytes=block_bytes)._asdict()
    wanted = plain_scores(*inputs, **settings)
    for name, values in wanted.items():
        torch.testing.assert_close(scores[name], values.to(scores[name].dtype), atol=atol, rtol=1e-4)
    upstream = torch.randn(scores["log_probs"].shape).to(inputs[0].device)
    of_entropy = torch.randn(len(inputs[0])).to(inputs[0].device) * of_entropy
    both = []
    for values in (scores, wanted):
        loss = (values["log_probs"] * upstream).sum()
        if of_entropy.any():
            loss = loss + (values["entropy"] * of_entropy).sum()
        both.append(torch.autograd.grad(loss, [tensor for tensor in inputs[:3] if tensor is not None]))
    for gradient, expected in zip(*both, strict=True):
        torch.testing.assert_close(gradient, expected.to(gradient.dtype), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("block_bytes", [ONE_BLOCK, TWO_TOKENS])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_scores_and_gradients_are_those_of_a_plain_softmax(softcap, block_bytes):
    cases = [(1.0, False, None, 0), (0.5, True, None, 1), (1.0, True, 4, 0), (0.5, False, 1, 1)]
    for scale, bias, targets, of_entropy in cases:
        inputs = inputs_of(bias=bias, targets=targets)
        assert_scores_and_gradients(inputs, block_bytes, of_entropy, scale=scale, softcap=softcap)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_and_gradients_of_two_blocks_on_each_device(device):
    assert_scores_and_gradients(inputs_of(device=device), 2 * TWO_TOKENS, of_entropy=0)
    inputs = inputs_of(bias=True, targets=4, device=device)
    assert_scores_and_gradients(inputs, 2 * TWO_TOKENS, of_entropy=1, scale=0.5, softcap=3.0)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_a_single_one_are_scored(tokens):
    assert_scores_and_gradients(inputs_of(tokens, bias=True), ONE_BLOCK, of_entropy=1)
    assert token_logps(*inputs_of(tokens)).shape == (tokens,)


def test_the_entropy_alone_has_a_gradient():
    hidden, weight, bias, targets = inputs_of(bias=True)
    got, wanted = (
        torch.autograd.grad(entropy.sum(), (hidden, weight, bias))
        for entropy in (
            token_scores(hidden, weight, bias, targets).entropy,
            plain_scores(hidden, weight, bias, targets)["entropy"],
        )
    )
    for gradient, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, check_dtype=False)


def test_a_block_many_cuts_long_is_scored_like_a_short_one(monkeypatch):
    monkeypatch.setattr(logps, "CUT_BYTES", 3 * 4 * VOCABULARY)
    assert_scores_and_gradients(inputs_of(), ONE_BLOCK, of_entropy=1)
    hidden, weight, bias, targets = inputs_of()
    torch.testing.assert_close(token_logps(hidden, weight, bias, targets), token_scores(hidden, weight, bias, targets)[0])


@pytest.mark.parametrize("block_bytes", [ONE_BLOCK, TWO_TOKENS])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_rounds_products_and_sums_up_the_heads_gradient_in_float32(device, block_bytes):
    hidden, weight, _, targets = inputs_of(40, vocabulary=300, device=device)
    with torch.autocast(device, torch.bfloat16):
        scores = token_scores(hidden, weight, None, targets, block_bytes=block_bytes and block_bytes * 50)
        torch.testing.assert_close(token_logps(hidden, weight, None, targets), scores.log_probs)
    wanted = plain_scores(hidden, weight, None, targets)
    torch.testing.assert_close(scores.log_probs, wanted["log_probs"].float(), atol=0.05, rtol=0)
    gradients = torch.autograd.grad(scores.log_probs.sum(), (hidden, weight))
    expected = torch.autograd.grad(wanted["log_probs"].sum(), (hidden, weight))
    for gradient, exact in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - exact).norm() < 0.01 * exact.norm()


def test_a_frozen_head_gets_no_gradient_and_passes_on_the_hidden_states():
    hidden, weight, bias, targets = inputs_of(bias=True)
    frozen = weight.detach(), bias.detach()
    token_scores(hidden, *frozen, targets, block_bytes=TWO_TOKENS).log_probs.sum().backward()
    (expected,) = torch.autograd.grad(plain_scores(hidden, *frozen, targets)["log_probs"].sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected)
    assert weight.grad is None and bias.grad is None


@pytest.mark.parametrize("block_bytes", [ONE_BLOCK, TWO_TOKENS])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(block_bytes):
    hidden, weight, bias, targets = inputs_of()
    total = token_scores(hidden, weight, bias, targets, block_bytes=block_bytes).log_probs.sum()
    first, second = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second)


def test_a_gpu_compiles_a_few_times_whatever_the_lengths(monkeypatch):
    """What torch compiles anew for is the same for every backend; that of a GPU needs one."""
    compiled = logps._compiled
    monkeypatch.setattr(logps, "_on", lambda device, function: compiled(function, backend="eager"))
    counters.clear()
    for tokens, vocabulary, tokens_of_block in [(9, 67, 9), (7, 61, 4), (11, 64, 4)]:
        assert_scores_and_gradients(inputs_of(tokens, vocabulary=vocabulary), 4 * vocabulary * tokens_of_block, of_entropy=0)
    assert counters["stats"]["unique_graphs"] == 4  # scores and gradients, of blocks that are kept and of others
