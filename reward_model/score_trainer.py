"""A reward model that learns numbers, or which steps are right, on packed rows in which all responses share their prompt."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed
from transformers.trainer_utils import EvalLoopOutput
from trl import RewardConfig
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import create_model_from_path

from baton.errors import InputError
from baton.training.adapters import settings_of_outputs
from baton.training.arguments import Compile
from reward_model.packing import collate_scores, lengths_of_scores
from reward_model.quality import score_quality, step_quality
from reward_model.trainer import PackedRewardTrainer

# The loss of outputs and targets, (N, outputs) each, a mean over both. `process`: a step's output is the logit of "right".
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "regression": F.mse_loss,
    "process": F.binary_cross_entropy_with_logits,
}


class PackedScoreTrainer(PackedRewardTrainer):
    """`PackedRewardTrainer` with the loss of `LOSSES` instead, a mean over all places of a step that are read.

    `regression` is the mean squared error of scores against rewards, in their units (HelpSteer2, Wang et al., 2024, arXiv
    2406.08673); `process` the binary cross-entropy of steps (Lightman et al., 2023, arXiv 2305.20050; Wang et al., 2024, arXiv
    2312.08935). After an evaluation `rewards` are the outputs at all places of `eval_dataset`, float64 (N, outputs).

    Args:
        loss_type: a name in `LOSSES`.
        outputs: the names of the model's outputs; None: it has one without a name.
        train_dataset, eval_dataset: rows of `score_rows.row_of`.
    Raises:
        InputError: the model takes no packed rows.
    """

    mean_over = "reads"

    def __init__(
        self,
        model: str,
        *,
        args: RewardConfig,
        loss_type: Literal["regression", "process"],
        outputs: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        loaded = load(model, args, outputs, kwargs.get("quantization_config"))
        named = loaded.config.id2label, loaded.config.label2id
        # TRL takes a model that says that it has one output, and warns of settings that are for loading.
        loaded.config.num_labels = 1
        given, args.model_init_kwargs = args.model_init_kwargs, None
        super().__init__(loaded, args=args, **kwargs)
        args.model_init_kwargs = given
        loaded.config.id2label, loaded.config.label2id = named
        self.loss_type, self.outputs = loss_type, outputs

    def stay_padded(self, model: PreTrainedModel, reason: str, how: Compile) -> NoReturn:
        raise InputError(
            f"{type(model).__name__}: {reason}, so packed rows do not suit it, and this `loss_type` has no others: choose "
            "another model or optimizer"
        )

    def collator(self, pad: int) -> Any:
        return collate_scores

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["sequences", "places", "targets", "shared"]  # what the collator reads

    def lengths_of(self, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        return lengths_of_scores(rows)

    def counts_of(self, rows: Dataset) -> np.ndarray:
        return np.array(rows["reads"][:])

    def measure(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The mean loss over a packed row's places, and what is logged."""
        outputs = self._rewards_of(model, inputs)
        loss = LOSSES[self.loss_type](outputs, inputs["targets"])
        found = outputs.detach()
        self._extremes.append(torch.stack([-found.min(), found.max()]))
        return loss, self._numbers(found, inputs["targets"])

    def _numbers(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        numbers = {"mean_reward": outputs.mean()}
        if self.loss_type == "process":
            numbers["accuracy"] = ((outputs > 0) == (targets > 0.5)).double().mean()
        return {name: float(value) for name, value in numbers.items()}

    def _rewards_of(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The outputs at the places that are read, float32 (N, outputs)."""
        return model(row=inputs["row"], at=inputs["ends"][:, 0])

    def _own_state(self, model: Any, inputs: dict[str, Any], number: int) -> Tensor:
        """The hidden state that the model's own forward pass of one conversation gives at the place `number`, (H,)."""
        sequence, place = inputs["reads"][number].tolist()
        ids = inputs["input_ids"][sequence : sequence + 1, : place + 1]
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1].float()

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The loss, and what training logs, over all held-out places, each counted once."""
        targets = targets_of(self.eval_dataset)
        starts = np.concatenate([[0], np.cumsum(self.counts_of(self.eval_dataset))])
        found = self.held_out_rewards(starts, targets.shape[1])
        wanted = torch.from_numpy(targets).to(found.device)
        numbers = {"loss": float(LOSSES[self.loss_type](found, wanted)), **self._numbers(found, wanted)}
        numbers |= {"min_reward": float(found.min()), "max_reward": float(found.max())}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in numbers.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))

    def quality(self) -> dict[str, Any]:
        """How good the outputs on the held-out rows are, after an evaluation: of steps, or of each head, by name."""
        targets, counts = targets_of(self.eval_dataset), self.counts_of(self.eval_dataset)
        if self.loss_type == "process":
            return step_quality(self.rewards[:, 0], targets[:, 0])
        columns = zip(self.outputs or ["reward"], self.rewards.T, targets.T, strict=True)
        return {"heads": {name: score_quality(scores, rewards, counts) for name, scores, rewards in columns}}


def load(model: str, args: RewardConfig, outputs: Sequence[str] | None, quantization: Any = None) -> PreTrainedModel:
    """A sequence classifier with these outputs, loaded as TRL's trainer loads one with a single output."""
    given = {**(args.model_init_kwargs or {}), **settings_of_outputs(outputs)}
    if quantization is not None:
        given["quantization_config"] = quantization
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        given["device_map"] = None
    set_seed(args.seed)  # for the head's random weights
    with suppress_seqcls_warning():
        return create_model_from_path(model, AutoModelForSequenceClassification, **given)


def targets_of(rows: Dataset) -> np.ndarray:
    """What should be read at all places of rows of `score_rows.row_of`, float64 (N, outputs)."""
    targets = np.concatenate([np.array(each, dtype=np.float64) for each in rows["targets"][:]])
    return targets.reshape(sum(rows["reads"][:]), -1)
