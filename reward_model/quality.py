"""How good rewards are on what was held out: of pairs, of responses with rewards, of steps with labels."""

import logging
import math
from typing import Any

import numpy as np

log = logging.getLogger("baton")

Z = 1.959964  # of a 95 % interval
BINS = 10  # of the calibration
BUCKETS = 4  # of the margin
POOR_ACCURACY = 0.6


def quality(rewards: np.ndarray, margins: np.ndarray) -> dict[str, Any]:
    """What `rewards` of chosen and rejected, (N, 2), say of N pairs, N at least 1.

    - `accuracy`: share of pairs whose chosen response has the higher reward, and its 95 % `accuracy_interval`.
    - `mean_chosen_reward`, `mean_rejected_reward`.
    - `calibration_error`: of the probabilities of the Bradley-Terry model (`calibration_error`).
    - `by_margin`: the accuracy in quarters of the pairs that have one of the `margins`, (N,), NaN where a pair has none.
    """
    right = rewards[:, 0] > rewards[:, 1]
    chosen, rejected = rewards.mean(axis=0).tolist()
    return {
        **accuracy(right),
        "mean_chosen_reward": chosen,
        "mean_rejected_reward": rejected,
        "calibration_error": calibration_error(rewards[:, 0] - rewards[:, 1]),
        "by_margin": by_margin(right, margins),
    }


def accuracy(right: np.ndarray) -> dict[str, Any]:
    """The share that is right, and its interval."""
    return {"accuracy": float(right.mean()), "accuracy_interval": wilson_interval(int(right.sum()), len(right))}


def wilson_interval(successes: int, trials: int) -> list[float]:
    """The 95 % interval of a share by Wilson's score (1927, JASA 22:209): it stays in [0, 1] and suits few trials too."""
    share, weight = successes / trials, Z**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    low = max(0.0, min(share, centre - half))
    return [low, min(1.0, max(share, centre + half))]  # rounding could leave the share out


def calibration_error(differences: np.ndarray) -> float:
    """The expected calibration error of rewards that differ by these, (N,).

    A model says with probability sigmoid(|difference|) which response is the better one. Pairs are put into bins of equal width
    by that; the number is the mean distance of a bin's accuracy from its mean probability, by pairs: 0 where probabilities are
    as often right as they say (Guo et al., 2017, arXiv 1706.04599, equation 3).
    """
    says, right = 1 / (1 + np.exp(-np.abs(differences))), differences > 0
    bins = np.minimum((2 * says - 1) * BINS, BINS - 1).astype(int)
    counts = [np.bincount(bins, values, BINS) for values in (says, right)]
    return float(np.abs(counts[0] - counts[1]).sum() / len(says))


def by_margin(right: np.ndarray, margins: np.ndarray) -> list[dict[str, Any]]:
    """The accuracy of pairs in buckets of about equally many, by rising margin; empty where no pair has one.

    Equal margins are in one bucket.
    """
    known = np.flatnonzero(np.isfinite(margins))
    if not len(known):
        return []
    margins, right = margins[known], right[known]
    edges = np.unique(np.quantile(margins, np.arange(1, BUCKETS) / BUCKETS))
    bucket = np.searchsorted(edges, margins, side="left")
    members = [bucket == number for number in np.unique(bucket)]
    return [
        {"from": float(margins[m].min()), "to": float(margins[m].max()), "pairs": int(m.sum()), **accuracy(right[m])}
        for m in members
    ]


def score_quality(scores: np.ndarray, rewards: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """What `scores` say of N responses with `rewards`, (N,) each; `counts`, (prompts,), are how many responses a prompt has.

    - `mse`: the mean squared error, in squared units of the reward.
    - `pearson`, `spearman`: correlations; None where scores or rewards are all equal.
    - `pairs`: of responses to one prompt with different rewards, and where there are any the share whose better one has the
      higher score, `accuracy`, with its 95 % `accuracy_interval`.
    """
    from scipy.stats import pearsonr, spearmanr

    varied = len(scores) > 1 and np.ptp(scores) > 0 and np.ptp(rewards) > 0
    right = pairs_in_order(scores, rewards, counts)
    return {
        "mse": float(np.square(scores - rewards).mean()),
        "pearson": float(pearsonr(scores, rewards)[0]) if varied else None,
        "spearman": float(spearmanr(scores, rewards)[0]) if varied else None,
        "pairs": len(right),
        **(accuracy(right) if len(right) else {}),
    }


def pairs_in_order(scores: np.ndarray, rewards: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of each two responses to one prompt with different rewards, whether their scores are in the same order, bool (pairs,)."""
    found = [np.zeros(0, dtype=bool)]
    ends = np.cumsum(counts)
    for start, end in zip(ends - counts, ends, strict=True):
        first, second = np.triu_indices(end - start, k=1)
        of_scores, of_rewards = (values[start:end][first] - values[start:end][second] for values in (scores, rewards))
        found.append((np.sign(of_scores) == np.sign(of_rewards))[of_rewards != 0])
    return np.concatenate(found)


def step_quality(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What the `logits` say of N steps, N at least 1, with `labels` 1 for right, (N,) each.

    `accuracy` is the share of steps that are told rightly, at probability 0.5, with its 95 % `accuracy_interval`; and
    `accuracy_right_steps`, `accuracy_wrong_steps` that of the steps of each label, None where there are none.
    """
    told, right = (logits > 0) == (labels > 0.5), labels > 0.5
    of_each = {"accuracy_right_steps": told[right], "accuracy_wrong_steps": told[~right]}
    shares = {name: float(values.mean()) if len(values) else None for name, values in of_each.items()}
    return {**accuracy(told), **shares, "steps": len(told)}


def log_quality(found: dict[str, Any]) -> None:
    """Log the `quality` of the rewards, and a warning where it says that the reward model is of no use."""
    low, high = found["accuracy_interval"]
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    log.info("held out: %s", ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    log.info("held out: 95 %% interval of the accuracy %.3f to %.3f", low, high)
    for bucket in found["by_margin"]:
        log.info("held out: margin %(from).3g to %(to).3g: accuracy %(accuracy).3f of %(pairs)d pairs", bucket)
    if found["accuracy"] < POOR_ACCURACY:
        log.warning(
            "held-out accuracy %.2f is little better than chance: a policy trained on these rewards learns noise. "
            "Check the pairs' labels, the learning rate and the chat template",
            found["accuracy"],
        )


def log_scores(found: dict[str, Any]) -> None:
    """Log what `score_quality` says of each output, or `step_quality` of steps."""
    for name, numbers in found.get("heads", {"steps": found}).items():
        shown = {key: value for key, value in numbers.items() if isinstance(value, float)}
        log.info("held out: %s: %s", name, ", ".join(f"{key} {value:.3f}" for key, value in shown.items()))
