"""Which shape a record has, and which of Baton's records it becomes: prompt, demonstration, preference, labelled or stepwise.

Each kind has a module of its own that reads it: records.py, demonstrations.py, preferences.py, labels.py, steps.py.
"""

from collections import Counter
from typing import Any, Literal, NamedTuple

from baton.conversations import hh_turns, without_answer
from baton.demonstrations import RESPONSE_KEYS, demonstration_record, is_colossal_text
from baton.jsonl import Record
from baton.labels import LabelSettings, labelled_examples
from baton.pairs import checked_pair
from baton.preferences import ANSWER_KEYS, preferences_in
from baton.records import CONVERSATION_KEYS, DOLLY_KEYS, PROMPT_KEYS, SIDE_KEYS, Messages, prompt_as_written, prompt_keys
from baton.scored import has_completions, is_scored_row
from baton.steps import SEPARATOR, is_stepwise, stepwise_records

Kind = Literal["prompts", "demonstrations", "preferences", "labelled", "stepwise"]

# What the lengths of a record's parts are named by, the prompt first.
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "prompts": ("prompt",),
    "demonstrations": ("prompt", "response"),
    "preferences": ("prompt", "chosen", "rejected"),
    "labelled": ("prompt", "completion"),
    "stepwise": ("prompt", "response"),
}


class Shape(NamedTuple):
    """What a record is taken for: in words, and as one of Baton's kinds."""

    name: str
    kind: Kind


def shape_of(record: Record, score: str | None = None) -> Shape | None:
    """The shape of a record, told by its keys, or None. Nothing is checked. `score` is the key of scores of an unusual name."""
    keys = record.keys()
    if is_stepwise(record):
        return Shape("steps with labels (`prompt`, `completions`, `labels`)", "stepwise")
    if {"responses", "rewards"} <= keys:
        return Shape("responses with rewards (`responses`, `rewards`)", "preferences")
    if has_completions(record):
        return Shape("UltraFeedback (`completions` with scores)", "preferences")
    if "chosen" not in keys and keys & set(ANSWER_KEYS):
        return Shape("ReaL's answers (`pos_answers`, `neg_answers`)", "preferences")
    if keys & {"chosen", "rejected"}:
        return Shape(_pairs_in_words(record), "preferences")
    conversation = next((name for name in CONVERSATION_KEYS if isinstance(record.get(name), list)), None)
    response = next((name for name in RESPONSE_KEYS if record.get(name) is not None), None)
    if "label" in record and (conversation or response):
        return Shape(f"KTO (`{response or conversation}`, `label`)", "labelled")
    if is_scored_row(record, score):
        return Shape("HelpSteer (rows of one prompt, each with a score)", "preferences")
    if conversation:
        return _conversation_shape(record[conversation], conversation, response)
    if "instruction" in record:
        dolly = prompt_keys(record) == DOLLY_KEYS
        name = "Dolly (`instruction`, `context`, `response`)" if dolly else "Alpaca (`instruction`, `input`, `output`)"
        return Shape(name, "demonstrations" if response else "prompts")
    if keys & set(PROMPT_KEYS):
        return Shape(f"prompts with `{response}`", "demonstrations") if response else Shape("prompts", "prompts")
    if isinstance(record.get("text"), str):
        return Shape("plain text (`text`)", "demonstrations")
    if is_colossal_text(record):
        return Shape("ColossalChat's plain text (`source`, `Target`)", "demonstrations")
    return None


def baton_records(
    record: Record,
    where: str,
    kind: Kind,
    drops: Any,
    max_pairs_per_prompt: int | None = None,
    score: str | None = None,
) -> list[Record]:
    """What a record becomes as `kind`: Baton's records, without the keys that they were read from; an `id` only if it has one.

    Rows of one prompt must be merged before (`scored.with_rows_merged`). `drops` gets what it holds beside them, by reason.
    Raises InputError naming `where` and the field.
    """
    if kind == "prompts":
        messages, keys = prompt_as_written(record, where)
        return [_without(record, keys) | {"prompt": without_answer(messages, where, keys[0])}]
    if kind == "demonstrations":
        return [demonstration_record(record, where)]
    if kind == "preferences":
        found = preferences_in(record, where, max_pairs_per_prompt, score, drops)
        found = [checked_pair(pair, where) for pair in found]
    elif kind == "stepwise":
        found = [record for _, record in stepwise_records([(where, record)])]
    else:
        found = list(labelled_examples([(where, record)], LabelSettings(), drops, Counter(), score))
    read = [name for name in prompt_keys(record) if name not in COLUMNS[kind]]
    if "id" not in record:
        read.append("id")
    return [_without(each, read) for each in found]


def parts_of(record: Record, kind: Kind) -> tuple[Messages, tuple[str, ...]]:
    """The prompt of one of Baton's records, and the responses: none, one, or chosen and rejected."""
    if kind == "prompts":
        return record["prompt"], ()
    if kind == "preferences":
        return record["prompt"], (record["chosen"], record["rejected"])
    if kind == "labelled":
        return record["prompt"], (record["completion"],)
    if kind == "stepwise":
        return record["prompt"], (SEPARATOR.join(record["completions"]),)
    if "messages" not in record:
        return [], (record["text"],)
    *prompt, last = record["messages"]
    return prompt, (last["content"],)


def _without(record: Record, keys: Any) -> Record:
    if record.keys().isdisjoint(keys):
        return record
    return {name: value for name, value in record.items() if name not in keys}


def _pairs_in_words(record: Record) -> str:
    if any(isinstance(record.get(name), str) and hh_turns(record[name]) for name in ("chosen", "rejected")):
        return "HH-RLHF (`chosen` and `rejected`, texts of turns that begin alike)"
    keys = prompt_keys(record)
    if keys[:1] == ("context",):
        return "ColossalChat (`context`, `chosen`, `rejected`)"
    if not keys or keys[:2] == SIDE_KEYS:
        return "pairs of conversations that begin alike (`chosen`, `rejected`)"
    return f"pairs (`{keys[0]}`, `chosen`, `rejected`)"


def _conversation_shape(messages: list[Any], key: str, response: str | None) -> Shape:
    first, last = (messages[0], messages[-1]) if messages else ({}, {})
    speaker = "from" if isinstance(first, dict) and "from" in first else "role"
    name = f"{'ShareGPT' if speaker == 'from' else 'OpenAI'} (`{key}` of `{speaker}`)"
    asked = isinstance(last, dict) and last.get(speaker) in ("user", "human", "system")
    return Shape(name, "prompts" if asked and response is None else "demonstrations")
