"""Semi-online DPO: the pairs of a step's rollouts, and optimizer steps on them, on the packed rows of `baton.online`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from baton.drops import Drops
from baton.jsonl import Record
from baton.models.trees import Row
from baton.online.learner import Learner
from baton.online.models import Scored
from baton.online.samples import PackedGroups, Samples
from baton.online.setup import reference_logps
from baton.pairs import PairSettings, pairs_of

LOSSES = ("sigmoid", "ipo", "hinge")
TEMPERATURE = 1.0  # of the log-probabilities in the loss, as in run_dpo.py, whatever that of the sampling


class OnlineDPO:
    """DPO on the pairs of each step.

    Args:
        settings: `run_online_dpo.Arguments`.
        pairs: how pairs are chosen.
        reference: the frozen model of the loss; None: the actor without its adapter.
    """

    def __init__(self, settings: Any, pairs: PairSettings, learner: Learner, reference: Any | None):
        self.settings, self.pairs, self.learner, self.reference = settings, pairs, learner, reference
        learner.models.temperature = TEMPERATURE

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """There is no state: pairs and their order come from seed and step."""

    def step(self, records: Sequence[Record], samples: Samples, step: int) -> dict[str, float]:
        """Train on the pairs of the step's records; returns its metrics. A step without a pair trains nothing."""
        drops = Drops(quiet=True)
        pairs = list(pairs_of(((f"step {step}", record) for record in records), self.pairs, drops))
        found = {"reward": float(samples.scores.mean()), "reward_std": float(samples.scores.std(correction=0))}
        found |= {"pairs": float(len(pairs)), "pairs_left_out": float(drops.counts.total())}
        if not pairs:
            return found
        of_pairs = Samples.of([as_rollout(pair) for pair in pairs])
        of_reference = self.learner.score(of_pairs, partial(self._reference_logps))["logps"]
        of_pairs.columns["ref_logps"] = of_reference
        margin = sum(pair["margin"] for pair in pairs) / len(pairs)
        size = self.settings.pairs_per_update or len(pairs)
        order = np.random.default_rng([self.settings.seed, step]).permutation(len(pairs)).tolist()
        parts = [order[start : start + size] for start in range(0, len(pairs), size)]
        updates = [self.learner.update([(of_pairs, part, partial(self.loss_of_row, of_pairs, len(part)))]) for part in parts]
        return found | {"reward_margin": margin} | {
            name: sum(update[name] for update in updates) / len(updates) for name in updates[0]
        }  # fmt: skip

    def _reference_logps(self, row: Row) -> dict[str, Tensor]:
        return {"logps": reference_logps(self.learner, self.reference, row, TEMPERATURE)}

    def loss_of_row(self, samples: Samples, pairs: int, said: Scored, row: PackedGroups) -> tuple[Tensor, dict[str, Tensor]]:
        """A row's part of the mean loss over so many `pairs`, and of the metrics, as `learner.LossOfRow`."""
        device, settings = said.logps.device, self.settings
        lengths = samples.lengths[row.samples].to(device)
        numbers = torch.repeat_interleave(torch.arange(len(row.samples), device=device), lengths)
        zeros = torch.zeros(len(row.samples), device=device)
        of_policy = zeros.index_add(0, numbers, said.logps)
        of_reference = zeros.index_add(0, numbers, row.column(samples.columns["ref_logps"], samples.mask).to(device))
        chosen, rejected = (of_policy - of_reference)[0::2], (of_policy - of_reference)[1::2]  # in nats, (pairs of the row,)
        losses = pair_losses(chosen, rejected, lengths[0::2], lengths[1::2], settings.loss_type, settings.beta)
        loss = losses.sum() / pairs
        if settings.nll_coef:  # RPO's term on the chosen responses, per token (arXiv 2404.19733, equation 1)
            loss = loss - settings.nll_coef * (of_policy[0::2] / lengths[0::2].clamp(min=1)).sum() / pairs
        metrics = {
            "accuracy": (chosen > rejected).float().sum() / pairs,
            "margin": settings.beta * (chosen - rejected).sum() / pairs,
            "kl_on_pairs": (chosen + rejected).sum() / 2 / pairs,
            "logps_chosen": of_policy[0::2].sum() / pairs,
        }
        return loss, metrics


def pair_losses(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, kind: str, beta: float
) -> Tensor:
    """The loss of each pair, (pairs,), from log-ratios of policy and reference in nats, summed over responses.

    sigmoid: DPO (arXiv 2305.18290, equation 7). hinge: SLiC (2305.10425) on the same margin. ipo: equation 17 of 2310.12036, of
    log-ratios per token, as TRL has it. Raises ValueError for another kind.
    """
    if kind == "sigmoid":
        return -F.logsigmoid(beta * (chosen - rejected))
    if kind == "hinge":
        return F.relu(1 - beta * (chosen - rejected))
    if kind == "ipo":
        difference = chosen / chosen_lengths.clamp(min=1) - rejected / rejected_lengths.clamp(min=1)
        return (difference - 1 / (2 * beta)) ** 2
    raise ValueError(f"no loss {kind!r}, only {', '.join(LOSSES)}")


def as_rollout(pair: Record) -> Record:
    """A pair's two responses, the chosen first, as `Samples.of` takes them."""
    ids = [pair["chosen_token_ids"], pair["rejected_token_ids"]]
    return {
        "prompt_token_ids": pair["prompt_token_ids"],
        "responses": [pair["chosen"], pair["rejected"]],
        "response_token_ids": ids,
        "response_logps": [[0.0] * len(of) for of in ids],
        "finish_reasons": [pair["chosen_finish_reason"], pair["rejected_finish_reason"]],
        "rewards": [pair["chosen_reward"], pair["rejected_reward"]],
    }
