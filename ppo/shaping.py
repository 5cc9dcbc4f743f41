"""What happens to scores before advantages are computed from them: bounds, normalisation, penalties for length.

Scores are float32 (B,), one for each sample, and so are the results. No argument is changed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ppo.advantages import grpo

LEAST_DEVIATION = 1e-8

Moments = dict[str, float]  # of all scores so far: `count`, `mean`, and `m2`, the sum of squared distances from the mean

NO_SCORES: Moments = {"count": 0.0, "mean": 0.0, "m2": 0.0}


def clip(scores: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Scores held between two bounds; None for no bound."""
    return scores if low is None and high is None else scores.clamp(low, high)


def with_scores(moments: Moments, scores: Tensor) -> Moments:
    """The moments of all scores so far with these among them.

    Source: Welford 1962; for several at once Chan, Golub and LeVeque, "Updating formulae …", 1979.
    """
    added = scores.double()
    count, before = added.numel(), moments["count"]
    if not count:
        return moments
    mean = added.mean().item()
    difference, total = mean - moments["mean"], before + count
    m2 = moments["m2"] + ((added - mean) ** 2).sum().item() + difference**2 * before * count / total
    return {"count": float(total), "mean": moments["mean"] + difference * count / total, "m2": m2}


def normalised(scores: Tensor, moments: Moments) -> Tensor:
    """Scores less the mean so far, over the (unbiased) deviation so far; before there are two scores, less the mean alone."""
    centred = scores.double() - moments["mean"]
    if moments["count"] >= 2:
        centred /= (moments["m2"] / (moments["count"] - 1)) ** 0.5 + LEAST_DEVIATION
    return centred.to(scores.dtype)


def normalised_by_prompt(scores: Tensor, groups: Tensor) -> Tensor:
    """Scores with mean 0 and deviation 1 among the samples of their prompt, as GRPO has them; `groups` as for `grpo`."""
    return grpo(scores, groups)


def truncation_penalty(scores: Tensor, finish_reasons: Sequence[str | None], penalty: float) -> Tensor:
    """Scores less `penalty` where a response was cut off by length (finish reason `length`)."""
    cut_off = torch.tensor([reason == "length" for reason in finish_reasons], device=scores.device)
    return scores - penalty * cut_off.to(scores.dtype)


def overlong_penalty(scores: Tensor, lengths: Tensor, max_length: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """Scores less a penalty that grows over the last `buffer` tokens before `max_length`, from 0 to `penalty`.

    Source: soft overlong punishment, DAPO (Yu et al., arXiv 2503.14476, equation 13). `lengths`, int64 (B,), in tokens.
    """
    excess = lengths - (max_length - buffer)
    return scores - penalty * (excess / buffer).clamp(0, 1).to(scores.dtype)


def length_penalty(scores: Tensor, lengths: Tensor, penalty: float) -> Tensor:
    """Scores less `penalty` for each token; `lengths`, int64 (B,), in tokens."""
    return scores - penalty * lengths.to(scores.dtype)
