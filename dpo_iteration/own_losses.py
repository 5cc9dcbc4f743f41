"""Losses of pairs beside TRL's, each a function of what the policy says of a batch's pairs, (B,), from TRL's own forward pass.

Log-probabilities are in nats. A loss is one number for each pair, so that any division into rows and processes gives the same
mean. TRL's metrics do not see these losses, but for those of a loss without a reference (`trainer.py`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.errors import InputError
from dpo_iteration.losses import OWN_LOSSES, REFERENCE_FREE, LossNumbers

# A token with probability 1 has infinite odds; above -LEAST nats a mean counts as this.
LEAST = 1e-6


class Pairs(NamedTuple):
    """What is said of B pairs, (B,) each.

    `chosen` and `rejected` are log-ratios of policy and reference, summed over a response's tokens; `…_mean` are the policy's
    log-probabilities of a token on average; `…_length` are tokens; `margin` is chosen reward minus rejected reward, None where
    no loss needs it. `weight` is what each pair's loss is multiplied by, None: 1.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_mean: Tensor
    rejected_mean: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    margin: Tensor | None
    weight: Tensor | None


def simpo(pairs: Pairs, beta: float, numbers: LossNumbers) -> Tensor:
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - simpo_gamma), without a reference.

    SimPO (arXiv 2405.14734).
    """
    return -F.logsigmoid(beta * (pairs.chosen_mean - pairs.rejected_mean) - numbers.simpo_gamma)


def orpo(pairs: Pairs, beta: float, numbers: LossNumbers) -> Tensor:
    """-mean log p(chosen) - orpo_lambda log sigmoid(log odds(chosen) - log odds(rejected)), without a reference and `beta`.

    The odds are p / (1 - p) of p = exp(mean log p). ORPO (arXiv 2403.07691).
    """
    difference = _log_odds(pairs.chosen_mean) - _log_odds(pairs.rejected_mean)
    return -pairs.chosen_mean - numbers.orpo_lambda * F.logsigmoid(difference)


def dpop(pairs: Pairs, beta: float, numbers: LossNumbers) -> Tensor:
    """-log sigmoid(beta (chosen - rejected - dpop_lambda max(0, -chosen))), of log-ratios.

    So the chosen response may not become less likely than under the reference. DPO-Positive (arXiv 2402.13228).
    """
    return -F.logsigmoid(beta * (pairs.chosen - pairs.rejected - numbers.dpop_lambda * F.relu(-pairs.chosen)))


def rebel(pairs: Pairs, beta: float, numbers: LossNumbers) -> Tensor:
    """((chosen - rejected) / rebel_eta - margin)^2, of log-ratios to the policy that the round starts from, without `beta`.

    REBEL (arXiv 2404.16767), whose reference is that policy.
    """
    return ((pairs.chosen - pairs.rejected) / numbers.rebel_eta - pairs.margin) ** 2


def sppo(pairs: Pairs, beta: float, numbers: LossNumbers) -> Tensor:
    """(chosen - (P - 1/2) / beta)^2 + (rejected + (P - 1/2) / beta)^2, of log-ratios, with P = sigmoid(margin).

    SPPO (arXiv 2405.00675, equation 4.7; its eta is 1 / beta). P is the probability that the chosen response beats the
    rejected one where rewards are those of a Bradley-Terry model. The paper averages it over all K responses of the prompt;
    here the opponent is the pair's other response, as in its authors' variant for single pairs. With P = 1 it is `sppo_hard`.
    """
    half = (torch.sigmoid(pairs.margin) - 0.5) / beta
    return (pairs.chosen - half) ** 2 + (pairs.rejected + half) ** 2


LOSSES: dict[str, Callable[[Pairs, float, LossNumbers], Tensor]] = {
    "simpo": simpo, "orpo": orpo, "dpop": dpop, "rebel": rebel, "sppo": sppo,
}  # fmt: skip


def offset_difference(pairs: Pairs, beta: float, margin_scale: float, length_alpha: float) -> Tensor:
    """What an offset adds to the `sigmoid` loss of each pair, whose -log sigmoid(beta d) becomes -log sigmoid(beta d - offset).

    d is the difference of log-ratios. The offset is margin_scale * margin (DPO with an offset, arXiv 2402.10571), less
    length_alpha * (chosen_length - rejected_length) (length-regularised DPO, arXiv 2403.19159): a preference that
    length explains then teaches less.
    """
    scaled = beta * (pairs.chosen - pairs.rejected)
    offset = length_alpha * (pairs.rejected_length - pairs.chosen_length)
    if margin_scale:
        offset = offset + margin_scale * pairs.margin
    return F.logsigmoid(scaled) - F.logsigmoid(scaled - offset)


def optimism(pairs: Pairs, of_chosen: Tensor, alpha: float) -> Tensor:
    """XPO's term, alpha log p of the reference's response, summed over its tokens; it is added to the `sigmoid` loss, (B,).

    It takes probability from what the reference says already, so that the policy explores. XPO (arXiv 2405.21046, Algorithm 1,
    with the reference as the sampling policy), which sums it, like the loss, over all pairs. `of_chosen` says where the
    chosen response is the reference's, bool (B,); elsewhere it is the rejected one.
    """
    sums = pairs.chosen_mean * pairs.chosen_length, pairs.rejected_mean * pairs.rejected_length
    return alpha * torch.where(of_chosen, *sums)


def mean_loss(losses: Tensor, pairs: Pairs) -> Tensor:
    """The mean of (B,) losses, each by its pair's weight."""
    return losses.mean() if pairs.weight is None else (losses * pairs.weight).mean()


