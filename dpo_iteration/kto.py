"""What KTO needs beyond TRL's trainer: mismatched batches, the reference's log-probabilities once, a packed forward pass."""

import logging
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from trl import KTOConfig, KTOTrainer

from baton.errors import InputError
from baton.models.forward import TOKENS_PER_ROW, obstacle, share_prefixes
from baton.parallel import data_parallel
from baton.training.adapters import adapter_config, quantization_config
from baton.training.checks import check_packing
from baton.training.config import train_in_float32
from baton.training.memory import check_memory, estimate, estimate_reference, largest_batch, outline, sharding_of
from baton.training.metrics import EvaluateAtEnd
from baton.training.reference import dataset_reference_logps
from baton.training.rows import rows_on_disk
from baton.training.sharding import KeepsFloat32
from dpo_iteration.checks import check_count

log = logging.getLogger("baton")

WITHOUT_KL = "apo_zero_unpaired"  # the loss that has no KL estimate
LOSSES = ("kto", WITHOUT_KL)

# desirable_weight * desirable examples over undesirable_weight * undesirable ones: 1 to 4/3 (KTO, arXiv 2402.01306,
# equation 8), a little wider here, since weights are given to two decimals.
ADVISED_BALANCE = (0.99, 1.34)

# Where packed log-probabilities are not the model's own:
REMEDY = "KTO has no other forward pass: use another GPU, driver or version of torch"


def check_config(config: KTOConfig) -> None:
    """Raise InputError for settings that TRL refuses only once the model is loaded, or not at all."""
    if config.loss_type not in LOSSES:
        raise InputError(f"`loss_type`: {config.loss_type!r} is not one of {', '.join(LOSSES)}")
    for name in ("desirable_weight", "undesirable_weight"):
        if not 0 < getattr(config, name) < float("inf"):
            raise InputError(f"`{name}` must be above 0, got {getattr(config, name)}")
    if config.sync_ref_model:
        raise InputError("`sync_ref_model`: the reference is read once, before training, so it cannot follow the policy")
    if config.loss_type == WITHOUT_KL:
        return
    if config.per_device_train_batch_size < 2:
        raise InputError(
            "`per_device_train_batch_size` must be at least 2: KTO estimates its KL term from the other prompts of a batch"
        )
    if config.train_sampling_strategy != "sequential":
        raise InputError(
            f"`train_sampling_strategy` must be sequential, got {config.train_sampling_strategy}: the examples are shuffled "
            "once, and each batch has its own mismatched responses"
        )


def balance_advice(desirable: int, undesirable: int, config: KTOConfig) -> str | None:
    """What to change where the weighted numbers of desirable and undesirable examples are out of balance, or None."""
    ratio = config.desirable_weight * desirable / (config.undesirable_weight * undesirable)
    least, most = ADVISED_BALANCE
    if least <= ratio <= most:
        return None
    up, down = config.desirable_weight / ratio, config.undesirable_weight * ratio
    return (
        f"{desirable} desirable examples of weight {config.desirable_weight:g} to {undesirable} undesirable ones of weight "
        f"{config.undesirable_weight:g} are {ratio:.2f} to 1; KTO's authors advise 1 to 1.33: set desirable_weight from "
        f"{up:.2f} to {up * 4 / 3:.2f}, or undesirable_weight from {down * 3 / 4:.2f} to {down:.2f}"
    )


def in_training_order(rows: Dataset, config: KTOConfig, max_length: int) -> Iterator[dict[str, Any]]:
    """Yield rows (`prompt_ids`, `completion_ids`, `label`) in random order, with the `KL_completion_ids` that KTO needs.

    Random, since the trainer takes rows as they come, and most files have the responses to a prompt side by side. KTO
    estimates its KL term from prompts with responses to other prompts, as one mean over what all processes compute at a time.
    Each row of such a batch gets the response of the row before it, the first that of the last, as in TRL. Where that answers
    the same prompt, it is the nearest row before that does not, and where the whole batch answers one prompt, a row of the
    first batches. It is cut so that prompt and response have at most `max_length` tokens. Raises InputError if all prompts are
    the same.
    """
    order = np.random.default_rng(config.seed).permutation(len(rows))
    size = config.per_device_train_batch_size * data_parallel().size
    for start in range(0, len(order), size):
        columns = rows[order[start : start + size].tolist()]
        batch = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for place, row in enumerate(batch):
            if config.loss_type == WITHOUT_KL:
                yield row
                continue
            before = (batch[place - back] for back in range(1, len(batch)))
            others = chain(before, (rows[int(index)] for index in order))
            other = next((other for other in others if other["prompt_ids"] != row["prompt_ids"]), None)
            if other is None:
                raise InputError(
                    "all examples have the same prompt, or all that are held out; KTO estimates its KL term from responses to "
                    "other prompts: give more prompts, hold out more of them with a smaller `eval_every` or in another file, "
                    f"or set `loss_type: {WITHOUT_KL}`"
                )
            yield {**row, "KL_completion_ids": other["completion_ids"][: max_length - len(row["prompt_ids"])]}


