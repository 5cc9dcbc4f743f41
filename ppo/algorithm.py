"""One step of PPO and its kin: from a step's samples to advantages, and from those to optimizer steps.

The parts are named in the field's terms and can be combined: an estimator of advantages, a clipped loss, a KL penalty in the
reward or in the loss. `advantages.py`, `losses.py` and `shaping.py` have the formulas and their sources.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.jsonl import Record
from baton.models.trees import Row
from baton.online.learner import Learner
from baton.online.models import Scored
from baton.online.samples import PackedGroups, Samples
from baton.online.setup import reference_logps
from ppo import advantages, losses, shaping

log = logging.getLogger("baton")


class Algorithm:
    """What is between rollouts and optimizer steps. Its state is that of a checkpoint: `state()` and `load()`.

    Args:
        settings: `run_ppo.Arguments`.
        reference: the frozen model whose log-probabilities the KL is taken to; None: the actor without its adapter.
        demonstrations: samples whose likelihood the `ptx` loss raises; None: there is no such loss.
    """

    def __init__(self, settings: Any, learner: Learner, reference: Any | None, demonstrations: Samples | None = None):
        self.settings, self.learner, self.reference = settings, learner, reference
        self.demonstrations = demonstrations
        self.kl = losses.AdaptiveKL(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        self.moments = shaping.NO_SCORES

    def state(self) -> dict[str, Any]:
        return {"kl": self.kl.state(), "moments": self.moments}

    def load(self, state: dict[str, Any]) -> None:
        self.kl.load(state["kl"])
        self.moments = state["moments"]

    def step(self, records: Sequence[Record], samples: Samples, step: int) -> dict[str, float]:
        """Train on the samples of a step's records; returns its metrics. All processes call this with the same samples."""
        scores = self.shaped(samples)
        self.add_columns(samples)
        self.add_advantages(samples, scores)
        metrics = self.of_samples(samples, scores)
        updates = [self.update(samples, groups, step) for groups in self.mini_batches(len(samples.prompts), step)]
        metrics |= {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        if "ref_logps" in samples.columns:
            self.kl.update(metrics["kl"], len(samples.responses))
        return metrics | {"kl_coef": self.kl.coefficient}

    def shaped(self, samples: Samples) -> Tensor:
        """The scores that advantages are computed from, (B,): bounded, penalised for length, normalised."""
        settings = self.settings
        scores = shaping.clip(samples.scores, *(settings.reward_clip or (None, None)))
        reasons = ["stop" if stopped else "length" for stopped in samples.stopped]
        scores = shaping.truncation_penalty(scores, reasons, settings.truncation_penalty)
        scores = shaping.length_penalty(scores, samples.lengths, settings.length_penalty)
        if settings.overlong_buffer:
            longest, buffer = settings.max_new_tokens, settings.overlong_buffer
            scores = shaping.overlong_penalty(scores, samples.lengths, longest, buffer, settings.overlong_penalty)
        if settings.normalize_reward == "running":
            self.moments = shaping.with_scores(self.moments, scores)
            scores = shaping.normalised(scores, self.moments)
        elif settings.normalize_reward == "prompt":
            scores = shaping.normalised_by_prompt(scores, samples.groups)
        return scores

    def add_columns(self, samples: Samples) -> None:
        """What models say of the samples before they are trained on them: reference, and where needed critic and actor."""
        if self.uses_reference:
            samples.columns["ref_logps"] = self.learner.score(samples, self.reference_logps)["logps"]
        several = self.updates_per_step(len(samples.prompts)) > 1
        if several or self.learner.models.critic is not None:
            found = self.learner.own_scores(samples, of_actor=several)
            samples.columns |= {"old_" + name: column for name, column in found.items()}

    @property
    def uses_reference(self) -> bool:
        return self.settings.kl_coef > 0 or self.settings.kl_target is not None

    def reference_logps(self, row: Row) -> dict[str, Tensor]:
        """The reference's log-probabilities of a row's scored tokens, at the temperature of the sampling."""
        return {"logps": reference_logps(self.learner, self.reference, row, self.settings.temperature)}

    def add_advantages(self, samples: Samples, scores: Tensor) -> None:
        """The columns `advantages` and, with a critic, `returns`."""
        settings, mask = self.settings, samples.mask
        old = samples.columns.get("old_logps", samples.columns["sampler_logps"])
        kl = losses.kl_estimate(old, samples.columns.get("ref_logps", old), settings.kl_estimator)
        in_reward = 0.0 if settings.kl_in_loss else self.kl.coefficient
        if settings.advantage_estimator == "gae":
            rewards = advantages.token_rewards(scores, kl, mask, in_reward)
            values = samples.columns["old_values"]
            found, returns = advantages.gae(rewards, values, mask, ~samples.stopped, settings.gamma, settings.lam)
            samples.columns["returns"] = returns
        elif settings.advantage_estimator == "reinforce++":
            rewards = advantages.token_rewards(scores, kl, mask, in_reward)
            found = advantages.reinforce_pp(rewards, mask, settings.gamma)
        else:  # of whole responses, so the penalty is the response's too
            scores = scores - in_reward * (kl * mask).sum(dim=1)
            groups = samples.groups
            of_samples = {
                "rloo": partial(advantages.rloo, scores, groups),
                "grpo": partial(advantages.grpo, scores, groups),
                "dr_grpo": partial(advantages.grpo, scores, groups, scale=False),
            }[settings.advantage_estimator]()
            found = advantages.spread(of_samples, mask)
        samples.columns["advantages"] = advantages.whitened(found, mask) if settings.whiten_advantages else found

    def updates_per_step(self, prompts: int) -> int:
        return self.settings.num_ppo_epochs * -(-prompts // (self.settings.prompts_per_update or prompts))

    def mini_batches(self, prompts: int, step: int) -> list[list[int]]:
        """The groups of each optimizer step, shuffled anew for each pass over the samples."""
        size = self.settings.prompts_per_update or prompts
        found = []
        for epoch in range(self.settings.num_ppo_epochs):
            order = np.random.default_rng([self.settings.seed, step, epoch]).permutation(prompts).tolist()
            found += [order[start : start + size] for start in range(0, prompts, size)]
        return found

    def update(self, samples: Samples, groups: Sequence[int], step: int) -> dict[str, float]:
        """One optimizer step on these groups."""
        weights, tokens = self.token_weights(samples, groups)
        frozen = step <= self.settings.freezing_actor_steps
        loss_of_row = partial(self.loss_of_row, samples, weights, tokens, not frozen)
        parts = [(samples, groups, loss_of_row)]
        if self.demonstrations is not None:
            many = min(self.settings.ptx_batch_size, len(self.demonstrations.prompts))
            chosen = np.random.default_rng([self.settings.seed, step, groups[0]]).choice(
                len(self.demonstrations.prompts), many, replace=False
            )
            scored = sum(len(self.demonstrations.responses[number]) for number in chosen)
            parts.append((self.demonstrations, chosen.tolist(), partial(self.ptx_of_row, scored)))
        return self.learner.update(parts, frozen)

    def token_weights(self, samples: Samples, groups: Sequence[int]) -> tuple[Tensor, int]:
        """What each token counts in the actor's loss, (B, T), and the response tokens of these groups.

        `tokens`: all alike. `responses`: all responses alike, whatever their lengths. `constant`: as tokens of responses that
        all have `max_new_tokens` (Dr. GRPO, arXiv 2503.20783).
        """
        chosen = torch.isin(samples.groups, torch.tensor(groups))
        mask = samples.mask & chosen[:, None]
        tokens = int(mask.sum())
        if self.settings.loss_mean == "tokens":
            return mask / tokens, tokens
        if self.settings.loss_mean == "constant":
            return mask / (int(chosen.sum()) * self.settings.max_new_tokens), tokens
        return mask / samples.lengths.clamp(min=1)[:, None] / int(chosen.sum()), tokens

    def loss_of_row(
        self, samples: Samples, weights: Tensor, tokens: int, trains_actor: bool, said: Scored, row: PackedGroups
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A row's part of the loss and of the metrics, as `learner.LossOfRow`."""
        settings, device = self.settings, said.logps.device

        def column(name: str) -> Tensor:
            return row.column(samples.columns[name], samples.mask).to(device)

        weight, mean = row.column(weights, samples.mask).to(device), 1 / tokens
        sampler = column("sampler_logps")
        old = column("old_logps") if "old_logps" in samples.columns else said.logps.detach()
        sequences = torch.repeat_interleave(samples.lengths[row.samples]).to(device)
        new, before = said.logps, old
        if settings.ratio == "sequence":
            new, before = losses.sequence_ratio(said.logps, old, sequences), torch.zeros_like(old)
        each, clipped = losses.policy_loss(
            new, before, column("advantages"), settings.clip_low, settings.clip_high or settings.clip_low, settings.dual_clip
        )
        trusted = torch.ones_like(old)
        if settings.correction_clip:
            trusted = losses.importance_weights(old, sampler, settings.correction_clip)
        if settings.correction_mask:
            trusted = trusted * losses.sequence_mask(old, sampler, sequences, *settings.correction_mask)
        policy = (weight * trusted * each).sum()
        entropy = (weight * said.entropy).sum()
        loss = policy - settings.entropy_coef * entropy
        metrics = {
            "policy_loss": policy,
            "entropy": mean * said.entropy.sum(),
            "clipped": mean * clipped.sum(),
            "kl_to_sampler": mean * (old - sampler).abs().sum(),
            "kl_to_old": mean * losses.kl_estimate(said.logps, old, "k3").sum(),
        }
        if settings.correction_clip or settings.correction_mask:
            metrics["trusted"] = mean * trusted.sum()
        if settings.kl_in_loss and "ref_logps" in samples.columns:
            kl = losses.kl_estimate(said.logps, column("ref_logps"), settings.kl_estimator)
            loss = loss + self.kl.coefficient * (weight * kl).sum()
        if not trains_actor:
            loss = 0.0 * loss
        if said.values is not None:
            of_values, held = losses.value_loss(said.values, column("old_values"), column("returns"), settings.value_clip)
            loss = loss + settings.value_coef * mean * of_values.sum()
            metrics |= {"value_loss": mean * of_values.sum(), "value_clipped": mean * held.sum()}
        return loss, metrics

    def ptx_of_row(self, scored: int, said: Scored, row: PackedGroups) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative log-likelihood of demonstrations, mean over tokens (InstructGPT, arXiv 2203.02155, equation 2)."""
        loss = -said.logps.sum() / scored
        unused = 0.0 if said.values is None else 0.0 * said.values.sum()
        return self.settings.ptx_coef * loss + unused, {"ptx_loss": loss}

    def of_samples(self, samples: Samples, scores: Tensor) -> dict[str, float]:
        """Metrics of the samples before they are trained on."""
        mask, columns = samples.mask, samples.columns
        found = {"reward": samples.scores.mean(), "reward_std": samples.scores.std(correction=0)}
        if not torch.equal(scores, samples.scores):
            found["reward_shaped"] = scores.mean()
        if "ref_logps" in columns:  # of a whole response, in nats
            old = columns.get("old_logps", columns["sampler_logps"])
            found["kl"] = ((old - columns["ref_logps"]) * mask).sum(dim=1).mean()
        given = columns["advantages"][mask]
        found |= {"advantage_mean": given.mean(), "advantage_std": given.std(correction=0)}
        if "old_values" in columns:
            found["explained_variance"] = losses.explained_variance(columns["old_values"], columns["returns"], mask)
        return {name: float(value) for name, value in found.items()}
