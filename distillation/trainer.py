"""TRL's SFT trainer with another loss, the distance from a teacher's kept tokens, on packed rows, row by row."""

import logging
import types
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from baton.models.forward import TOKENS_PER_ROW, row_scores, share_prefixes
from baton.models.logps import TokenScores
from baton.models.trees import Row
from baton.parallel import data_parallel
from baton.training.checks import check_packing
from baton.training.config import train_in_float32
from baton.training.dealing import deal, model_size, rows_of_shares, tree_costs, tree_tokens
from baton.training.metrics import EvaluateAtEnd
from baton.training.sharding import KeepsFloat32
from baton.training.steps import TrainsRowByRow
from distillation.losses import LossName, divergence, with_rest
from distillation.packing import cut, learnt_rows
from distillation.teacher import REMEDY, Kept, Outline, check_packable

log = logging.getLogger("baton")


class PackedKDTrainer(TrainsRowByRow, KeepsFloat32, SFTTrainer):
    """Trains a student on `kd_coef * divergence + (1 - kd_coef) * NLL`, a mean over learnt tokens, in packed rows.

    The weights are OpenRLHF's. An expert model's loss that balances its router is not added.

    Args:
        train_dataset, eval_dataset: rows of `input_ids` and `labels`; of each the `Outline` and what the teacher says of it.
        whole: whether the kept tokens are the whole vocabulary, of teacher and student, so that nothing is left of 1.
        beta: of `jensen_shannon`.
        tokens_per_row: most tokens of a packed row, unless a single row of token ids has more.
        check_first_batch: compare the first batch's packed log-probabilities with those of the model's own forward
            pass; None: on a GPU, whose kernels no test has seen.
    Raises:
        InputError: the student cannot take packed rows; `train()`: the first batch's log-probabilities differ.
    """

    mean_over = "tokens"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        *,
        args: SFTConfig,
        train_dataset: Dataset,
        outline: Outline,
        teacher: Kept,
        whole: bool,
        loss: LossName = "forward_kl",
        beta: float = 0.5,
        kd_coef: float = 0.4,
        eval_dataset: Dataset | None = None,
        eval_outline: Outline | None = None,
        eval_teacher: Kept | None = None,
        tokens_per_row: int = TOKENS_PER_ROW,
        check_first_batch: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            model=model,
            args=args,
            train_dataset=numbered(train_dataset),
            eval_dataset=None if eval_dataset is None else numbered(eval_dataset),
            data_collator=Collator(teacher),
            **kwargs,
        )
        self._distance, self._kd_coef, self._whole = divergence(loss, beta), kd_coef, whole
        self._tokens_per_row = tokens_per_row
        if kwargs.get("quantization_config") is not None:
            train_in_float32(self.model)  # TRL makes QLoRA's adapters bfloat16, and keeps no float32 copy of them
        take_rows(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        self._check_next_batch = self.accelerator.device.type == "cuda" if check_first_batch is None else check_first_batch
        costs, tokens = self._sizes(outline)
        self.train_row_by_row(costs, tokens, {"tokens": outline.learnt}, tokens_per_row)
        if eval_dataset is not None:
            self._held_out = eval_outline, Collator(eval_teacher)
            self.add_callback(EvaluateAtEnd())

    def _sizes(self, outline: Outline) -> tuple[np.ndarray, np.ndarray]:
        """What each row costs, and its tokens in a packed row, int64 (rows,) each."""
        lengths = outline.prompts, outline.responses[:, None]
        return tree_costs(*lengths, model_size(self.model)), tree_tokens(*lengths)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "number"]

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self._check_next_batch:
            self._check_next_batch = False
            first = inputs["rows"][0]
            from_first = ((first["labels"] != -100).cumsum(dim=1) > 0) & (first["attention_mask"] > 0)
            check_packing(self, model, {**first, "completion_mask": from_first.long()}, REMEDY)
        return super().training_step(model, inputs, *args, **kwargs)

    def loss_of_row(self, model: Any, inputs: dict[str, Any], shares: dict[str, float]) -> Tensor:
        """The mean loss over a row's learnt tokens, with its metrics."""
        loss, metrics = self._measure(model, inputs)
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        return loss

    def _measure(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The mean loss over the learnt tokens of a packed row, and the means of what is logged.

        - `kd_loss`: the divergence; `nll`, `teacher_nll`: what student and teacher say of the learnt tokens; nats a token.
        - `top1_agreement`: share of positions at which student and teacher have the same likeliest token.
        - `covered_mass`: probability that the teacher gives to its kept tokens.
        - `entropy`: the student's, in nats.
        """
        row, ids, teacher = inputs["row"], inputs["teacher_ids"], inputs["teacher_logps"]
        scores = model(row=replace(row, targets=ids))
        learnt = (ids == row.targets.to(ids.device)[:, None]).int().argmax(dim=1, keepdim=True)  # (N, 1)
        student, kept = scores.log_probs, teacher
        if not self._whole:
            student, kept = with_rest(student), with_rest(kept)
        distance = self._distance(kept, student).mean()
        nll = -scores.log_probs.gather(1, learnt).mean()
        numbers = {
            "kd_loss": distance,
            "nll": nll,
            "teacher_nll": -teacher.gather(1, learnt).mean(),
            "top1_agreement": scores.is_top1[:, 0].float().mean(),
            "covered_mass": teacher.exp().sum(dim=1).mean(),
            "entropy": scores.entropy.mean(),
        }
        values = torch.stack([value.detach() for value in numbers.values()]).tolist()
        return self._kd_coef * distance + (1 - self._kd_coef) * nll, dict(zip(numbers, values, strict=True))

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The loss and the metrics as means over all learnt tokens of the held-out rows, in packed rows, each counted once."""
        outlined, collate = self._held_out
        share, model = data_parallel(), self.model_wrapped
        costs, tokens = self._sizes(outlined)
        rows = rows_of_shares(deal(costs.tolist(), share.size), tokens.tolist(), self._tokens_per_row)[share.rank]
        sums: dict[str, float] = defaultdict(float)
        model.eval()
        for members in rows:  # as many in every process; those without members only fill
            inputs = self._prepare_inputs(collate(self.eval_dataset.__getitems__(members or [0])))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, metrics = self._measure(model, inputs)
            learnt = len(inputs["row"].targets) if members else 0
            for name, value in {"loss": float(loss), **metrics, "tokens": 1.0}.items():
                sums[name] += value * learnt
        values = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.accelerator.device)
        means = dict(zip(sums, self.accelerator.reduce(values, "sum").tolist(), strict=True))
        every = means.pop("tokens")
        found = {f"{metric_key_prefix}_{name}": value / every for name, value in means.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=found, num_samples=len(outlined.learnt))


