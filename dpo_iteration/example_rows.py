"""What run_kto.py trains and evaluates on: from its arguments to labelled examples in a file, and to token ids on disk."""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from baton import jsonl, program
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.labels import LabelSettings, check_both_kinds, labelled_examples
from baton.prompts import mixed_records, split_sources
from baton.scored import with_rows_merged
from baton.training.data import dataset_probs
from baton.training.held_out import NONE, held_out_prompts, of_prompts, without
from dpo_iteration.account import IN, Account
from dpo_iteration.choose import at_least_one
from dpo_iteration.rows import rows_of_examples

log = logging.getLogger("baton")


def label_settings(arguments: Any) -> LabelSettings:
    """How responses are labelled, checked. Raises InputError on a combination that makes no sense."""
    return LabelSettings(arguments.desirable_above, arguments.undesirable_below, arguments.drop_truncated)


def records_of(arguments: Any) -> Iterator[tuple[str, Record]]:
    """("file:line", record) of every dataset, mixed at their rates, the fields under their usual names."""
    split, probs, most = arguments.dataset_split, dataset_probs(arguments), arguments.max_samples
    return usual_records(arguments, mixed_records(arguments.dataset_name_or_path, split, probs, arguments.seed, most))


def usual_records(arguments: Any, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    """Records with their fields under the usual names."""
    names = ("dataset_key", "output_key", "label_key", "chosen_key", "rejected_key")
    usual = ("prompt", "completion", "label", "chosen", "rejected")
    return with_usual_keys(records, {key: getattr(arguments, name) for key, name in zip(usual, names, strict=True)})


def whole_records(arguments: Any) -> Iterator[tuple[str, Record]]:
    """`records_of`, rows of one prompt that follow each other as one record."""
    return with_rows_merged(records_of(arguments), arguments.score_key)


def holds_out(arguments: Any) -> bool:
    """Whether there are held-out examples."""
    return bool(arguments.eval_dataset_name_or_path or arguments.eval_every)


def prompts_aside(arguments: Any, least: int) -> frozenset[int]:
    """The hashes of the prompts that are held out of the data, at least so many; with a held-out file there are none."""
    if arguments.eval_dataset_name_or_path or not arguments.eval_every:
        return NONE
    return held_out_prompts(whole_records(arguments), arguments.eval_every, arguments.dataset_name_or_path, least)


def write_examples(path: Path, arguments: Any, aside: frozenset[int]) -> Account:
    """Write the labelled examples of the data, without those of the prompts `aside`, to `path`.

    Returns what became of the records. Raises InputError without both kinds.
    """
    account, source = Account(), arguments.dataset_name_or_path
    settings, score, records = label_settings(arguments), arguments.score_key, without(whole_records(arguments), aside)
    jsonl.write(path, labelled_examples(records, settings, account.drops, account.counted, score))
    # Taken out of the account, since some are dropped below for their length: the rows are counted by kind instead.
    check_both_kinds(account.counted.pop("desirable", 0), account.counted.pop("undesirable", 0), source, account.drops)
    return account


def rows_of(arguments: Any, path: Path, labelled: Account, tokenizer: Any, config: Any) -> tuple[Any, Account]:
    """The token ids of the examples in `path`, a dataset, and the account of `labelled` continued by them.

    Raises InputError if not both kinds are left.
    """
    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    account = copy.deepcopy(labelled)
    make = partial(rows_of_examples, tokenizer, arguments.max_length, arguments.max_prompt_length)

    def token_ids():
        labels: Counter[bool] = Counter()
        total = account.counted[IN] - account.drops.counts.total()
        for row in tokenised(make, jsonl.read(path), account.drops, account.counted, total):
            labels[row["label"]] += 1
            yield row
        check_both_kinds(labels[True], labels[False], path, account.drops)

    return rows_on_disk(token_ids, config, "examples"), account


def held_out_rows(arguments: Any, aside: frozenset[int], tokenizer: Any, config: Any) -> tuple[Any, Account]:
    """The token ids of the held-out examples, a dataset, and their account. Raises InputError if there is none.

    They are those of the held-out file, or else of the data's prompts `aside`.
    """
    from baton.training.rows import rows_on_disk

    account, source = Account(), arguments.eval_dataset_name_or_path
    make = partial(rows_of_examples, tokenizer, arguments.max_length, arguments.max_prompt_length)
    name = source or f"{arguments.dataset_name_or_path}: held out by `eval_every`"

    def token_ids():
        if source:
            records = usual_records(arguments, mixed_records(source, arguments.eval_dataset_split, None))
        else:
            records = of_prompts(whole_records(arguments), aside)
        settings, score = label_settings(arguments), arguments.score_key
        examples = labelled_examples(records, settings, account.drops, account.counted, score)
        made = make(((name, each) for each in examples), account.drops, account.counted)
        return at_least_one(made, name, account.drops, "example")

    rows = rows_on_disk(token_ids, config, "held_out")
    if program.rank() == 0 and source in split_sources(arguments.dataset_name_or_path):
        log.warning("`eval_dataset_name_or_path` is data that is trained on, so what is evaluated is not held out")
    log.info("evaluating on %d examples, dropped: %s", len(rows), account.drops)
    return rows, account
