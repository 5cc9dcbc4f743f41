"""What run_dpo.py trains and evaluates on: from its arguments to pairs in a file, and to their token ids on disk."""

import copy
import logging
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from baton import jsonl, program
from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.pairs import PairSettings, pairs_of
from baton.prompts import mixed_records, read_records, split_sources
from baton.scored import with_rows_merged
from baton.task import spelling
from baton.training.data import dataset_probs
from baton.training.held_out import NONE, held_out_prompts, of_prompts, without
from dpo_iteration.account import IN, Account
from dpo_iteration.choose import (
    Extra,
    PairUp,
    at_least_one,
    choose_pairs,
    extra_responses,
    not_held_out,
    pairs_again,
    write_pairs,
)
from dpo_iteration.losses import OF_MARGINS
from dpo_iteration.pair_arguments import pair_settings
from dpo_iteration.rows import rows_of_pairs
from dpo_iteration.xpo import COLUMN, pairs_of_each

log = logging.getLogger("baton")

HELD_OUT_PAIRS = 100  # of `eval_dir`, as in Online-RLHF


def records_of(arguments: Any) -> Iterator[tuple[str, Record]]:
    """("file:line", record) of every dataset; with rates mixed at these, `max_training_samples` of them.

    The first so many pairs of a mixture would be those of its first dataset alone.
    """
    split, probs, most = arguments.dataset_split, dataset_probs(arguments), arguments.max_training_samples
    most = most if probs and most > 0 else None
    records = mixed_records(arguments.dataset_name_or_path, split, probs, arguments.seed, most)
    return with_usual_keys(records, keys_of(arguments))


def keys_of(arguments: Any) -> dict[str, str | None]:
    """The names that the data gives to what is read of it."""
    return {"prompt": arguments.dataset_key, "chosen": arguments.chosen_key, "rejected": arguments.rejected_key}


def whole_records(arguments: Any) -> Iterator[tuple[str, Record]]:
    """`records_of`, rows of one prompt that follow each other as one record."""
    return with_rows_merged(records_of(arguments), arguments.score_key)


def held_out_source(arguments: Any, settings: dict[str, Any]) -> str | None:
    """Where the pairs to evaluate on are, or None; `do_eval: false` leaves them alone."""
    return None if spelling(settings.get("do_eval")) is False else arguments.eval_dir


def held_out_every(arguments: Any, settings: dict[str, Any]) -> int | None:
    """One prompt in how many is held out to evaluate on, or None; where there is `eval_dir`, none is."""
    return None if spelling(settings.get("do_eval")) is False or arguments.eval_dir else arguments.eval_every


def check_evaluation(arguments: Any, settings: dict[str, Any]) -> str | None:
    """`held_out_source`. Raises InputError where an evaluation is requested and there are no pairs for it."""
    asked = [name for name in ("do_eval", "eval_strategy") if spelling(settings.get(name)) not in (None, False, "no")]
    if asked and not (arguments.eval_dir or arguments.eval_every):
        raise InputError(
            f"`{asked[0]}` needs pairs to evaluate on: name a file of them with --eval_dir, hold some out with --eval_every, "
            "or leave it out"
        )
    source = held_out_source(arguments, settings)
    if asked and not (source or held_out_every(arguments, settings)):
        raise InputError("`eval_strategy` asks for what `do_eval: false` leaves out: leave one of them out")
    return source


def prompts_aside(arguments: Any, every: int | None) -> frozenset[int]:
    """The hashes of the prompts that are held out. Raises InputError where there are too few prompts for that."""
    return held_out_prompts(whole_records(arguments), every, arguments.dataset_name_or_path) if every else NONE


def write_chosen(arguments: Any, pairs_path: Path, aside: frozenset[int]) -> Account:
    """Write the pairs of the data, without those of the prompts `aside`; returns what became of the records."""
    data, most = arguments.dataset_name_or_path, -1 if arguments.dataset_probs else arguments.max_training_samples
    how, least, score = pair_settings(arguments), arguments.min_edit_distance, arguments.score_key
    extra, pair_up = paired_with(arguments)
    return write_pairs(pairs_path, without(whole_records(arguments), aside), data, how, most, score, least, extra, pair_up)


