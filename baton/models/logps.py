"""Log-probabilities of tokens from hidden states and the LM head, in little memory and at the cost of the matrix products.

Logits exist for one *block* of tokens at a time, in the dtype of the matrix products. What is computed from them element by
element is float32: on a CPU in cuts of a block that its cache holds, on a GPU in compiled functions that read a block once or
twice. The backward pass writes the logits' gradients over the block, so that a block costs one matrix product for the logits,
one for the hidden states' gradient and one for the head's.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

# Logits of one block: the larger it is, the fewer gradients of the whole head are added up. `token_scores` keeps one block
# from the forward to the backward pass, and computes the logits of others again.
BLOCK_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
# Float32 logits of one cut of a block: a core's cache holds them and most of what is computed from them.
CUT_BYTES = 2**20
# Logits of one block of `top_logps`, of which float32 copies are made.
TOP_BLOCK_BYTES = 256 * 2**20
# Functions are compiled anew for other dtypes, a soft cap, gradients of the entropy, one token or one target; beyond this
# many, torch raises an error. (Its default is 8, and then it computes in float32 copies of the block.)
MOST_COMPILATIONS = 64


TINY = torch.finfo(torch.float32).tiny


class TokenScores(NamedTuple):
    """What distributions say of their tokens; float32 (N,), `is_top1` bool. Gradients: `log_probs` and `entropy`.

    With K targets a position `log_probs` and `is_top1` are (N, K). A token is top 1 if no other has a larger logit.
    """

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
    block_bytes: int | None = None,
) -> TokenScores:
    """Score `targets` under `softmax(softcap * tanh(scale * (hidden @ weight.T + bias) / softcap))`.

    Args:
        hidden: (N, H) hidden states that predict the targets.
        weight: (V, H) LM head (the embedding matrix where they are tied).
        bias: (V,) or None.
        targets: int64 (N,), or (N, K): K different tokens for each position.
        scale: factor on the logits (Cohere, Granite).
        softcap: `final_logit_softcapping` (Gemma 2); None for none.
        block_bytes: bound on one block of logits; None: what suits the device.
    Under autocast the matrix products run in its dtype; the rest is float32.
    """
    dtype = _product_dtype(hidden)
    with gathered(weight, bias):
        tokens = _tokens_of_block(len(targets), weight.shape[0], dtype, hidden.device, block_bytes)
        settings = scale, softcap, tokens, dtype, torch.is_grad_enabled()
        several = targets if targets.dim() == 2 else targets[:, None]  # (N, K)
        scores = TokenScores(*_TokenScores.apply(hidden, weight, bias, several, *settings))
    return scores._replace(log_probs=scores.log_probs.view(targets.shape), is_top1=scores.is_top1.view(targets.shape))


@torch.no_grad()
def token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The `log_probs` of `token_scores` alone, without gradients: float32 (N,), in nats."""
    log_probs = hidden.new_empty(len(targets), dtype=torch.float32)
    dtype = _product_dtype(hidden)
    with gathered(weight, bias):
        tokens = _tokens_of_block(len(targets), weight.shape[0], dtype, hidden.device, None)
        buffer = hidden.new_empty(tokens, weight.shape[0], dtype=dtype)  # (n, V)
        head = _cast(weight, bias, dtype)
        for part in _parts(len(targets), tokens):
            logits = _multiply(hidden[part].to(dtype), *head, buffer)
            for cut in _cuts(logits):
                log_probs[part][cut] = _on(logits.device, _log_probs)(logits[cut], targets[part][cut], scale, softcap)
    return log_probs


@torch.no_grad()
def top_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    top: int,
    vocabulary: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The `top` most likely tokens of each position, the likeliest first; a target that is not among them replaces the last.

    Args:
        targets: int64 (N,), below `vocabulary`.
        top: at least 2, at most `vocabulary`.
        vocabulary: tokens from this one on are left out; their probability still counts in the sum that is 1.
        hidden, weight, bias, scale, softcap: as for `token_scores`.
    Returns:
        token ids int64 (N, top), and ln p of each in nats, float32 (N, top), without gradients.
    """
    ids = targets.new_empty(len(targets), top)
    log_probs = hidden.new_empty(len(targets), top, dtype=torch.float32)
    dtype = _product_dtype(hidden)
    with gathered(weight, bias):
        tokens = _tokens_of_block(len(targets), weight.shape[0], dtype, hidden.device, TOP_BLOCK_BYTES)
        buffer = hidden.new_empty(tokens, weight.shape[0], dtype=dtype)  # (n, V)
        head = _cast(weight, bias, dtype)
        for part in _parts(len(targets), tokens):
            logits = _multiply(hidden[part].to(dtype), *head, buffer)
            for cut in _cuts(logits):
                ids[part][cut], log_probs[part][cut] = _top(logits[cut], targets[part][cut], top, vocabulary, scale, softcap)
    return ids, log_probs


def gathered(*parameters: Tensor | None, writes: bool = False):
    """Context in which ZeRO-3 shards are whole: the head is read without calling its module. What process 0 `writes` is kept.

    A head that is the embedding as well may be whole already, and is then left alone; and so is a weight that DeepSpeed does
    not know, such as the original of an adapter's copy of a head.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    whole = ZeroParamStatus.AVAILABLE
    sharded = [p for p in parameters if p is not None and getattr(p, "ds_status", whole) != whole]
    return GatheredParameters(sharded, modifier_rank=0 if writes else None) if sharded else nullcontext()


