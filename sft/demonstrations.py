"""The demonstrations that are learnt, those that are held out, and their rows. `arguments` are those of run_sft.py."""

from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.prompts import mixed_records
from baton.records import prompt_hash
from baton.training.data import dataset_probs
from baton.training.demonstrations import Demonstration, Rows, demonstration_in, rows_of
from baton.training.held_out import NONE, held_out_of


def prompts_aside(arguments: Any) -> frozenset[int]:
    """The hashes of the prompts that are held out of the training files; with a held-out file there are none.

    Raises InputError on the first bad demonstration, and where there are too few prompts.
    """
    if arguments.eval_dataset_name_or_path or not arguments.eval_every:
        return NONE
    hashes = np.array(array("Q", map(_prompt_hash, demonstrations(arguments))), dtype=np.uint64)
    return held_out_of(hashes, arguments.eval_every, arguments.dataset_name_or_path)


def training_rows(arguments: Any, aside: frozenset[int], tokenizer: Any, config: Any) -> Rows:
    """The rows that are trained on. Raises InputError on the first bad demonstration, and if no row is left."""
    read, source = partial(training_demonstrations, arguments, aside), arguments.dataset_name_or_path
    return rows_of(read, source, "demonstrations", arguments.max_length, tokenizer, config)


def held_out_rows(arguments: Any, aside: frozenset[int], tokenizer: Any, config: Any) -> Rows | None:
    """The rows to evaluate on, None where none shall be held out. Raises InputError as `training_rows`."""
    if not holds_out(arguments):
        return None
    read, source = partial(held_out_demonstrations, arguments, aside), arguments.eval_dataset_name_or_path
    return rows_of(read, source or arguments.dataset_name_or_path, "held out", arguments.max_length, tokenizer, config)


def holds_out(arguments: Any) -> bool:
    """Whether there are held-out demonstrations."""
    return bool(arguments.eval_dataset_name_or_path or arguments.eval_every)


def training_demonstrations(arguments: Any, aside: frozenset[int]) -> Iterator[Demonstration]:
    """Yield each demonstration that is trained on: those of the prompts `aside` are not. Raises InputError on a bad one."""
    return (each for each in demonstrations(arguments) if not aside or _prompt_hash(each) not in aside)


def held_out_demonstrations(arguments: Any, aside: frozenset[int]) -> Iterator[Demonstration]:
    """Yield each held-out demonstration: all of the held-out file, else those of the prompts `aside` in the training files.

    Raises InputError on the first bad one.
    """
    if arguments.eval_dataset_name_or_path:
        return _read(mixed_records(arguments.eval_dataset_name_or_path, arguments.eval_dataset_split, None), arguments)
    return (each for each in demonstrations(arguments) if _prompt_hash(each) in aside)


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


def _prompt_hash(demonstration: Demonstration) -> int:
    """The hash of what the last turn answers; a plain text, and a turn alone, is its own prompt."""
    said = demonstration.messages
    return prompt_hash([{"role": "user", "content": said}] if isinstance(said, str) else said[:-1] or said)
