"""Offline preference records of every common shape, read as (prompt, chosen, rejected).

{"prompt", "chosen", "rejected"}    texts, or messages; chosen and rejected may repeat the prompt
{…, "margin"}                       Baton's own pairs: a prompt of messages, texts that are taken as they stand
{"chosen", "rejected"}              whole conversations: messages, or text with "\\n\\nHuman:" and "\\n\\nAssistant:" turns
"""

import re
from collections.abc import Iterable, Iterator
from itertools import takewhile

from baton.errors import InputError
from baton.jsonl import Record
from baton.prompts import with_ids
from baton.records import Messages, as_messages, prompt_of

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def preference_records(records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    """Yield records with `prompt` as messages, `chosen` and `rejected` as texts, and an `id`; other keys stay."""
    yield from with_ids((where, record | preference_of(record, where)) for where, record in records)


def preference_of(record: Record, where: str) -> Record:
    """The `prompt`, `chosen` and `rejected` of a preference record. Raises InputError naming what is wrong."""
    if "margin" in record and isinstance(record.get("prompt"), list):
        texts = {name: record[name] for name in ("chosen", "rejected") if isinstance(record.get(name), str)}
        if len(texts) == 2:  # what a policy sampled may be empty, or look like turns
            return {"prompt": prompt_of(record, where), **texts}
    sides = {}
    for name in ("chosen", "rejected"):
        if name not in record:
            raise InputError(f"{where}: the record has no `{name}`; a preference needs `chosen` and `rejected`")
        sides[name] = _conversation(record[name], where, name)
    chosen, rejected = sides["chosen"], sides["rejected"]
    if len(chosen) == 1 and len(rejected) == 1:
        prompt = prompt_of(record, where)
    else:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        prompt = [message for message, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if not prompt or len(chosen) != len(rejected) or len(prompt) != len(chosen) - 1:
            raise InputError(f"{where}: `chosen` and `rejected` must be the same conversation up to their last message")
    return {"prompt": prompt, "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _conversation(value: object, where: str, name: str) -> Messages:
    """One side as messages that end with the assistant."""
    if isinstance(value, str):
        turns = TURN.split(value)
        if turns[0].strip() or len(turns) < 5:
            messages = [{"role": "assistant", "content": value}]
        else:
            messages = [
                {"role": ROLES[role], "content": text.strip()} for role, text in zip(turns[1::2], turns[2::2], strict=True)
            ]
    else:
        messages = as_messages(value, where, name)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise InputError(f"{where}: `{name}` must end with a response of the assistant that is not empty")
    return messages