def with_reference_logps(rows: Dataset, reference: str, config: KTOConfig, folder: Path, quantization: Any = None) -> Dataset:
    """The rows of `in_training_order` with `ref_logps` and `ref_KL_logps`, float32; they are kept in a file in `folder`."""
    second = "completion_ids" if config.loss_type == WITHOUT_KL else "KL_completion_ids"
    logps = dataset_reference_logps(rows, ("completion_ids", second), reference, config, folder, quantization, remedy=REMEDY)
    return rows.add_column("ref_logps", logps[:, 0]).add_column("ref_KL_logps", logps[:, 1])


def check_memory_of(arguments: Any, config: KTOConfig, rows: Dataset) -> None:
    """Log the memory that training takes, before a model is loaded, and warn where there is less.

    Whatever `tokens_per_row`, a process computes its batch in one pass. The pass of the mismatched responses, for the KL term,
    comes before it, has no gradients, and so takes less. Raises InputError for a model or an adapter that cannot be made.
    """
    in_4_bit = arguments.load_in_4bit
    outlined, sharding = outline(arguments.model_name_or_path, adapter_config(arguments)), sharding_of(config)
    tokens = largest_batch(rows, config, packed=True, sides=("completion",))  # as many where it is padded
    needs = estimate(outlined, config, sharding, tokens, in_4_bit=in_4_bit)
    check_memory(needs, config, estimate_reference(outlined, config, sharding, in_4_bit=in_4_bit))


def make_trainer(
    arguments: Any, config: KTOConfig, tokenizer: Any, dataset: Dataset, held_out: Dataset | None, reference: str, folder: Path
) -> "PackedKTOTrainer":
    """The trainer on a dataset of examples, in random order; the reference's log-probabilities are kept in `folder`.

    `arguments` are those of run_kto.py, `held_out` examples to evaluate on. With an adapter the reference is the model without
    it. Raises InputError where there are too few examples for a batch.
    """
    check_count(len(dataset), config, dealt=False, what="examples")
    check_memory_of(arguments, config, dataset)
    adapter, quantization = adapter_config(arguments), quantization_config(arguments, config)

    def in_order(rows: Dataset, name: str) -> Dataset:
        return rows_on_disk(partial(in_training_order, rows, config, arguments.max_length), config, name)

    every = dataset = in_order(dataset, "in_order")
    if held_out is not None:
        every = concatenate_datasets([dataset, in_order(held_out, "held_out_in_order")])
    every = with_reference_logps(every, reference, config, folder, quantization)
    return PackedKTOTrainer(
        arguments.model_name_or_path,
        args=config,
        train_dataset=every.select(range(len(dataset))),
        eval_dataset=None if held_out is None else every.select(range(len(dataset), len(every))),
        processing_class=tokenizer,
        peft_config=adapter,
        quantization_config=quantization,
        tokens_per_row=arguments.tokens_per_row,
    )


class PackedKTOTrainer(KeepsFloat32, KTOTrainer):
    """`trl.KTOTrainer` on rows that are already tokenised, packed without padding where the architecture allows it.

    Takes what `trl.KTOTrainer` takes, with `precompute_ref_log_probs`, and the rows of `with_reference_logps`.

    Args:
        tokens_per_row: most tokens of one packed row, in an evaluation by one process; a training batch is one row.
        check_first_batch: compare the first batch's packed log-probabilities with those of the model's own forward
            pass; None: on a GPU, whose kernels no test has seen.
    Raises:
        InputError: `train()`: the first batch's log-probabilities differ.
    """

    def __init__(
        self, model: Any, *, tokens_per_row: int = TOKENS_PER_ROW, check_first_batch: bool | None = None, **kwargs: Any
    ):
        super().__init__(model, **kwargs)
        if kwargs.get("quantization_config") is not None:
            train_in_float32(self.model)  # TRL makes QLoRA's adapters bfloat16, and keeps no float32 copy of them
        if self.eval_dataset is not None:
            self.add_callback(EvaluateAtEnd())
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._check_next_batch = self.accelerator.device.type == "cuda" if check_first_batch is None else check_first_batch
        if reason := obstacle(policy):
            log.warning("%s: %s, so batches are padded (TRL's own forward pass)", type(policy).__name__, reason)
            self._check_next_batch = False
        else:
            share_prefixes(policy, tokens_per_row)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._check_next_batch:
            self._check_next_batch = False
            check_packing(self, model, inputs, REMEDY)
        return super()._compute_loss(model, inputs, return_outputs)