def paired_with(arguments: Any) -> tuple[Extra | None, PairUp]:
    """The further responses to the data's prompts, and what makes pairs of them and the data's own."""
    extra = extra_responses(arguments.extra_responses, arguments.dataset_split)
    return extra, pairs_of_each if arguments.xpo_alpha and extra is not None else pairs_of


def rows_of(
    arguments: Any, pairs_path: Path, earlier: list[Path], aside: frozenset[int], chosen: Account, tokenizer: Any, config: Any
) -> tuple[Any, Account]:
    """The token ids of the pairs in `pairs_path` and `earlier`, a dataset, and the account of `chosen` continued by them.

    Of `earlier`, pairs of the prompts `aside` are dropped. Raises InputError if no pair is left.
    """
    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    account = copy.deepcopy(chosen)
    make = partial(rows_of_pairs, tokenizer, arguments.max_length, arguments.max_prompt_length)

    def token_ids():
        again = not_held_out(pairs_again(earlier, account.counted), aside, account.drops)
        total = None if earlier else account.counted[IN] - account.drops.counts.total()
        rows = tokenised(make, chain(jsonl.read(pairs_path), again), account.drops, account.counted, total)
        return at_least_one(rows, str(pairs_path), account.drops)

    return rows_on_disk(token_ids, config, "pairs", pair_features()), account


def held_out_rows(
    arguments: Any, source: str | None, aside: frozenset[int], tokenizer: Any, config: Any
) -> tuple[Any, Account]:
    """The token ids of the pairs to evaluate on, a dataset, and their account. Raises InputError if there is no pair.

    They are the first ones of `source`, or else all of the data's prompts `aside`, whose further responses stand beside their
    own as in the training. They are not filtered, so that their difficulty does not depend on how pairs are chosen there.
    """
    from baton.training.rows import rows_on_disk

    account = Account()
    make = partial(rows_of_pairs, tokenizer, arguments.max_length, arguments.max_prompt_length)
    name = source or f"{arguments.dataset_name_or_path}: held out by `eval_every`"

    def token_ids():
        settings = PairSettings(choose_type="random", seed=arguments.seed)
        if source:
            records = with_usual_keys(read_records(source, arguments.dataset_split), keys_of(arguments))
        else:
            records = of_prompts(whole_records(arguments), aside)
        extra, pair_up = (None, pairs_of) if source else paired_with(arguments)
        pairs = choose_pairs(records, settings, account.drops, account.counted, arguments.score_key, extra, pair_up)
        named = ((name, pair) for pair in (islice(pairs, HELD_OUT_PAIRS) if source else pairs))
        return at_least_one(make(named, account.drops, account.counted), name, account.drops)

    rows = rows_on_disk(token_ids, config, "held_out", pair_features())
    if program.rank() == 0 and source in split_sources(arguments.dataset_name_or_path):
        log.warning("`eval_dir` is data that is trained on, so what is evaluated is not held out")
    log.info("evaluating on %d pairs, dropped: %s", len(rows), account.drops)
    return rows, account


def pair_features() -> Any:
    """The columns of `rows_of_pairs`: not every pair has a margin, or says which response is the reference's."""
    from datasets import Features, List, Value

    token_ids = {name: List(Value("int64")) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return Features({**token_ids, "margin": Value("float64"), COLUMN: Value("bool")})


def check_margins(without: int, margin_scale: float, losses: list[str]) -> None:
    """Raise InputError where a loss needs margins and so many pairs are `without` one."""
    needs = "`margin_scale`" if margin_scale else ", ".join(name for name in losses if name in OF_MARGINS)
    if needs and without:
        raise InputError(
            f"{needs} needs the margin of every pair, but {without} pairs have neither `margin` nor `chosen_reward` and "
            "`rejected_reward`; leave them out, or choose another loss"
        )
