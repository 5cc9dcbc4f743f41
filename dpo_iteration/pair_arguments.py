"""How preference pairs are chosen, as arguments of the programs that choose them."""

from baton.arguments import StageArguments, option
from baton.pairs import ChooseType, PairSettings


class PairArguments(StageArguments):
    """The arguments from which `pair_settings` are made."""

    choose_type: ChooseType = option("max_min", "which two responses of a prompt make a pair")
    len_penalty: float = option(0.0, "subtracted from the reward per character, with choose_type max_min_p", ge=0)
    pairs_per_prompt: int = option(1, "most pairs of one prompt; each response is in at most one", ge=1)
    min_margin: float = option(0.0, "smallest difference of rewards that makes a pair", ge=0)
    max_length_ratio: float | None = option(None, "longest over shortest response of a pair, in characters", ge=1)
    drop_truncated: bool = option(False, "leave out responses that were cut off by length")


def pair_settings(arguments: PairArguments) -> PairSettings:
    """How pairs are chosen, checked. Raises InputError for a combination that makes no sense."""
    return PairSettings(**{name: getattr(arguments, name) for name in PairSettings.__dataclass_fields__})
