"""TRL's SFT trainer with another loss, the distance from a teacher's kept tokens, on packed rows, row by row."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from baton.models.forward import TOKENS_PER_ROW
from baton.training.config import train_in_float32
from baton.training.learnt import Outline, collate
from baton.training.measured import HeldOut, MeasuresRows, sizes_of, take_rows
from baton.training.metrics import EvaluateAtEnd
from baton.training.sharding import KeepsFloat32
from distillation.losses import LossName, divergence, with_rest
from distillation.teacher import REMEDY, Kept, check_packable


class PackedKDTrainer(MeasuresRows, KeepsFloat32, SFTTrainer):
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

    remedy = REMEDY

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
        if kwargs.get("quantization_config") is not None:
            train_in_float32(self.model)  # TRL makes QLoRA's adapters bfloat16, and keeps no float32 copy of them
        student = self.model.get_base_model() if is_peft_model(self.model) else self.model
        check_packable(student)
        take_rows(student)
        self.check_first_row(check_first_batch)
        self.train_row_by_row(*sizes_of(outline, self.model), {"tokens": outline.learnt}, tokens_per_row)
        if eval_dataset is not None:
            self.held_out = HeldOut(*sizes_of(eval_outline, self.model), tokens_per_row, Collator(eval_teacher))
            self.add_callback(EvaluateAtEnd())

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "number"]

    def measure(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
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


class Collator:
    """Makes rows of token ids one packed row (`learnt.collate`), with what the teacher says of its N learnt tokens.

    `teacher_ids` are int64 (N, K), `teacher_logps` float32 (N, K), in nats.
    """

    def __init__(self, teacher: Kept):
        self.teacher = teacher

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        ids, logps = self.teacher.of([rows[member]["number"] for member in batch["members"]])
        return {**batch, "teacher_ids": ids, "teacher_logps": logps}


def numbered(rows: Dataset) -> Dataset:
    """Rows with their number as a column, by which the teacher's tokens are found."""
    return rows.add_column("number", np.arange(len(rows)))
