"""TRL's DPO trainer with another forward pass, packed trees instead of a padded batch, row by row.

Configuration, losses, metrics, callbacks and checkpoints are TRL's own code; `forward.share_prefixes`
replaces only what `model(…, fused_lm_head=True)` computes, so every loss type sees the numbers it would have
seen. Further losses (`own_losses.py`) are added to TRL's, from the same forward pass. What processes and rows a
step's pairs are divided among is `steps.py`'s.
"""

import logging
import time

import numpy as np
import pyarrow.compute
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from baton.errors import InputError
from baton.models.forward import TOKENS_PER_ROW, obstacle, sequences_of, share_prefixes
from baton.models.router import balance_of
from baton.models.trees import distinct_tokens
from baton.training.arguments import Compile
from baton.training.checks import check_packing
from baton.training.config import train_in_float32
from baton.training.dealing import model_size, tree_costs, tree_tokens
from baton.training.metrics import EvaluateAtEnd, LineOfMetrics, WarnOfTrouble, kl_on_pairs, peak_flops, weights_of
from baton.training.sharding import KeepsFloat32
from baton.training.steps import TrainsRowByRow, needs_its_own_batches
from dpo_iteration.losses import OF_MARGINS, OVER_TOKENS, OWN_LOSSES, LossNumbers, is_reference_free, over_a_batch
from dpo_iteration.margin import check_offset, with_column
from dpo_iteration.own_losses import LOSSES, Pairs, check_own_losses, mean_loss, offset_difference, optimism, pairs_said
from dpo_iteration.xpo import COLUMN

log = logging.getLogger("baton")

TOKEN_COLUMNS = {"prompt_ids", "chosen_ids", "rejected_ids"}
REFERENCE_COLUMNS = {"ref_chosen_logps", "ref_rejected_logps"}

# TRL's metrics that are means over tokens, by the amount of the step that they count; all others are means over pairs.
MEANS_OVER_TOKENS = {
    "entropy": "tokens", "logits/chosen": "chosen_tokens", "logits/rejected": "rejected_tokens",
    "mean_token_accuracy": "chosen_tokens", "aux_loss": "router_tokens",
}  # fmt: skip

# Where packed log-probabilities are not the model's own:
REMEDY = "Train with `--forward trl`: padded batches and the model's own attention"


