"""From annotated responses or offline preferences to the pairs, and from pairs or examples to the token ids trained on."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from baton import jsonl
from baton.errors import InputError
from baton.jsonl import Record
from baton.pairs import PairSettings, candidates, pairs_of
from baton.preferences import preference_records
from baton.prompts import read_records
from baton.stage import Drops
from baton.templates import decodes_to, prompt_token_ids, response_token_ids


def choose_pairs(source: str, split: str, settings: PairSettings, drops: Drops, counted: Counter[str]) -> Iterator[Record]:
    """Yield the pairs of `source`: chosen among annotated responses, or as an offline preference file gives them.

    `counted["in"]` becomes the number of pairs asked for: pairs and drops together.
    """
    records = read_records(source, split)
    first = next(records, None)
    if first is None:
        raise InputError(f"{source}: holds no records")
    records = chain([first], records)
    if "chosen" in first[1]:
        yield from (record for _, record in _counting(preference_records(records), counted, lambda record: 1))
    else:
        asked = _counting(records, counted, lambda record: candidates(len(record.get("responses") or ()), settings))
        yield from pairs_of(asked, settings, drops)


def _counting(records: Iterable[tuple[str, Record]], counted: Counter[str], pairs: Any) -> Iterator[tuple[str, Record]]:
    for where, record in records:
        counted["in"] += pairs(record)
        yield where, record


def token_rows(
    pairs: Path, tokenizer: Any, max_length: int, max_prompt_length: int, drops: Drops, counted: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield `prompt_ids`, `chosen_ids`, `rejected_ids` and `margin` for each pair of a pairs file.

    Sampled token ids are used as they are where this tokenizer is the one that sampled them, else the text is tokenised; the
    end-of-turn token is there only where the response stopped by itself. A prompt longer than `max_prompt_length` tokens is
    dropped; a response is cut so that prompt and response have at most `max_length` tokens.
    """
    for where, pair in jsonl.read(pairs):
        row = _row(pair, ("chosen", "rejected"), tokenizer, max_length, max_prompt_length, drops, counted, where)
        if row is None:
            continue
        if row["chosen_ids"] == row["rejected_ids"]:
            drops.add("identical within max_length", pair["id"])
        else:
            yield {**row, "margin": float(pair.get("margin") or 0.0)}


def labelled_rows(
    examples: Iterable[tuple[str, Record]],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    drops: Drops,
    counted: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Yield `prompt_ids`, `completion_ids` and `label` for each ("file:line", example), by the rules of `token_rows`."""
    for where, example in examples:
        row = _row(example, ("completion",), tokenizer, max_length, max_prompt_length, drops, counted, where)
        if row is None:
            continue
        if not row["completion_ids"]:
            drops.add("a response without a token", example["id"])
        else:
            yield {**row, "label": example["label"]}


def _row(
    record: Record,
    sides: tuple[str, ...],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    drops: Drops,
    counted: Counter[str],
    where: str,
) -> dict[str, list[int]] | None:
    """`prompt_ids` and the `…_ids` of each of a record's responses, or None where the prompt is too long."""
    prompt_ids = prompt_token_ids(tokenizer, record["prompt"], where)
    if len(prompt_ids) > max_prompt_length:
        drops.add(f"prompt longer than max_prompt_length {max_prompt_length} tokens", record["id"])
        return None
    row = {"prompt_ids": prompt_ids}
    for side in sides:
        ids = _response_ids(record, side, tokenizer, where, counted)
        counted["responses cut to max_length"] += len(prompt_ids) + len(ids) > max_length
        row[f"{side}_ids"] = ids[: max_length - len(prompt_ids)]
    return row


def _response_ids(record: Record, side: str, tokenizer: Any, where: str, counted: Counter[str]) -> list[int]:
    sampled = record.get(f"{side}_token_ids")
    if sampled and decodes_to(tokenizer, sampled, record[side]):
        counted["responses with sampled token ids"] += 1
        return sampled
    counted["responses tokenised from text"] += 1
    stopped = record.get(f"{side}_finish_reason") in (None, "stop")
    return response_token_ids(tokenizer, record["prompt"], record[side], stopped, where)
