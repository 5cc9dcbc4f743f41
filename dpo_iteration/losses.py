"""The losses of pairs that there are, and which are more than a mean over pairs. Nothing heavy is imported with this file."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from baton.errors import InputError
from baton.task import batch_split, spelling

# TRL itself refuses others only in the first step, after the models were loaded.
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# Beside TRL's own: `own_losses.py`. All are means over pairs.
OWN_LOSSES = ("simpo", "orpo", "dpop", "rebel", "sppo")

SORTED = {"aot", "aot_unpaired"}  # they sort the pairs of a batch
OVER_TOKENS = "sft"  # a mean over the tokens of the chosen responses
REFERENCE_FREE = {"simpo", "orpo"}
OF_MARGINS = {"rebel", "sppo"}


@dataclass(frozen=True)
class LossNumbers:
    """What the losses of `own_losses.py` are set by beside `beta`, each named after its loss; the first two are for `sigmoid`.

    Their meanings stand with the losses' formulas.
    """

    length_alpha: float = 0.0
    xpo_alpha: float = 0.0
    simpo_gamma: float = 0.5
    orpo_lambda: float = 0.1
    dpop_lambda: float = 50.0
    rebel_eta: float = 1.0


def loss_numbers(arguments: Any) -> LossNumbers:
    """Those of run_dpo.py's arguments."""
    return LossNumbers(**{field.name: getattr(arguments, field.name) for field in fields(LossNumbers)})


def loss_types(settings: dict[str, Any]) -> list[Any]:
    """The losses that the settings name, one or several in a list."""
    named = settings.get("loss_type", "sigmoid")
    return named if isinstance(named, list) else [named]


def check_loss_types(settings: dict[str, Any], numbers: LossNumbers) -> None:
    """Raise InputError for a loss that there is not, and for a number of a loss that is not trained."""
    named = loss_types(settings)
    for name in named:
        if name not in LOSS_TYPES + OWN_LOSSES:
            raise InputError(f"`loss_type`: {name!r} is not one of TRL's {', '.join(LOSS_TYPES)} or of {', '.join(OWN_LOSSES)}")
    for field in fields(numbers):
        loss = field.name.partition("_")[0]
        if loss in OWN_LOSSES and loss not in named and getattr(numbers, field.name) != field.default:
            raise InputError(f"`{field.name}` acts with loss_type {loss} only, not with {', '.join(map(str, named))}")


def is_reference_free(names: Iterable[str]) -> bool:
    """Whether these losses, together, read nothing of a reference. TRL's `sft` alone keeps TRL's metrics, which do."""
    names = set(names)
    return bool(names & REFERENCE_FREE) and names <= REFERENCE_FREE | {OVER_TOKENS}


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
