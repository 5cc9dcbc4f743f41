"""From pairs to a DPO trainer: the memory that it takes, the reference's log-probabilities, then the policy."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from trl import DPOConfig

from baton.training.adapters import adapter_config, quantization_config
from baton.training.memory import check_memory, estimate, estimate_reference, largest_batch, outline, sharding_of
from baton.training.reference import dataset_reference_logps, load
from dpo_iteration.checks import check_count
from dpo_iteration.losses import loss_numbers
from dpo_iteration.trainer import REMEDY, PackedDPOTrainer, needs_whole_batches, why_padded

log = logging.getLogger("baton")


def make_trainer(
    arguments: Any, config: DPOConfig, tokenizer: Any, dataset: Dataset, held_out: Dataset | None, reference: str | None,
    folder: Path,
) -> PackedDPOTrainer:  # fmt: skip
    """The trainer, its models loaded: the reference first, and alone, for its log-probabilities, which are kept in `folder`.

    Logs the memory that this takes, before anything is loaded. `arguments` are those of run_dpo.py, `held_out` rows to evaluate
    on. Without a `reference` the loss has none. Raises InputError where there are too few pairs.
    """
    packed, free = arguments.forward == "packed", reference is None
    if free:
        log.info("loss_type %s: no reference is loaded", ", ".join(config.loss_type))
    adapter, quantization = adapter_config(arguments), quantization_config(arguments, config)
    # With an adapter, TRL's own forward pass gets the reference by switching the adapter off.
    in_memory = not packed and not free and not (adapter and reference == arguments.model_name_or_path)
    outlined, in_4_bit = outline(arguments.model_name_or_path, adapter), quantization is not None
    by_rows = packed and not why_padded(outlined) and not needs_whole_batches(outlined, config)
    check_count(len(dataset), config, by_rows)
    tokens = largest_batch(dataset, config, packed, arguments.tokens_per_row if by_rows else None)
    needs = estimate(outlined, config, sharding_of(config), tokens, in_4_bit=in_4_bit, reference=in_memory)
    first = estimate_reference(outlined, config, sharding_of(config), in_4_bit=in_4_bit) if packed and not free else None
    check_memory(needs, config, first)
    if packed and not free:
        columns = ("chosen_ids", "rejected_ids")
        every = dataset if held_out is None else concatenate_datasets([dataset, held_out])
        logps = dataset_reference_logps(every, columns, reference, config, folder, quantization, remedy=REMEDY)
        dataset, rest = _with_logps(dataset, logps), logps[len(dataset) :]
        held_out = None if held_out is None else _with_logps(held_out, rest)
    return PackedDPOTrainer(
        model=arguments.model_name_or_path,
        ref_model=load(reference, config, quantization) if in_memory else None,
        peft_config=adapter,
        quantization_config=quantization,
        args=config,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=tokenizer,
        packed=packed,
        margin_scale=arguments.margin_scale,
        numbers=loss_numbers(arguments),
        tokens_per_row=arguments.tokens_per_row,
        compile_layers=arguments.compile,
    )


def _with_logps(rows: Dataset, logps: np.ndarray) -> Dataset:
    """Rows with the first of the reference's log-probabilities (…, 2) as columns."""
    chosen, rejected = logps[: len(rows)].T
    return rows.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)
