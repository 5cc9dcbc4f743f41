"""The losses of PPO and its kin, token by token, and what goes with them: KL estimates, importance weights, the KL coefficient.

Tensors are float32 of any equal shape, as a rule one number for each token of a batch, (N,). Nothing is reduced: the caller
weighs the terms by the number of tokens of the whole step. Gradients flow to `logps` and `values` alone.
"""

from typing import Any

import torch
from torch import Tensor

from ppo.advantages import token_moments, variance

KL_ESTIMATES = ("k1", "k2", "k3")
MOST_LOG_RATIO = 20.0  # beyond it the ratio is held: its exponential overflows, and 0 * infinity in a gradient is no number
MOST_ERROR = 0.2  # of the KL, relative to its target, that one update answers to


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str) -> Tensor:
    """An estimate of KL(policy || reference) at each token that the policy has sampled, in nats.

    Source: Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html. k1 is unbiased, k2 has a small bias and is
    never negative, k3 is unbiased and never negative. As a term of a loss, k2 has the gradient of the KL; that of k1 is 0 on
    average. Raises ValueError for another `kind`.
    """
    log_ratio = logps - ref_logps
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    if kind == "k3":
        return torch.expm1((-log_ratio).clamp(max=MOST_LOG_RATIO)) + log_ratio
    raise ValueError(f"no KL estimate {kind!r}, only {', '.join(KL_ESTIMATES)}")


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss of each token, and bool: where a bound holds it, so that it has no gradient.

    Source: Schulman et al., arXiv 1707.06347, equation 7: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r the ratio of the
    probabilities. A `clip_high` above `clip_low` is DAPO's (Yu et al., arXiv 2503.14476). `dual_clip`, above 1, bounds the
    loss of a negative advantage to -dual_clip * A (Ye et al., arXiv 1912.09729).
    """
    ratio = torch.exp((logps - old_logps).clamp(max=MOST_LOG_RATIO))
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss, clipped = torch.maximum(free, bounded), bounded > free
    if dual_clip is not None:
        most = -dual_clip * advantages
        beyond = (advantages < 0) & (loss > most)
        loss, clipped = torch.where(beyond, most, loss), clipped | beyond
    return loss, clipped


def sequence_ratio(logps: Tensor, old_logps: Tensor, sequences: Tensor) -> Tensor:
    """The logarithm of each token's ratio by GSPO, of the shape of `logps` (Zheng et al., arXiv 2507.18071, eq. 7 and 14).

    Its value is the mean of logps - old_logps over the token's sequence; its gradient is that of the token's own `logps`, so
    that tokens may have different advantages. `sequences`, int64: equal numbers for tokens of the same response, all of which
    must be there. Give it to `policy_loss` as `logps`, with zeros as `old_logps`.
    """
    return sequence_means((logps - old_logps).detach(), sequences) + logps - logps.detach()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """The value function's loss of each token, and bool: where the bound holds it.

    0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), as OpenAI's PPO2 and TRL have it; without `clip` the
    first alone.
    """
    free = (values - returns) ** 2
    if clip is None:
        return 0.5 * free, torch.zeros_like(free, dtype=torch.bool)
    bounded = (torch.clamp(values, old_values - clip, old_values + clip) - returns) ** 2
    return 0.5 * torch.maximum(free, bounded), bounded > free


@torch.no_grad()
def importance_weights(old_logps: Tensor, sampler_logps: Tensor, token_clip: float) -> Tensor:
    """The weight of each token that another program sampled: min(pi_trainer / pi_sampler, token_clip).

    Truncated importance sampling: what the sampler computed differs by rounding, or by older weights, from what the trainer
    computes (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025; Espeholt et al.,
    arXiv 1802.01561).
    """
    return torch.exp(old_logps - sampler_logps).clamp(max=token_clip)


@torch.no_grad()
def sequence_mask(old_logps: Tensor, sampler_logps: Tensor, sequences: Tensor, low: float, high: float) -> Tensor:
    """Bool: the tokens of sequences whose ratio pi_trainer / pi_sampler, as a geometric mean, is from `low` to `high`.

    Source: Liu et al., "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch", 2025.
    `sequences` as for `sequence_ratio`.
    """
    ratios = sequence_means(old_logps - sampler_logps, sequences).exp()
    return (low <= ratios) & (ratios <= high)


def sequence_means(values: Tensor, sequences: Tensor) -> Tensor:
    """At each token the mean of `values` over the tokens of its sequence, of the shape of `values`."""
    numbers = sequences.flatten().unique(return_inverse=True)[1]
    sums = values.new_zeros(values.numel()).index_add(0, numbers, values.flatten())
    return (sums[numbers] / numbers.bincount()[numbers]).view(values.shape)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the tokens of the mask; 1 at best, 0 for a constant, NaN for equal returns.

    Of a batch in parts: `variance` of the added `token_moments` of each.
    """
    rest = variance(token_moments(returns - values, mask))
    whole = variance(token_moments(returns, mask))
    return torch.where(whole > 0, 1 - rest / whole, torch.nan).to(values.dtype)


class AdaptiveKL:
    """The coefficient of the KL penalty, raised while the KL is above `target` and lowered while it is below.

    Source: Ziegler et al., arXiv 1909.08593, section 2.2. Without a target it is fixed.
    """

    def __init__(self, coefficient: float, target: float | None = None, horizon: float = 10_000):
        """`target` is in the unit of what `update` gets.

        Over `horizon` samples, and in one update however many it has, the coefficient changes by a fifth at most.
        """
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Take note of the mean `kl` of so many samples."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -MOST_ERROR), MOST_ERROR)
        # Held at 1: a step of more than five horizons with a KL below its target would make the penalty a reward.
        self.coefficient *= 1 + error * min(samples / self.horizon, 1.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.coefficient = state["coefficient"]
