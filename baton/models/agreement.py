"""Whether packed log-probabilities are those of the model's own forward pass: what a training on a GPU checks first.

On a CPU the packed attention is tested. The kernels of a GPU are compiled there, for each model, GPU and version of torch
anew, so a training computes its first batch both ways and stops where they differ by more than rounding.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baton.errors import InputError
from baton.models.forward import sequences_of
from baton.models.trees import Tokens

log = logging.getLogger("baton")

# Of a response, this many tokens are compared, evenly spaced: with 256,000 tokens in the vocabulary their logits are 256 MB.
MOST_POSITIONS = 256


class Limits(NamedTuple):
    """What rounding explains at most, in nats: the mean and the greatest difference of a token."""

    mean: float
    greatest: float


# Both passes round differently at each layer. Measured against the model's own attention (CPU, 2026-11-25, tests/models'
# families and a mixture of experts, weights in the dtype and under autocast; SmolLM2-135M, 30 layers, 1760 tokens of real
# chats): bfloat16 0.036 nats on average, 0.43 at most; float32 6e-6 and 3e-5. A token that sees other trees, or
# not its prompt, or one token too few of its window: 0.19 to 3.2 on average, 1.8 to 21 at most. The limits stand between.
# float16 has three more bits than bfloat16, and so has TF32, in which a GPU may compute float32.
LIMITS = {torch.bfloat16: Limits(0.12, 3.0), torch.float16: Limits(0.03, 0.5), torch.float32: Limits(0.03, 0.5)}


def check_batch(
    model: Callable[..., Any],
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    dtype: torch.dtype,
    remedy: str,
) -> None:
    """`check_packed` of a right-padded batch as TRL's collators make it, int64 (B, L) each.

    Args:
        model: in evaluation mode; its forward pass replaced by `forward.share_prefixes`, whatever wraps it since.
    """
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    with torch.no_grad():
        scores = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, fused_lm_head=True)
    packed = [logps[row != -100] for logps, row in zip(scores.log_probs, labels[:, 1:], strict=True)]
    check_packed(model, sequences_of(input_ids, attention_mask, labels), packed, dtype, remedy)


@torch.no_grad()
def check_packed(
    model: Callable[..., Any],
    sequences: Sequence[tuple[Tokens, Tokens]],
    packed: Sequence[Tensor],
    dtype: torch.dtype,
    remedy: str,
) -> None:
    """Compare packed log-probabilities with those of the model's own forward pass, one sequence at a time; log the difference.

    Every process of a run must call it, and all end alike: a sharded model needs as many forward passes in each.

    Args:
        model: a causal language model in evaluation mode, with its own attention, or what wraps one.
        sequences: `(prompt, response)` token ids.
        packed: of each, the log-probabilities of the response's tokens in nats, (response,).
        dtype: in which the matrix products are computed.
        remedy: ends the message: what to do.
    Raises:
        InputError: they differ by more than rounding, in this process or another.
    """
    device = packed[0].device
    passes = int(_worst_of_processes(torch.tensor(len(sequences), device=device)))
    differences = [_difference(model, *both) for both in zip(sequences, packed, strict=True)]
    for _ in range(passes - len(sequences)):
        _difference(model, sequences[0], packed[0])
    # Of each process, the worst of all: an average over all would hide one of many. Without a number there is no agreement.
    difference = torch.cat([*differences, torch.zeros(1, device=device)]).nan_to_num(nan=math.inf)
    mean = _worst_of_processes(difference.sum() / max(len(difference) - 1, 1)).item()
    greatest = _worst_of_processes(difference.max()).item()
    limits = LIMITS.get(dtype, LIMITS[torch.float32])
    found = (
        f"packed log-probabilities differ from the model's own by {mean:.2g} nats a token on average, {greatest:.2g} at most; "
        f"rounding in {str(dtype).removeprefix('torch.')} explains {limits.mean:g} and {limits.greatest:g}"
    )
    if mean > limits.mean or greatest > limits.greatest:
        raise InputError(f"{found}. {remedy}")
    log.info("first batch: %s", found)


def _difference(model: Callable[..., Any], sequence: tuple[Tokens, Tokens], packed: Tensor) -> Tensor:
    """How far the packed log-probabilities of some of a response's tokens are from the model's own, float32 (tokens,)."""
    prompt, response = sequence
    count = min(len(response), MOST_POSITIONS)
    chosen = torch.linspace(0, max(len(response) - 1, 0), count, device=packed.device).round().long()
    ids = torch.tensor([[*prompt, *response]], device=packed.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=chosen + len(prompt) - 1).logits[0].float()
    own = logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) + chosen, None]).squeeze(1)
    return (packed[chosen].float() - own).abs()


def _worst_of_processes(value: Tensor) -> Tensor:
    """The greatest of all processes' values; the value itself where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return value
