"""From scores to advantages: rewards of tokens, GAE, REINFORCE++, RLOO, GRPO, and whitening over all tokens.

Tensors are float32, as are the results. B samples; T the tokens of the longest response; `mask`, bool (B, T), is true on the
tokens of each response, which begin at column 0. What a result holds outside the mask is 0. No result has a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_VARIANCE = 1e-8  # added under the root, as TRL does
LEAST_DEVIATION = 1e-4  # added to the deviation of a group, as TRL does


@torch.no_grad()
def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """The reward of each token (B, T): minus coefficient * `kl` (B, T), and at the last token also the score (B,).

    Source: Ziegler et al., arXiv 1909.08593, equation 2, token by token. A response without tokens has no reward.
    """
    return torch.where(mask, -coefficient * kl, 0.0) + scores[:, None] * last_tokens(mask)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, truncated: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, T), by generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16).

    Args:
        rewards: (B, T) of each token.
        values: (B, T); in column t the value of the state in which token t is chosen.
        truncated: bool (B,), true where a response was cut off by length: no value was computed for what would follow, so
            that of its last state stands in. A response that stopped is followed by the value 0.
    Returns are advantages + values, the targets of the value function.
    """
    values = values.masked_fill(~mask, 0.0)
    following = F.pad(values[:, 1:], (0, 1))  # 0 after the last token
    following = torch.where(last_tokens(mask) & truncated[:, None], values, following)
    deltas = (rewards + gamma * following - values).masked_fill(~mask, 0.0)
    advantages = discounted_sums(deltas, gamma * lam)
    return advantages, advantages + values


@torch.no_grad()
def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The discounted sum of the rewards from each token on, (B, T): REINFORCE++ (Hu et al., arXiv 2501.03262).

    The method whitens them over all tokens of a batch afterwards: see `whitened`.
    """
    return discounted_sums(rewards.masked_fill(~mask, 0.0), gamma)


@torch.no_grad()
def rloo(scores: Tensor, groups: Tensor) -> Tensor:
    """Each score less the mean of the others of its group, (B,): REINFORCE leave-one-out (Ahmadian et al., arXiv 2402.14740).

    `groups`, int64 (B,): equal numbers for samples of the same prompt. A group of one has the advantage 0.
    """
    centred, counts = _centred(scores, groups)
    return (centred * counts / (counts - 1).clamp(min=1)).to(scores.dtype)


@torch.no_grad()
def grpo(scores: Tensor, groups: Tensor, scale: bool = True) -> Tensor:
    """Each score less its group's mean, over its group's deviation, (B,): GRPO (Shao et al., arXiv 2402.03300, section 4.1).

    The deviation is the unbiased one plus 1e-4, as in TRL. Without `scale` nothing is divided by it: Dr. GRPO (Liu et al.,
    arXiv 2503.20783). `groups` as for `rloo`; a group of one has the advantage 0.
    """
    centred, counts = _centred(scores, groups)
    if not scale:
        return centred.to(scores.dtype)
    variances = _group_sums(centred**2, groups) / (counts - 1).clamp(min=1)
    return (centred / (variances.sqrt() + LEAST_DEVIATION)).to(scores.dtype)


def spread(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages of samples (B,) on each of their tokens, (B, T)."""
    return advantages[:, None] * mask


@torch.no_grad()
def whitened(values: Tensor, mask: Tensor, moments: Tensor | None = None) -> Tensor:
    """`values` with mean 0 and deviation 1 over all tokens of the mask; of any shape.

    The variance is the unbiased one plus 1e-8, as in TRL. Where `values` are one part of a batch, `moments` are the sum of the
    `token_moments` of all its parts (over processes, for one): each part then becomes what it is in the whole.
    """
    moments = token_moments(values, mask) if moments is None else moments
    mean = moments[1] / moments[0].clamp(min=1)
    scaled = (values.double() - mean) * (variance(moments) + LEAST_VARIANCE).rsqrt()
    return scaled.to(values.dtype).masked_fill(~mask, 0.0)


@torch.no_grad()
def token_moments(values: Tensor, mask: Tensor) -> Tensor:
    """How many tokens the mask has, the sum of their values and of the squares: float64 (3,). Those of parts can be added."""
    kept = values[mask].double()
    return torch.stack([torch.full_like(kept.sum(), len(kept)), kept.sum(), (kept**2).sum()])


def variance(moments: Tensor) -> Tensor:
    """The unbiased variance of values with these moments, float64; 0 for fewer than two."""
    count, total, squares = moments
    return ((squares - total**2 / count.clamp(min=1)) / (count - 1).clamp(min=1)).clamp(min=0)


def last_tokens(mask: Tensor) -> Tensor:
    """Bool (B, T): true at the last token of each response."""
    return mask & ~F.pad(mask[:, 1:], (0, 1))


def discounted_sums(values: Tensor, factor: float) -> Tensor:
    """The sum over k of factor**k * values[:, t + k], (B, T)."""
    sums, terms = values, 1
    while terms < values.shape[1]:  # each pass doubles the terms of a sum
        sums = sums + factor**terms * F.pad(sums[:, terms:], (0, terms))
        terms *= 2
    return sums


def _centred(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scores less their group's mean, and the sizes of their groups; float64 (B,), so that equal scores give 0."""
    counts = _group_sums(torch.ones_like(scores, dtype=torch.float64), groups)
    return scores.double() - _group_sums(scores.double(), groups) / counts, counts


def _group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """For each sample the sum of its group's values, (B,)."""
    numbers = groups.unique(return_inverse=True)[1]
    return torch.zeros_like(values).index_add(0, numbers, values)[numbers]
