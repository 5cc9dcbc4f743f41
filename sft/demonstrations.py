"""The demonstrations that are learnt, those that are held out, and their rows. `arguments` are those of run_sft.py."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.prompts import mixed_records
from baton.training.data import dataset_probs
from baton.training.demonstrations import Demonstration, Rows, demonstration_in, rows_of


def training_rows(arguments: Any, tokenizer: Any, config: Any) -> Rows:
    """The rows that are trained on. Raises InputError on the first bad demonstration, and if no row is left."""
    read, source = partial(training_demonstrations, arguments), arguments.dataset_name_or_path
    return rows_of(read, source, "demonstrations", arguments.max_length, tokenizer, config)


def held_out_rows(arguments: Any, tokenizer: Any, config: Any) -> Rows | None:
    """The rows to evaluate on, None where none shall be held out. Raises InputError as `training_rows`."""
    if not holds_out(arguments):
        return None
    read, source = partial(held_out_demonstrations, arguments), arguments.eval_dataset_name_or_path
    return rows_of(read, source or arguments.dataset_name_or_path, "held out", arguments.max_length, tokenizer, config)


def holds_out(arguments: Any) -> bool:
    """Whether there are held-out demonstrations."""
    return bool(arguments.eval_dataset_name_or_path or arguments.eval_every)


def training_demonstrations(arguments: Any) -> Iterator[Demonstration]:
    """Yield each demonstration that is trained on. Raises InputError on the first bad one."""
    every = None if arguments.eval_dataset_name_or_path else arguments.eval_every
    for number, demonstration in enumerate(demonstrations(arguments), 1):
        if every is None or number % every:
            yield demonstration


def held_out_demonstrations(arguments: Any) -> Iterator[Demonstration]:
    """Yield each held-out demonstration: all of the held-out file, else one in `eval_every` of the training file's.

    Raises InputError on the first bad one, and where there are too few to hold one out.
    """
    if arguments.eval_dataset_name_or_path:
        records = mixed_records(arguments.eval_dataset_name_or_path, arguments.eval_dataset_split, None)
        yield from _read(records, arguments)
        return
    number, every = 0, arguments.eval_every
    for number, demonstration in enumerate(demonstrations(arguments), 1):
        if number % every == 0:
            yield demonstration
    if number < every:
        raise InputError(
            f"{arguments.dataset_name_or_path}: {number} demonstrations are fewer than `eval_every` {every}, so that none is "
            "held out; give a smaller one"
        )


def demonstrations(arguments: Any) -> Iterator[Demonstration]:
    """Yield each demonstration of the training files. Raises InputError on the first bad one."""
    split, probs, most = arguments.dataset_split, dataset_probs(arguments), arguments.max_samples
    return _read(mixed_records(arguments.dataset_name_or_path, split, probs, max_samples=most), arguments)


def _read(records: Iterable[tuple[str, Record]], arguments: Any) -> Iterator[Demonstration]:
    keys = {"prompt": arguments.dataset_key, "response": arguments.output_key or arguments.response_key}
    if arguments.pretrain_mode:
        keys = {"text": arguments.dataset_key}
    for where, record in with_usual_keys(records, keys):
        if not arguments.pretrain_mode:
            yield demonstration_in(record, where)
        elif isinstance(record.get("text"), str):
            yield demonstration_in({"text": record["text"]}, where)
        else:
            raise InputError(f"{where}: `text` must be a text; another key of it is named by --dataset_key")
