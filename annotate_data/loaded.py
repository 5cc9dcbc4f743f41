"""What scorers that run a model in this process have in common: how much it is fed, and how a classifier is loaded."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from baton.models import loading
from baton.models.templates import load_tokenizer


class Limits(NamedTuple):
    """How many tokens a model is fed at the most."""

    conversation: int
    batch: int  # of padded sequences
    row: int  # of packed ones
    least_filled: float  # the shortest sequence of a batch, as a share of its longest


def limits(
    model: Any,
    device: torch.device,
    settings: loading.Settings,
    batch: Mapping[str, int] = loading.TOKENS_PER_BATCH,
) -> Limits:
    """The limits of a loaded model; `batch` are the tokens of a batch by kind of device, where the settings do not say."""
    return Limits(
        loading.longest_input(model, settings.max_length),
        settings.tokens_per_batch or batch[device.type],
        settings.tokens_per_batch or loading.TOKENS_PER_ROW[device.type],
        loading.LEAST_FILLED[device.type],
    )


def classifier(path: str, device: torch.device, settings: loading.Settings) -> tuple[Any, Any, Limits]:
    """The tokenizer of a reward model, the model, and its limits. Raises InputError if one of the former cannot be loaded."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(path, settings.chat_template)
    model = loading.place(loading.load(AutoModelForSequenceClassification, path, settings.dtype), device, settings.dtype)
    return tokenizer, model, limits(model, device, settings)
