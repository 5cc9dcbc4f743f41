"""TRL's SFT trainer with another forward pass, packed rows instead of a padded batch, row by row."""

from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from baton.models.forward import TOKENS_PER_ROW, obstacle
from baton.training.arguments import Compile
from baton.training.config import train_in_float32
from baton.training.learnt import collate, outline
from baton.training.measured import HeldOut, MeasuresRows, sizes_of, take_rows
from baton.training.metrics import EvaluateAtEnd
from baton.training.sharding import KeepsFloat32
from baton.training.steps import needs_its_own_batches
from sft.noise import Noise


class PackedSFTTrainer(MeasuresRows, KeepsFloat32, SFTTrainer):
    """`trl.SFTTrainer` on packed rows: its losses, means over the learnt tokens of a step, a pass for each row.

    Where packed rows do not go (`why_padded`) it is TRL's trainer on padded batches, and the log says so.

    Args:
        train_dataset, eval_dataset: rows of `input_ids` and `labels`, -100 where nothing is learnt, as at the first token.
        tokens_per_row: most tokens of a packed row, unless a single row of token ids has more.
        compile_layers: whether the layers of packed rows are compiled (`compiling.py`).
        check_first_batch: compare the first row's packed log-probabilities with those of the model's own forward pass; None:
            on a GPU, whose kernels no test has seen.
    Raises:
        InputError: layers cannot be compiled that shall be; `train()`: the first row's log-probabilities differ.
    """

    remedy = "Packed rows have no other forward pass: use another GPU, driver or version of torch"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        *,
        args: SFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        tokens_per_row: int = TOKENS_PER_ROW,
        compile_layers: Compile = "off",
        check_first_batch: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        in_4_bit = kwargs.get("quantization_config") is not None
        if in_4_bit:
            train_in_float32(self.model)  # TRL makes QLoRA's adapters bfloat16, and keeps no float32 copy of them
        if eval_dataset is not None:
            self.add_callback(EvaluateAtEnd())
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if reason := why_padded(policy, args):
            self.stay_padded(policy, reason, compile_layers)
            return
        take_rows(policy)
        self.check_first_row(check_first_batch)
        self.data_collator = collate
        alpha, self.neftune_noise_alpha = self.neftune_noise_alpha, None  # Transformers' own takes a row for one text
        self._noise = None if alpha is None else Noise(policy.get_input_embeddings(), alpha)
        outlined = outline(train_dataset)
        costs, tokens = sizes_of(outlined, self.model)
        amounts = {"tokens": outlined.learnt}
        if self.aux_loss_enabled:
            self.balance_router(policy, self.router_aux_loss_coef)
            self.data_collator = partial(collate, balanced=True)
            amounts["router_tokens"] = outlined.prompts + outlined.responses
        self.compile_layers(compile_layers, costs, in_4_bit, self.aux_loss_enabled)
        self.train_row_by_row(costs, tokens, amounts, tokens_per_row)
        if eval_dataset is not None:
            self.held_out = HeldOut(*sizes_of(outline(eval_dataset), self.model), tokens_per_row, collate)

    def measure(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The mean loss over the learnt tokens of a packed row, and TRL's metrics.

        It is the mean of -ln p; with TRL's loss_type `dft` (arXiv 2508.05629) that of p times this, p without gradients, and
        the former is logged as `nll`.
        """
        if self._noise is not None:
            self._noise.layout = inputs["row"].layout
        scores = model(row=inputs["row"])
        loss = nll = -scores.log_probs.mean()
        numbers = {"entropy": scores.entropy.mean(), "mean_token_accuracy": scores.is_top1.float().mean()}
        if self.args.loss_type == "dft":
            loss = -(scores.log_probs * scores.log_probs.exp().detach()).mean()
            numbers["nll"] = nll
        values = torch.stack([value.detach() for value in numbers.values()]).tolist()
        return loss, dict(zip(numbers, values, strict=True))


def why_padded(model: PreTrainedModel, config: SFTConfig) -> str | None:
    """Why a policy, without an adapter's wrapper, is trained on padded batches, or None where it takes packed rows."""
    if config.label_smoothing_factor:
        return "`label_smoothing_factor` needs the log-probabilities of all tokens"
    return obstacle(model) or needs_its_own_batches(model, config)