class _TokenScores(torch.autograd.Function):
    """Block by block; gradients by hand, since autograd would keep every block's logits.

    The last block's probabilities stay in its buffer: the backward pass begins with them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, tokens, dtype, with_gradients):
        log_probs = hidden.new_empty(targets.shape, dtype=torch.float32)  # (N, K)
        entropy, mean_logits, log_sum_sq_probs, log_z = log_probs.new_empty(4, len(targets)).unbind()
        is_top1 = torch.empty_like(targets, dtype=torch.bool)
        head = _cast(weight, bias, dtype)
        buffer = hidden.new_empty(tokens, len(weight), dtype=dtype)  # (n, V)
        parts = list(_parts(len(targets), tokens))
        for part in parts:
            logits = _multiply(hidden[part].to(dtype), *head, buffer)
            # The range of float16 is too small for probabilities
            keep = with_gradients and part == parts[-1] and dtype != torch.float16
            for cut in _cuts(logits):
                scored = _on(logits.device, _score)(logits[cut], targets[part][cut], scale, softcap, keep)
                for all_scores, scores in zip(
                    (log_probs, entropy, mean_logits, is_top1, log_sum_sq_probs, log_z), scored, strict=True
                ):
                    all_scores[part][cut] = scores
        ctx.save_for_backward(hidden, weight, bias, targets, log_probs, entropy, log_z)
        ctx.settings = scale, softcap, tokens, dtype
        ctx.kept = buffer if parts and keep else None
        ctx.mark_non_differentiable(mean_logits, is_top1, log_sum_sq_probs)
        ctx.set_materialize_grads(False)
        return log_probs, entropy, mean_logits, is_top1, log_sum_sq_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy, *_):
        hidden, weight, bias, targets, log_probs, entropy, log_z = ctx.saved_tensors
        scale, softcap, tokens, dtype = ctx.settings
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 9
        grad_log_probs = torch.zeros_like(log_probs) if grad_log_probs is None else grad_log_probs.contiguous()
        kept, ctx.kept = ctx.kept, None  # its memory is free when this pass ends; another pass would compute it again
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = grad_bias = None
        parts = list(_parts(len(targets), tokens))
        sum_dtype = weight.dtype if len(parts) == 1 else torch.promote_types(weight.dtype, torch.float32)
        with gathered(weight, bias):
            head = _cast(weight, bias, dtype)
            buffer = hidden.new_empty(tokens, len(weight), dtype=dtype) if kept is None else kept
            for part in reversed(parts):
                inputs = hidden[part].to(dtype)
                is_kept = kept is not None and part == parts[-1]
                grad = buffer[: len(inputs)] if is_kept else _multiply(inputs, *head, buffer)  # (n, V)
                for cut in _cuts(grad):
                    upstream = grad_log_probs[part][cut], None if grad_entropy is None else grad_entropy[part][cut]
                    scored = log_probs[part][cut], entropy[part][cut], log_z[part][cut]
                    at_targets = _on(grad.device, _differentiate)(grad[cut], *upstream, *scored, scale, softcap, is_kept)
                    grad[cut].scatter_(1, targets[part][cut], at_targets)
                if wants_hidden:
                    grad_hidden[part] = grad @ head[0]
                if wants_weight:
                    grad_weight = _add_product(grad_weight, grad.T, inputs, sum_dtype)
                if wants_bias:
                    summed = grad.sum(dim=0, dtype=torch.float32)
                    grad_bias = summed if grad_bias is None else grad_bias.add_(summed)
        if wants_weight:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        if wants_bias:
            grad_bias = torch.zeros_like(bias) if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 6


# Blocks


def _tokens_of_block(tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device, block_bytes: int | None) -> int:
    """Tokens of each block but the last, which may be shorter: blocks of at most `block_bytes`, of nearly one length."""
    block_bytes = block_bytes or BLOCK_BYTES.get(device.type, BLOCK_BYTES["cpu"])
    most = max(1, block_bytes // (vocabulary * dtype.itemsize))
    return math.ceil(tokens / math.ceil(tokens / most)) if tokens else 0


def _parts(tokens: int, size: int) -> Iterator[slice]:
    """The blocks of so many tokens, at most `size` in each."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size or 1))


