"""The margins of rows: which losses read them, and how they reach the loss. The formulas are those of `own_losses.py`.

With `margin_scale` the reward margin is an offset in TRL's sigmoid loss, and with `length_alpha` the difference of lengths. TRL
computes the loss without; what the offset adds is a term of its own, of the same forward pass. So TRL's metrics are those
without an offset.
"""

from collections.abc import Callable
from typing import Any

import torch
from trl import DPOConfig

from baton.errors import InputError


def check_offset(config: DPOConfig, name: str, value: float) -> None:
    """Raise InputError, before a model loads, for a loss that has no offset for the setting `name`, unless its `value` is 0."""
    if not value:
        return
    if "sigmoid" not in config.loss_type or set(config.loss_type) - {"sigmoid", "sft"}:
        raise InputError(f"{name} needs loss_type sigmoid (or sigmoid with sft), not {config.loss_type}")
    if config.f_divergence_type != "reverse_kl":
        raise InputError(f"{name} needs f_divergence_type reverse_kl, not {config.f_divergence_type}")


def with_margin(collate: Callable[[list[dict]], dict[str, Any]]) -> Callable[[list[dict]], dict[str, Any]]:
    """A collator that also hands the rows' margins on, float32 (B,)."""

    def collate_with_margin(rows: list[dict]) -> dict[str, Any]:
        margins = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        return {**collate(rows), "margin": margins}

    return collate_with_margin
