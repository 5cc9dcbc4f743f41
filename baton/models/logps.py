"""Log-probabilities of tokens from hidden states and the LM head, without a [tokens, vocabulary] tensor.

Logits exist for one chunk of tokens at a time; the backward pass computes each chunk's again instead of
keeping it.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

# Float32 logits of one chunk: a CPU's cache holds them, a GPU's matrix products are large enough.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# The same where they are read only once: the matrix product alone decides.
LEAN_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}


class TokenScores(NamedTuple):
    """What distributions say of their tokens; float32 (N,), `is_top1` bool. Gradients: `log_probs` only."""

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> TokenScores:
    """Score `targets` under `softmax(softcap * tanh(scale * (hidden @ weight.T + bias) / softcap))`.

    Args:
        hidden: (N, H) hidden states that predict the targets.
        weight: (V, H) LM head (the embedding matrix where they are tied).
        bias: (V,) or None.
        targets: int64 (N,).
        scale: factor on the logits (Cohere, Granite).
        softcap: `final_logit_softcapping` (Gemma 2); None for none.
        chunk_bytes: bound on one chunk of float32 logits; None: what suits the device.
    Under autocast the matrix products run in its dtype; the rest is float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunk_bytes = chunk_bytes or CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    with gathered(weight, bias):
        tokens = max(1, chunk_bytes // (4 * weight.shape[0]))
        return TokenScores(*_TokenScores.apply(hidden, weight, bias, targets, scale, softcap, tokens, dtype))


@torch.no_grad()
def token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The `log_probs` of `token_scores` alone, without gradients: float32 (N,), in nats, at half the cost."""
    chunk_bytes = LEAN_CHUNK_BYTES.get(hidden.device.type, LEAN_CHUNK_BYTES["cuda"])
    with gathered(weight, bias):
        tokens = max(1, chunk_bytes // (4 * weight.shape[0]))
        chunks = zip(hidden.split(tokens), targets.split(tokens), strict=True)
        logps = [-F.cross_entropy(_logits(h, weight, bias, scale, softcap), t, reduction="none") for h, t in chunks]
    return torch.cat(logps) if logps else hidden.new_empty(0, dtype=torch.float32)


def gathered(*parameters: Tensor | None):
    """Context in which ZeRO-3 shards are whole: the head is read without calling its module.

    A head that is the embedding as well may be whole already, and is then left alone.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    sharded = [p for p in parameters if p is not None and p.ds_status != ZeroParamStatus.AVAILABLE]
    return GatheredParameters(sharded) if sharded else nullcontext()


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Logits in float32 (n, V); the product in the inputs' dtype."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


class _TokenScores(torch.autograd.Function):
    """The chunked computation; gradients by hand, since autograd would keep every chunk's logits."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, tokens, dtype):
        log_probs, entropy, mean_logits, log_sum_sq_probs, log_z = hidden.new_empty(
            5, len(targets), dtype=torch.float32
        ).unbind()
        is_top1 = torch.empty_like(targets, dtype=torch.bool)
        head = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, len(targets), tokens):
            part = slice(start, start + tokens)
            logits = _logits(hidden[part].to(dtype), *head, scale, softcap)  # (n, V)
            at_target = logits.gather(1, targets[part, None]).squeeze(1)
            top, best = logits.max(dim=1)
            mean_logits[part] = logits.mean(dim=1)
            exp = torch.exp(logits - top[:, None])
            total = exp.sum(dim=1)
            log_z[part] = top + total.log()
            log_probs[part] = at_target - log_z[part]
            entropy[part] = log_z[part] - torch.linalg.vecdot(exp, logits) / total
            log_sum_sq_probs[part] = torch.linalg.vecdot(exp, exp).log() - 2 * total.log()
            is_top1[part] = best == targets[part]
        ctx.save_for_backward(hidden, weight, bias, targets, log_z)
        ctx.settings = scale, softcap, tokens, dtype
        ctx.mark_non_differentiable(entropy, mean_logits, is_top1, log_sum_sq_probs)
        ctx.set_materialize_grads(False)
        return log_probs, entropy, mean_logits, is_top1, log_sum_sq_probs

    @staticmethod
    def backward(ctx, grad_log_probs, *_):
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        scale, softcap, tokens, dtype = ctx.settings
        if grad_log_probs is None:
            return (None,) * 8
        with gathered(weight, bias):
            wanted = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            grad_hidden, grad_weight, grad_bias = (
                torch.zeros_like(value, dtype=torch.float32) if needed else None for value, needed in wanted
            )
            head = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, len(targets), tokens):
                part = slice(start, start + tokens)
                inputs = hidden[part].to(dtype)
                logits = _logits(inputs, *head, scale, softcap)
                # d log p(target) / d logits = onehot(target) - softmax(logits)
                grad = torch.exp(logits - log_z[part, None]).mul_(-grad_log_probs[part, None])
                grad.scatter_add_(1, targets[part, None], grad_log_probs[part, None])
                if softcap is not None:
                    grad.mul_(1 - (logits / softcap).square_())
                grad = grad.mul_(scale).to(dtype) if scale != 1.0 else grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ head[0]
                if grad_weight is not None:
                    grad_weight += grad.T @ inputs
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0, dtype=torch.float32)
        grads = zip((grad_hidden, grad_weight, grad_bias), (hidden, weight, bias), strict=True)
        return (*(None if grad is None else grad.to(value.dtype) for grad, value in grads), *(None,) * 5)