def _cuts(block: Tensor) -> Iterator[slice]:
    """The rows of a block (n, V) that go through the functions below at once: on a GPU all of them."""
    tokens, vocabulary = block.shape
    return _parts(tokens, tokens if block.is_cuda else max(1, CUT_BYTES // (4 * vocabulary)))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's, or that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """`hidden @ weight.T + bias`, (n, V), in the first rows of `buffer`."""
    out = buffer[: len(hidden)]
    return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`total + left @ right` in place, in `dtype`; where there is no total yet, the product."""
    to_float32 = dtype == torch.float32 != left.dtype and _sums_to_float32(left.device)
    if total is None:
        return torch.mm(left, right, out_dtype=dtype) if to_float32 else torch.mm(left, right).to(dtype)
    if to_float32:
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    return total.addmm_(left, right) if dtype == left.dtype else total.add_(torch.mm(left, right))


@functools.cache
def _sums_to_float32(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 matrices there and adds the product to a float32 one, without a pass of its own."""
    if device.type != "cuda":
        return False
    factor, total = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
        return torch.mm(factor, factor, out_dtype=torch.float32).equal(total - 1)
    except (RuntimeError, TypeError):
        return False


# Element by element. Each takes the logits (n, V) of a block or of a cut of one, before scale and soft cap.


def _on(device: torch.device, function: Callable) -> Callable:
    """A function as this device runs it. On a GPU the passes over a block would cost more than its matrix products."""
    return _compiled(function) if device.type == "cuda" else function


@functools.cache
def _compiled(function: Callable, **options) -> Callable:
    # fullgraph: to fall back on uncompiled code would take several float32 copies of a block without a word.
    compiled = torch.compile(function, dynamic=True, fullgraph=True, **options)

    @torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS)
    def run(logits: Tensor, *arguments):
        # No views: torch compiles anew for the place of each in its base
        logits = logits.new_empty(0).set_(logits)
        return compiled(logits, *(value.clone() if isinstance(value, Tensor) else value for value in arguments))

    return run


def _finished(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits in float32 (n, V), scaled and capped."""
    logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def _log_probs(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    """ln p of the targets (n,), float32."""
    return -F.cross_entropy(_finished(logits, scale, softcap), targets, reduction="none")


def _top(
    logits: Tensor, targets: Tensor, top: int, vocabulary: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`top_logps` of a block, whose logits are (n, V)."""
    finished = _finished(logits, scale, softcap)
    values, ids = finished[:, :vocabulary].topk(top, dim=1)
    missing = (ids != targets[:, None]).all(dim=1)
    ids[:, -1] = torch.where(missing, targets, ids[:, -1])
    values[:, -1] = torch.where(missing, finished.gather(1, targets[:, None]).squeeze(1), values[:, -1])
    return ids, values - finished.logsumexp(dim=1, keepdim=True)


def _score(logits: Tensor, targets: Tensor, scale: float, softcap: float | None, keep: bool) -> tuple[Tensor, ...]:
    """What `TokenScores` holds of the targets (n, K), and log_z, the logarithm of the softmax's denominator.

    `keep`: the probabilities replace the logits.
    """
    finished = _finished(logits, scale, softcap)
    top = finished.amax(dim=1)  # with indices it would cost more than the softmax on a CPU
    probs = finished.softmax(dim=1)
    log_z = top - probs.amax(dim=1).log()
    at_targets = finished.gather(1, targets)
    scores = (
        at_targets - log_z[:, None],
        log_z - (probs * finished).sum(dim=1),
        finished.mean(dim=1),
        at_targets == top[:, None],
        probs.square().sum(dim=1).log(),
        log_z,
    )
    if keep:
        logits.copy_(probs)
    return scores


def _differentiate(
    logits: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    log_probs: Tensor,
    entropy: Tensor,
    log_z: Tensor,
    scale: float,
    softcap: float | None,
    kept: bool,
) -> Tensor:
    """Write the gradients of the logits over them, wrong at the targets (n, K); return those that belong there, (n, K).

    `kept`: not logits but probabilities are given. With p = softmax(z), z the finished logits:
    d ln p_t / dz_v = [v = t] - p_v, and dH / dz_v = -p_v (ln p_v + H) for the entropy H.
    """
    probs = logits.float() if kept else (_finished(logits, scale, softcap) - log_z[:, None]).exp()
    grad_log_probs = scale * grad_log_probs
    total = grad_log_probs.sum(dim=1, keepdim=True)  # (n, 1)

    def gradient(probs: Tensor) -> Tensor:
        """Without what is at the targets alone."""
        grad = -total * probs
        if grad_entropy is not None:
            surprise = probs.clamp_min(TINY).log() + entropy[:, None]
            grad = grad - probs * surprise * (scale * grad_entropy[:, None])
        return grad

    def slope(probs: Tensor) -> Tensor:
        """Of z = softcap * tanh(x / softcap): dz / dx = 1 - (z / softcap)^2, and z = ln p + log_z."""
        return 1 - ((probs.clamp_min(TINY).log() + log_z[:, None]) / softcap).square()

    at_targets = log_probs.exp()  # never rounded to the logits' dtype: 1 - p is exact where p is nearly 1
    grad, grad_at_targets = gradient(probs), gradient(at_targets) + grad_log_probs
    if softcap is not None:
        grad, grad_at_targets = grad * slope(probs), grad_at_targets * slope(at_targets)
    logits.copy_(grad)
    return grad_at_targets.to(logits.dtype)
