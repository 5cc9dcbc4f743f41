"""The reward margin as an offset in the sigmoid loss, as a term of its own beside TRL's losses.

With a difference of log-ratios d, in nats, TRL's loss of a pair is -log sigmoid(beta d). With the pair's margin m it becomes
-log sigmoid(beta d - margin_scale m) (DPO with an offset, arXiv 2402.10571). TRL computes the first; `offset_term` is the
difference of the second from it, of the same forward pass. So TRL's metrics are those without an offset.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import DPOConfig

from baton.errors import InputError


def check_margin(config: DPOConfig, margin_scale: float) -> None:
    """Raise InputError, before a model loads, for a loss that has no offset for `margin_scale`."""
    if not margin_scale:
        return
    if "sigmoid" not in config.loss_type or set(config.loss_type) - {"sigmoid", "sft"}:
        raise InputError(f"margin_scale needs loss_type sigmoid (or sigmoid with sft), not {config.loss_type}")
    if config.f_divergence_type != "reverse_kl":
        raise InputError(f"margin_scale needs f_divergence_type reverse_kl, not {config.f_divergence_type}")


def with_margin(collate: Callable[[list[dict]], dict[str, Any]]) -> Callable[[list[dict]], dict[str, Any]]:
    """A collator that also hands the rows' margins on, float32 (B,)."""

    def collate_with_margin(rows: list[dict]) -> dict[str, Any]:
        margins = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        return {**collate(rows), "margin": margins}

    return collate_with_margin


def offset_term(
    outputs: Any, inputs: dict[str, Tensor], offset: Tensor, *, beta: float, ld_alpha: float | None, weighted: bool
) -> Tensor:
    """The mean sigmoid loss with an offset less the one without, a scalar with gradient.

    Args:
        outputs: of the policy's forward pass: `log_probs`, and `log_sum_sq_probs` where `weighted`, both (2 B, T) of which
            the last L - 1 are those of the batch's tokens.
        inputs: TRL's batch of B pairs, chosen first: `completion_mask` (2 B, L), `ref_chosen_logps` and `ref_rejected_logps`
            (B,), in nats.
        offset: float32 (B,): margin_scale times the margin.
        ld_alpha: TRL's `ld_alpha`: weight of the tokens past the shorter response's length (LD-DPO, arXiv 2409.06411).
        weighted: TRL's `use_weighting`: whether each pair counts by its likelihood (WPO, arXiv 2406.11827, equation 2).
    """
    mask = inputs["completion_mask"][:, 1:]
    log_probs = outputs.log_probs[:, -mask.shape[1] :]  # prompt tuning puts virtual tokens before the batch's own
    summed = log_probs if ld_alpha is None else log_probs * _length_weights(mask, ld_alpha)
    chosen, rejected = summed.sum(dim=1).chunk(2)
    difference = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
    terms = F.logsigmoid(beta * difference) - F.logsigmoid(beta * difference - offset)
    if weighted:
        terms = terms * _likelihoods(log_probs.detach() - outputs.log_sum_sq_probs[:, -mask.shape[1] :], mask)
    return terms.mean()


def _length_weights(mask: Tensor, ld_alpha: float) -> Tensor:
    """1 for a response's tokens within the length of the pair's shorter one, `ld_alpha` for those after, (2 B, T) as `mask`."""
    shorter = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
    within = mask.cumsum(dim=1) <= shorter[:, None]
    return torch.where(within, 1.0, ld_alpha) * mask


def _likelihoods(aligned: Tensor, mask: Tensor) -> Tensor:
    """The product of both responses' weights, (B,): exp of the mean of each one's `aligned` log-probabilities (2 B, T)."""
    means = (aligned * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
    chosen, rejected = means.exp().chunk(2)
    return chosen * rejected
