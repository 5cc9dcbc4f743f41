"""What the rewards look like: mean, best of K, spread within prompts, ties, and whether reward follows length."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Summary:
    """Sums over annotated records, one `add` each; memory does not grow."""

    prompts: int = 0
    responses: int = 0
    best: float = 0.0
    spread: float = 0.0
    pairs: int = 0
    ties: int = 0
    moments: list[float] = field(default_factory=lambda: [0.0] * 5)  # of reward r and length n: r, n, rr, nn, rn
    lowest: float = math.inf
    highest: float = -math.inf

    def add(self, responses: list[str], rewards: list[float]) -> None:
        """Count one prompt's K responses and rewards."""
        K, mean = len(rewards), sum(rewards) / len(rewards)
        self.prompts += 1
        self.responses += K
        self.best += max(rewards)
        self.spread += math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / K)
        self.pairs += K * (K - 1) // 2
        self.ties += sum(rewards[i] == rewards[j] for i in range(K) for j in range(i))
        self.lowest, self.highest = min(self.lowest, *rewards), max(self.highest, *rewards)
        for reward, response in zip(rewards, responses, strict=True):
            terms = (reward, len(response), reward * reward, len(response) ** 2, reward * len(response))
            self.moments = [moment + term for moment, term in zip(self.moments, terms, strict=True)]

    def numbers(self) -> dict[str, Any]:
        """The summary as plain numbers, in units of the reward; lengths are characters. None where undefined."""
        if not self.responses:
            return {"prompts": 0, "responses": 0}
        r, n, rr, nn, rn = (moment / self.responses for moment in self.moments)
        deviations = math.sqrt(max(rr - r * r, 0.0) * max(nn - n * n, 0.0))
        return {
            "prompts": self.prompts,
            "responses": self.responses,
            "mean": r,
            "standard_deviation": math.sqrt(max(rr - r * r, 0.0)),
            "lowest": self.lowest,
            "highest": self.highest,
            "best_of_K_mean": self.best / self.prompts,
            "spread_within_prompts": self.spread / self.prompts,
            "share_of_ties": self.ties / self.pairs if self.pairs else None,
            "correlation_with_length": (rn - r * n) / deviations if deviations > 1e-12 else None,
            "length_mean": n,
        }
