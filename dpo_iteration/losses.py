"""TRL's DPO losses: which there are, and which are more than a mean over pairs. Nothing heavy is imported with this file."""

from collections.abc import Iterable
from typing import Any

from baton.errors import InputError
from baton.task import batch_split, spelling

# TRL itself refuses others only in the first step, after the models were loaded.
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)

SORTED = {"aot", "aot_unpaired"}  # they sort the pairs of a batch
OVER_TOKENS = "sft"  # a mean over the tokens of the chosen responses


def loss_types(settings: dict[str, Any]) -> list[Any]:
    """The losses that the settings name, one or several in a list."""
    named = settings.get("loss_type", "sigmoid")
    return named if isinstance(named, list) else [named]


def check_loss_types(settings: dict[str, Any]) -> None:
    """Raise InputError for a loss that TRL does not have."""
    for name in loss_types(settings):
        if name not in LOSS_TYPES:
            raise InputError(f"`loss_type`: {name!r} is not one of TRL's {', '.join(LOSS_TYPES)}")


def over_a_batch(names: Iterable[str], weighted: bool) -> list[str]:
    """Those losses that are no sum over rows of a batch, so that a process has to compute its batch in one forward pass.

    `weighted` is TRL's `use_weighting`, which multiplies a mean over tokens by a mean over pairs.
    """
    return [name for name in names if name in SORTED or (weighted and name == OVER_TOKENS)]


def split_that_decides(settings: dict[str, Any], packed: bool) -> dict[str, str]:
    """How a batch is split, as a setting that decides, where a loss depends on it; else nothing.

    `packed` is False with TRL's own forward pass, whose mean over tokens is one of each process's batch.
    """
    names = [str(name) for name in loss_types(settings)]
    depends = over_a_batch(names, bool(spelling(settings.get("use_weighting")))) or (not packed and OVER_TOKENS in names)
    return batch_split(settings) if depends else {}
