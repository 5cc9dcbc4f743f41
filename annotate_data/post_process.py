"""From annotated responses to what a training stage reads.

    python annotate_data/post_process.py --post_processor iter_dpo --choose_type max_min \\
        --dataset_name_or_path data/data_with_rewards.jsonl --output_dir data/pairs.jsonl

    iter_dpo    preference pairs (baton/pairs.py), for offline DPO or reward modelling
    rs          rejection sampling: the best response of each prompt as a demonstration for SFT
    best        the record with its best response alone, and that one's reward: best-of-n as inference
    ca          conditional SFT: every response as a demonstration, its binned reward written before the last user turn

Before that, in this order: responses outside `reward_range` or cut off by length (`drop_truncated`) are left out, and those
that repeat one of the others (`drop_duplicates`); `len_penalty` is subtracted for each character; rewards are normalised. A
prompt that is left with too few responses is dropped, and counted.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from annotate_data.demonstrations import best_alone, best_of_n, conditional
from annotate_data.filters import FilterArguments, Filtered
from annotate_data.work import check_output, write_records
from baton.arguments import option, parse
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.launch.check import check_processes
from baton.pairs import ChooseType, PairSettings, candidates, pairs_of
from baton.program import run
from baton.stage import Stage

log = logging.getLogger("baton")

# Settings that only some post-processors read.
ONLY_WITH = {
    **dict.fromkeys(("choose_type", "pairs_per_prompt", "min_margin", "max_length_ratio", "seed"), ("iter_dpo",)),
    "min_reward": ("rs", "best"),
    **dict.fromkeys(("bins", "levels"), ("ca",)),
}


class Arguments(FilterArguments):
    output_dir: Path = option(..., "the output FILE, such as data/pairs.jsonl", changes_result=False)
    post_processor: Literal["iter_dpo", "rs", "best", "ca"] = option("iter_dpo", "what to make (see above)")
    seed: int = option(0, "of random pairs")
    choose_type: ChooseType = option("max_min", "iter_dpo: how pairs are chosen")
    pairs_per_prompt: int = option(1, "iter_dpo: pairs of each prompt, each response in at most one", ge=1)
    min_margin: float = option(0.0, "iter_dpo: least difference of rewards, after normalisation", ge=0)
    max_length_ratio: float | None = option(None, "iter_dpo: longest ratio of the two lengths in characters", ge=1)
    min_reward: float | None = option(None, "rs, best: least reward of a best response, after normalisation")
    bins: int = option(5, "ca: reward levels, each with about as many responses", ge=2, le=100)
    levels: list[str] | None = option(
        None, "ca: the text before the prompt for each level, the lowest first, instead of <reward_1> to <reward_N>"
    )


def main() -> None:
    arguments = parse(Arguments, __doc__)
    check_processes()
    check_output(arguments.output_dir)
    check(arguments)
    settings = pair_settings(arguments)
    inputs = {"dataset": arguments.dataset_name_or_path}
    stage = Stage.begin("post_process", arguments, arguments.output_dir, inputs)
    if stage is None:
        return
    filtered, drops = Filtered(arguments, least=2 if arguments.post_processor == "iter_dpo" else 1), Drops()
    records, of_prompt = post_processed(filtered, arguments, settings, drops)
    written = write_records(arguments.output_dir, records)
    if written == 0:
        log.warning("nothing is left: %s", drops)
    facts = {}
    if arguments.post_processor == "best":
        facts = {"responses": filtered.responses, "responses_left_out": filtered.responses - written}
        log.info("responses left out: %d of %d", facts["responses_left_out"], filtered.responses)
    stage.finish(records_in=filtered.expected(of_prompt), records_out=written, drops=drops, **facts)


def check(arguments: Arguments) -> None:
    """Raise InputError for settings that would do nothing, or leave nothing."""
    for name, processors in ONLY_WITH.items():
        given = getattr(arguments, name) != Arguments.model_fields[name].default
        if given and arguments.post_processor not in processors:
            raise InputError(f"`{name}` acts with post_processor {' and '.join(processors)} only: leave it out")
    if arguments.levels is not None:
        if arguments.bins != Arguments.model_fields["bins"].default:
            raise InputError("`levels` says how many levels there are, and `bins` does too: leave one out")
        if len({text.strip() for text in arguments.levels} - {""}) < max(len(arguments.levels), 2):
            raise InputError("`levels` needs two different texts or more, none of them empty")
    if arguments.reward_range and not arguments.reward_range[0] <= arguments.reward_range[1]:
        raise InputError("`reward_range`: LOW HIGH, of which the first must not be above the second")


def post_processed(
    filtered: Filtered, arguments: Arguments, settings: PairSettings, drops: Drops
) -> tuple[Iterator[Record], Callable[[int], int]]:
    """The output's records, and how many records, drops included, a prompt gives that has so many responses left."""
    records = filtered.with_enough(drops)
    if arguments.post_processor == "iter_dpo":
        return pairs_of(records, settings, drops), lambda count: candidates(count, settings)
    if arguments.post_processor == "rs":
        return best_of_n(records, arguments.min_reward, drops), lambda count: 1
    if arguments.post_processor == "best":
        return best_alone(records, arguments.min_reward, drops), lambda count: 1
    levels = arguments.levels or [f"<reward_{level}>" for level in range(1, arguments.bins + 1)]
    return conditional(records, filtered.quantiles(len(levels)), levels), lambda count: count


def pair_settings(arguments: Arguments) -> PairSettings:
    """The settings of the pairs. The length penalty is in the rewards already, so max_min_p is max_min here."""
    choose_type = "max_min" if arguments.choose_type == "max_min_p" else arguments.choose_type
    return PairSettings(
        choose_type,
        pairs_per_prompt=arguments.pairs_per_prompt,
        min_margin=arguments.min_margin,
        max_length_ratio=arguments.max_length_ratio,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    run(main)