class PackedDPOTrainer(TrainsRowByRow, KeepsFloat32, DPOTrainer):
    """`trl.DPOTrainer` on packed rows of prefix-sharing trees, a forward and backward pass for each row.

    A loss that is no sum over rows takes the whole batch of a process in one pass (`losses.over_a_batch`); so does an optimizer
    that steps in the backward pass. The log says so. The loss that balances the router of a mixture of experts (`aux_loss`) is
    one of each row's tokens, and a step's their mean by these.

    Takes what `trl.DPOTrainer` takes, and rows that are already tokenised: `prompt_ids`, `chosen_ids`,
    `rejected_ids` (lists of token ids, used as they are), optionally `ref_chosen_logps` and
    `ref_rejected_logps` (summed log-probabilities in nats; then no reference model is loaded), `margin`
    (chosen reward minus rejected reward) and `reference_is_chosen` (`xpo.py`). Where the loss has no reference, no such
    columns are needed.

    Args:
        tokens_per_row: most tokens of one packed row, but for a pair that alone is longer; None: one row for the whole
            batch of a process.
        margin_scale: the `sigmoid` loss becomes -log sigmoid(beta * logratio difference - margin_scale *
            margin).
        numbers: of the losses that are not TRL's, and of what is added to `sigmoid` (`own_losses.py`). XPO's term is for the
            data that is trained on; evaluations are without.
        packed: False for TRL's own forward pass on the same rows, for comparison.
        compile_layers: whether the layers of packed rows are compiled (`compiling.py`).
        check_first_batch: compare the first batch's packed log-probabilities with those of the model's own forward
            pass; None: on a GPU, whose kernels no test has seen.
    Raises:
        InputError: `margin_scale`, `length_alpha` or `xpo_alpha` with a loss that has no such term; settings that one of the
            losses does not go with; a missing column; `train()`: the first batch's log-probabilities differ.
    """

    mean_over = "pairs"
    shares_of_metrics = MEANS_OVER_TOKENS
    _fills = False  # whether the row at hand changes nothing

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        *,
        args: DPOConfig,
        train_dataset: Dataset,
        tokens_per_row: int | None = TOKENS_PER_ROW,
        margin_scale: float = 0.0,
        numbers: LossNumbers | None = None,
        packed: bool = True,
        compile_layers: Compile = "off",
        check_first_batch: bool | None = None,
        **kwargs,
    ):
        self._tokens_per_row = tokens_per_row
        numbers = numbers or LossNumbers()
        self._margin_scale, self._numbers = margin_scale, numbers
        self._packed = packed
        self._forward_replaced = False
        self._token_counts = None
        check_offset(args, "margin_scale", margin_scale)
        check_offset(args, "length_alpha", numbers.length_alpha)
        check_offset(args, "xpo_alpha", numbers.xpo_alpha)
        check_own_losses(args, numbers, margin_scale)
        self._reads_margin = bool(margin_scale) or not OF_MARGINS.isdisjoint(args.loss_type)
        self._has_offset = bool(margin_scale or numbers.length_alpha)
        self._has_terms = self._has_offset or bool(numbers.xpo_alpha) or not set(OWN_LOSSES).isdisjoint(args.loss_type)
        self._reference_free = is_reference_free(args.loss_type)
        if self._has_terms or set(train_dataset.column_names or ()) >= REFERENCE_COLUMNS:
            # TRL's name for: the reference's log-probabilities stand in the rows. It computes those that do not yet.
            args.precompute_ref_log_probs = True
        if self._reads_margin and "margin" not in train_dataset.column_names:
            needs = "margin_scale" if margin_scale else f"loss_type {', '.join(args.loss_type)}"
            raise InputError(f"{needs} needs a `margin` in every row: chosen reward minus rejected reward")
        if numbers.xpo_alpha and COLUMN not in train_dataset.column_names:
            raise InputError(f"xpo_alpha needs `{COLUMN}` in every row: which response is the reference's")
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        if kwargs.get("quantization_config") is not None:
            train_in_float32(self.model)  # TRL makes QLoRA's adapters bfloat16, and keeps no float32 copy of them
        if self._reads_margin:
            self.data_collator = with_column(self.data_collator, "margin", torch.float32)
        if numbers.xpo_alpha:
            self.data_collator = with_column(self.data_collator, COLUMN, torch.bool)
        self._replace_forward()
        wanted = self.accelerator.device.type == "cuda" if check_first_batch is None else check_first_batch
        self._check_next_batch = wanted and self._token_counts is not None
        adapted = is_peft_model(self.model)
        weights = weights_of(self.model.get_base_model() if adapted else self.model)
        self._line = LineOfMetrics(weights, passes=2 if adapted else 3, peak=peak_flops(self.accelerator.device))
        if packed:
            lengths = self._lengths()
            costs = tree_costs(*lengths, model_size(self.model))
            if self._token_counts is None and compile_layers == "on":
                raise InputError("`compile`: on, but this model's batches are padded, which is not compiled; leave it out")
            if self._token_counts is not None:
                in_4_bit = kwargs.get("quantization_config") is not None
                self.compile_layers(compile_layers, costs, in_4_bit, self.aux_loss_enabled)
            self._divide_steps(costs, *lengths)
        plain = self.loss_types == ["sigmoid"] and not self._has_terms and not self.use_weighting
        if self.eval_dataset is not None:
            self.add_callback(EvaluateAtEnd())
        if not self._reference_free:  # batches differ more in their responses than a policy changes
            self.add_callback(WarnOfTrouble(self.beta, starts_at_ln_2=plain and self.loss_weights == [1.0]))

    def _replace_forward(self) -> None:
        """Pack the forward passes of policy and in-memory reference, where the architecture allows it."""
        if self._forward_replaced or not self._packed:
            return
        self._forward_replaced = True
        self._policy = policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        reason = why_padded(self.model)
        if reason:
            log.warning("%s: %s, so batches are padded (TRL's own forward pass)", type(policy).__name__, reason)
            return
        self._token_counts = share_prefixes(policy, self._tokens_per_row)
        if self.ref_model is not None:
            share_prefixes(self.accelerator.unwrap_model(self.ref_model), self._tokens_per_row)

    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each pair's prompt, int64 (N,), and of its responses, int64 (N, 2), the chosen first."""
        columns = [f"{part}_ids" for part in ("prompt", "chosen", "rejected")]
        ids = self.train_dataset.select_columns(columns).with_format("arrow")[:]
        lengths = (pyarrow.compute.list_value_length(ids.column(name)).to_numpy().astype(np.int64) for name in columns)
        prompts, chosen, rejected = lengths
        return prompts, np.stack([chosen, rejected], axis=1)

    def _divide_steps(self, costs: np.ndarray, prompts: np.ndarray, responses: np.ndarray) -> None:
        """Have each optimizer step's pairs dealt to processes and rows by what they cost, where the loss is a sum over rows."""
        if self._token_counts is None:
            return  # padded, whose memory the size of a process's batch bounds
        reason = needs_whole_batches(self.model, self.args)
        if reason:
            log.warning("%s, so each process computes its whole batch in one pass, whatever `tokens_per_row`", reason)
            return
        chosen, rejected = responses.T
        amounts = {
            "pairs": np.ones(len(costs)), "chosen_tokens": chosen, "rejected_tokens": rejected, "tokens": chosen + rejected,
            "router_tokens": 2 * prompts + chosen + rejected,
        }  # fmt: skip
        # The router's loss reads the last token of a response too.
        tokens = tree_tokens(prompts, responses + self.aux_loss_enabled)
        self.train_row_by_row(costs, tokens, amounts, self._tokens_per_row)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if set(dataset.column_names or ()) >= TOKEN_COLUMNS:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in ("margin", COLUMN) if name not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if set(dataset.column_names) >= REFERENCE_COLUMNS:
            return dataset
        if self._reference_free:
            zeros = np.zeros(len(dataset), dtype=np.float32)  # TRL subtracts them; nothing that is logged is made of them
            return dataset.add_column("ref_chosen_logps", zeros).add_column("ref_rejected_logps", zeros)
        self._replace_forward()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def train(self, *args, **kwargs):
        self._line.start()
        return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """TRL's, which leaves the training as it is: its random numbers and its speed do not count the evaluation."""
        begun = time.perf_counter()
        with torch.random.fork_rng([self.accelerator.device] if self.accelerator.device.type == "cuda" else []):
            metrics = super().evaluate(*args, **kwargs)
        self._line.since += time.perf_counter() - begun
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            logs.update(self._line.line(self.accelerator))
        super().log(logs, start_time)

    def training_step(self, model, inputs, *args, **kwargs):
        if self._check_next_batch:
            self._check_next_batch = False
            check_packing(self, model, inputs["rows"][0] if "rows" in inputs else inputs, REMEDY)
        return super().training_step(model, inputs, *args, **kwargs)

    def loss_of_row(self, model, inputs, shares):
        """TRL's loss of a row: the mean over chosen tokens counts by these, the router's by all, every other term by pairs."""
        types, weights, self._fills = self.loss_types, self.loss_weights, not shares["pairs"]
        coefficient = self.router_aux_loss_coef
        self.router_aux_loss_coef *= shares["router_tokens"] / shares["pairs"] if shares["pairs"] else 0.0
        if OVER_TOKENS in types:
            ratio = shares["chosen_tokens"] / shares["pairs"] if shares["pairs"] else 0.0
            terms = [
                (name, weight * (ratio if name == OVER_TOKENS else 1))
                for name, weight in zip(types, weights, strict=True)
                if name != OVER_TOKENS or ratio  # without a chosen token there is no mean
            ]
            self.loss_types, self.loss_weights = zip(*(terms or [("sigmoid", 0.0)]), strict=True)
        loss = super().loss_of_row(model, inputs, shares)
        self.loss_types, self.loss_weights, self._fills = types, weights, False
        self.router_aux_loss_coef = coefficient
        return loss

    def _compute_loss(self, model, inputs, return_outputs):
        if self._has_terms:
            result = self._loss_with_terms(model, inputs, return_outputs)
        else:
            result = super()._compute_loss(model, inputs, return_outputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self.beta and not self._reference_free:
            kl = kl_on_pairs(metrics["rewards/chosen"][-1], metrics["rewards/rejected"][-1], self.beta)
            metrics["kl_on_pairs"].append(kl)
        if self.model.training:
            needed, computed = self._tokens_of(inputs)
            if self._fills:
                self._line.computed += computed
            else:
                self._line.add(inputs["completion_mask"], needed, computed)
        return result

    def _loss_with_terms(self, model, inputs, return_outputs):
        """TRL's losses and metrics, and what `own_losses.py` adds from the same forward pass."""
        margin, of_chosen = inputs.pop("margin", None), inputs.pop(COLUMN, None)
        outputs = []

        def policy(**batch):
            outputs.append(model(**batch))
            return outputs[-1]

        types, weights = self.loss_types, self.loss_weights
        every = list(zip(types, weights, strict=True))
        of_trl = [(name, weight) for name, weight in every if name not in LOSSES] or [("sigmoid", 0.0)]
        self.loss_types, self.loss_weights = zip(*of_trl, strict=True)
        result = super()._compute_loss(policy, inputs, return_outputs)
        self.loss_types, self.loss_weights = types, weights
        pairs = pairs_said(outputs[0], inputs, margin, self.ld_alpha, self.use_weighting)
        loss, numbers = result[0] if return_outputs else result, self._numbers
        for name, weight in every:
            if name in LOSSES:
                loss = loss + weight * mean_loss(LOSSES[name](pairs, self.beta, numbers), pairs)
            if name == "sigmoid" and self._has_offset:
                added = offset_difference(pairs, self.beta, self._margin_scale, numbers.length_alpha)
                loss = loss + weight * mean_loss(added, pairs)
            if name == "sigmoid" and numbers.xpo_alpha and self.model.training:
                term = mean_loss(optimism(pairs, of_chosen, numbers.xpo_alpha), pairs)
                loss = loss + weight * term
                self._metrics["train"]["loss/xpo"].append(self.accelerator.gather(term.detach()).mean().item())
        if self._reference_free:
            self._replace_rewards(pairs)
        return (loss, result[1]) if return_outputs else loss

    def _replace_rewards(self, pairs: Pairs) -> None:
        """Make TRL's metrics of rewards `beta` times what a loss without a reference compares: log-probabilities per token."""
        chosen, rejected = self.beta * pairs.chosen_mean.detach(), self.beta * pairs.rejected_mean.detach()
        better = (pairs.chosen_mean > pairs.rejected_mean).float()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in (
            ("chosen", chosen), ("rejected", rejected), ("accuracies", better), ("margins", chosen - rejected),
        ):  # fmt: skip
            metrics[f"rewards/{name}"][-1] = self.accelerator.gather(value).mean().item()

    def _tokens_of(self, inputs) -> tuple[int, int]:
        """Tokens of a batch that had to be computed, and that were."""
        if self._token_counts is not None and (not self.aux_loss_enabled or balance_of(self._policy) is not None):
            return self._token_counts.needed, self._token_counts.computed
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        sequences = sequences_of(inputs["input_ids"], inputs["attention_mask"], labels)
        return distinct_tokens(sequences), inputs["input_ids"].numel()


def needs_whole_batches(model: torch.nn.Module, config: DPOConfig) -> str | None:
    """Why a process's batch of packed trees cannot be computed row by row, or None where it can."""
    if names := over_a_batch(config.loss_type, config.use_weighting):
        return f"loss_type {', '.join(names)} compares the pairs of a batch"
    return needs_its_own_batches(model, config)


def why_padded(model: torch.nn.Module) -> str | None:
    """Why a policy, or its adapter's wrapper, cannot take packed trees, or None where it can."""
    if _has_virtual_tokens(model):
        return "its prompt tuning adds virtual tokens"
    return obstacle(model.get_base_model() if is_peft_model(model) else model)


def _has_virtual_tokens(model) -> bool:
    """Whether a PEFT model prepends learned tokens (prompt and prefix tuning)."""
    return is_peft_model(model) and any(config.is_prompt_learning for config in model.peft_config.values())