class Collator:
    """Makes rows of token ids one packed row, with what the teacher says of its learnt tokens.

    `input_ids`, `attention_mask`, `labels` are int64 (B, L), padded on the right; `row` is the packed row, whose N scored
    tokens are the learnt ones; `teacher_ids` are int64 (N, K), `teacher_logps` float32 (N, K), in nats.
    """

    def __init__(self, teacher: Kept):
        self.teacher = teacher

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        cuts = [cut(row["input_ids"], row["labels"]) for row in rows]
        ((packed, members),) = learnt_rows(cuts, None)
        ids, logps = self.teacher.of([rows[member]["number"] for member in members])
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], 0),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": _padded([row["labels"] for row in rows], -100),
            "row": packed,
            "teacher_ids": ids,
            "teacher_logps": logps,
        }


def _padded(sequences: list[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def numbered(rows: Dataset) -> Dataset:
    """Rows with their number as a column, by which the teacher's tokens are found."""
    return rows.add_column("number", np.arange(len(rows)))


def take_rows(model: PreTrainedModel) -> None:
    """Make `model(row=…)` give the scores of a packed row's targets, with gradients, in place; see `forward.share_prefixes`.

    Raises InputError where the architecture cannot take packed rows.
    """
    check_packable(model)
    share_prefixes(model)
    others = model.forward

    def forward(self, *args: Any, row: Row | None = None, **kwargs: Any) -> TokenScores | Any:
        return others(*args, **kwargs) if row is None else row_scores(self, row)

    model.forward = types.MethodType(forward, model)
