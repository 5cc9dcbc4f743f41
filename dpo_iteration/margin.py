"""What is added to TRL's sigmoid loss: with which settings, and how a row's numbers reach it. The formulas: `own_losses.py`.

With `margin_scale` the reward margin is an offset in the sigmoid, and with `length_alpha` the difference of lengths; with
`xpo_alpha` XPO's term stands beside it. TRL computes the loss without; what each adds is a term of its own, of the same forward
pass. So TRL's metrics are those without.
"""

from collections.abc import Callable
from typing import Any

import torch
from trl import DPOConfig

from baton.errors import InputError


def check_offset(config: DPOConfig, name: str, value: float) -> None:
    """Raise InputError, before a model loads, for a loss that has no term for the setting `name`, unless its `value` is 0."""
    if not value:
        return
    if "sigmoid" not in config.loss_type or set(config.loss_type) - {"sigmoid", "sft"}:
        raise InputError(f"{name} needs loss_type sigmoid (or sigmoid with sft), not {config.loss_type}")
    if config.f_divergence_type != "reverse_kl":
        raise InputError(f"{name} needs f_divergence_type reverse_kl, not {config.f_divergence_type}")


def with_column(
    collate: Callable[[list[dict]], dict[str, Any]], name: str, dtype: torch.dtype
) -> Callable[[list[dict]], dict[str, Any]]:
    """A collator that also hands a column of the rows on, (B,), where it is known of all of them."""

    def collate_with_column(rows: list[dict]) -> dict[str, Any]:
        values = [row[name] for row in rows]
        return collate(rows) if None in values else {**collate(rows), name: torch.tensor(values, dtype=dtype)}

    return collate_with_column
