"""Warnings of the troubles that online training usually has, in words and with what helps; each is said once.

The thresholds are rules of thumb; where one is wrong for a task, the warning costs a line of the log.
"""

import logging
import math

log = logging.getLogger("baton")

MISMATCH = 0.05  # nats a token between what sampler and trainer say of the same weights
FAR = 0.5  # nats a token from the reference
COLLAPSED = 0.2  # of the first step's entropy
PATIENCE = 10  # steps that a critic may be worse than a constant

ADVICE = {
    "no number": "{name} is {value}: stop, and go back to a checkpoint with a smaller `learning_rate`",
    "mismatch": (
        "server and trainer differ by {value:.3f} nats a token in what they say of sampled tokens: are the server's dtype "
        "(`server_dtype`) and the trainer's alike? `correction_clip: 2` bounds the harm"
    ),
    "kl": "the policy is {value:.2f} nats a token from the reference: a larger `kl_coef` or a smaller `learning_rate` holds it",
    "entropy": (
        "the entropy has fallen to {value:.3f} nats a token, a fifth of the first step's: responses become alike. What helps: "
        "`clip_high` above `clip_low`, an `entropy_coef`, a larger `kl_coef`, a smaller `learning_rate`"
    ),
    "critic": (
        "the critic has been worse than a constant for 10 steps (explained variance {value:.2f}): a larger "
        "`critic_learning_rate`, `freezing_actor_steps` to warm it up, or an estimator without a critic (rloo, grpo)"
    ),
    "constant": "all rewards of this step are equal: there is nothing to learn from them; look at a file of rollouts/",
    "truncated": "{value:.0%} of the responses were cut off by length: raise `max_new_tokens`, or set a `truncation_penalty`",
}


class Trouble:
    """Looks at the metrics of one step after another."""

    def __init__(self) -> None:
        self.said: set[str] = set()
        self.first_entropy: float | None = None
        self.bad_critic = 0

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Warn of what these metrics show, where it has not been said."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics.get(name, 0.0)):
                self._say(step, "no number", metrics[name], name)
        self._above(step, "mismatch", metrics.get("kl_to_sampler"), MISMATCH if not metrics.get("staleness") else math.inf)
        length = max(metrics.get("length", 1.0), 1.0)
        self._above(step, "kl", metrics["kl"] / length if "kl" in metrics else None, FAR)
        self._above(step, "truncated", metrics.get("truncated"), 0.5)
        entropy = metrics.get("entropy")
        self.first_entropy = entropy if self.first_entropy is None else self.first_entropy
        if entropy is not None and entropy < COLLAPSED * self.first_entropy:
            self._say(step, "entropy", entropy)
        explained = metrics.get("explained_variance")
        self.bad_critic = self.bad_critic + 1 if explained is not None and explained < 0 else 0
        if self.bad_critic >= PATIENCE:
            self._say(step, "critic", explained)
        if metrics.get("reward_std") == 0.0:
            self._say(step, "constant", 0.0)

    def _above(self, step: int, kind: str, value: float | None, limit: float) -> None:
        if value is not None and value > limit:
            self._say(step, kind, value)

    def _say(self, step: int, kind: str, value: float, name: str = "") -> None:
        if kind not in self.said:
            self.said.add(kind)
            log.warning("step %d: %s", step, ADVICE[kind].format(value=value, name=name))
