"""Distances from a student's distribution over the next token to its teacher's, on some tokens and what is left of 1.

Log-probabilities are float32 in nats, one column for each of the teacher's kept tokens. Where they are not the whole
vocabulary, `with_rest` adds one column for all other tokens together. To lump tokens together never makes a divergence larger,
and it stays 0 where the student equals the teacher.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

LossName = Literal["forward_kl", "reverse_kl", "jensen_shannon"]

LEAST_REST = 1e-6  # of the probability: below it, float32 sums of the others are no longer exact


def with_rest(log_probs: Tensor) -> Tensor:
    """Log-probabilities (N, K) of some tokens with that of all others in a last column, ln(1 - sum p); (N, K + 1).

    It is at least ln 1e-6, and then without a gradient.
    """
    rest = 1 - log_probs.exp().sum(dim=-1, keepdim=True)
    return torch.cat([log_probs, rest.clamp_min(LEAST_REST).log()], dim=-1)


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p || q) = sum p (ln p - ln q) of teacher p and student q, (N, K) each; (N,).

    Hinton et al., 2015, arXiv 1503.02531, as in OpenRLHF's `train_kd.py`, whose loss is this plus the teacher's entropy,
    which has no gradient.
    """
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(q || p) = sum q (ln q - ln p) of teacher p and student q, (N, K) each; (N,).

    The divergence of MiniLLM, arXiv 2306.08543, token by token: what a token does to later ones is left out.
    """
    return (student.exp() * (student - teacher)).sum(dim=-1)


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), with m = beta p + (1 - beta) q, of teacher p and student q; (N,).

    GKD, arXiv 2306.13649, equation 1; 0 < beta < 1. Near 0 it acts as the forward KL, near 1 as the reverse one.
    """
    weight = torch.tensor([beta, 1 - beta]).log().tolist()
    mixture = torch.logaddexp(teacher + weight[0], student + weight[1])
    return beta * forward_kl(teacher, mixture) + (1 - beta) * forward_kl(student, mixture)


def divergence(name: LossName, beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of this name, a function of teacher and student; `beta` is that of `jensen_shannon`."""
    if name == "jensen_shannon":
        return lambda teacher, student: jensen_shannon(teacher, student, beta)
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[name]