def pairs_said(outputs: Any, inputs: dict[str, Tensor], margin: Tensor | None, ld_alpha: float | None, weighted: bool) -> Pairs:
    """What a forward pass says of a batch's pairs.

    Args:
        outputs: of the policy: `log_probs`, and `log_sum_sq_probs` where `weighted`, both (2 B, T) of which the last L - 1 are
            those of the batch's tokens.
        inputs: TRL's batch of B pairs, chosen first: `completion_mask` (2 B, L), `ref_chosen_logps` and `ref_rejected_logps`
            (B,), in nats.
        ld_alpha: TRL's `ld_alpha`: weight of the tokens past the shorter response's length (LD-DPO, arXiv 2409.06411).
        weighted: TRL's `use_weighting`: whether each pair counts by its likelihood (WPO, arXiv 2406.11827, equation 2).
    """
    mask = inputs["completion_mask"][:, 1:]
    log_probs = outputs.log_probs[:, -mask.shape[1] :] * mask  # prompt tuning puts virtual tokens before the batch's own
    lengths = mask.sum(dim=1)
    means = log_probs.sum(dim=1) / lengths.clamp_min(1)
    summed = log_probs if ld_alpha is None else log_probs * _length_weights(mask, ld_alpha)
    chosen, rejected = summed.sum(dim=1).chunk(2)
    weight = None
    if weighted:
        weight = _likelihoods(log_probs.detach() - outputs.log_sum_sq_probs[:, -mask.shape[1] :], mask)
    return Pairs(
        chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"],
        *means.chunk(2), *lengths.chunk(2), margin, weight,
    )  # fmt: skip


def check_own_losses(config: Any, numbers: LossNumbers, margin_scale: float = 0.0) -> None:
    """Raise InputError, before a model loads, for settings of a DPOConfig that one of the losses here does not go with."""
    own = [name for name in config.loss_type if name in OWN_LOSSES]
    terms = {"length_alpha": numbers.length_alpha, "margin_scale": margin_scale, "xpo_alpha": numbers.xpo_alpha}
    given = [f"`{name}`" for name, value in terms.items() if value]
    if not own and not given:
        return
    named = f"loss_type {', '.join(own)}" if own else given[0]
    if numbers.xpo_alpha and config.use_weighting:
        raise InputError("`xpo_alpha` adds what counts alike for all pairs, and `use_weighting` weights them: leave one out")
    if own and config.f_divergence_type != "reverse_kl":
        raise InputError(f"{named} needs f_divergence_type reverse_kl, not {config.f_divergence_type}")
    if config.sync_ref_model:
        raise InputError(
            f"{named} reads the reference's log-probabilities once, and `sync_ref_model` changes it: leave one out"
        )
    if config.ld_alpha is not None and (averaged := REFERENCE_FREE.intersection(own)):
        raise InputError(f"`ld_alpha` weights sums over tokens, and loss_type {', '.join(averaged)} averages: leave it out")


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean)."""
    mean = mean.clamp_max(-LEAST)
    near = mean > -math.log(2)  # there expm1 is exact, elsewhere log1p is; each branch gets what it can take
    log_rest = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, mean, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, mean))),
    )
    return mean - log_rest


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
