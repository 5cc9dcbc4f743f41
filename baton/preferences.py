"""Offline preference records of every common shape, read as (prompt, chosen, rejected).

{"prompt", "chosen", "rejected"}    texts, or messages; chosen and rejected may repeat the prompt
{…, "margin"}                       Baton's own pairs: a prompt of messages, texts that are taken as they stand
{"chosen", "rejected"}              whole conversations: messages, or text with "\\n\\nHuman:" and "\\n\\nAssistant:" turns
{"context", "chosen", "rejected"}   ColossalChat's; with `conversations` or `instruction` instead, LLaMA-Factory's
{"prompt", "pos_answers", "neg_answers"}    ReaL's: the first good answer against the first bad one, and so on
responses with scores               annotated records, UltraFeedback, HelpSteer: the best against the worst, and so on
"""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace

from baton.conversations import as_messages, hh_turns, shared_beginning, short
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.pairs import PairSettings, pairs_of
from baton.prompts import with_ids
from baton.records import Messages, prompt_of, with_system
from baton.scored import ALONE, annotated_of, has_completions, with_rows_merged

ANSWER_KEYS = ("pos_answers", "neg_answers")


def preference_records(
    records: Iterable[tuple[str, Record]],
    max_pairs_per_prompt: int | None = None,
    score: str | None = None,
    drops: Drops | None = None,
) -> Iterator[tuple[str, Record]]:
    """Yield records with `prompt` as messages, `chosen` and `rejected` as texts, and an `id`; other keys stay.

    A record with several answers gives several pairs: see `preferences_in`. `score` is the key of scores that have an
    unusual name. `drops` gets what makes no pair.
    """
    pairs = (
        (where, pair)
        for where, record in with_rows_merged(records, score)
        for pair in preferences_in(record, where, max_pairs_per_prompt, score, drops)
    )
    yield from with_ids(pairs)


def preferences_in(
    record: Record,
    where: str,
    max_pairs_per_prompt: int | None = None,
    score: str | None = None,
    drops: Drops | None = None,
) -> list[Record]:
    """The pairs that a record holds, each with the record's other keys. Raises InputError naming what is wrong.

    Of responses with rewards the best is set against the worst, then the best and worst of the others; without
    `max_pairs_per_prompt` there is one such pair. Of good and bad answers there are at most so many, without it all. `drops`
    gets a reason for each pair that would say nothing.
    """
    if "responses" in record or has_completions(record):
        return _of_rewards(record, where, max_pairs_per_prompt or 1, score, drops)
    if "chosen" not in record and not record.keys().isdisjoint(ANSWER_KEYS):
        return _of_answers(record, where, max_pairs_per_prompt)
    return [record | preference_of(record, where)]


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
        prompt = shared_beginning(chosen, rejected)
        if not prompt or len(chosen) != len(rejected) or len(prompt) != len(chosen) - 1:
            raise InputError(f"{where}: `chosen` and `rejected` must be the same conversation up to their last message")
        if prompt[0]["role"] == "assistant":
            if record.get("prompt") is None:
                raise InputError(f"{where}: `chosen` begins with the assistant, and there is no `prompt` before it")
            prompt = [*prompt_of(record, where), *prompt]
        prompt = with_system(prompt, record)
    return {"prompt": prompt, "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _conversation(value: object, where: str, name: str) -> Messages:
    """One side as messages that end with the assistant."""
    if isinstance(value, str):
        messages = hh_turns(value) or [{"role": "assistant", "content": value}]
    else:
        messages = as_messages([value] if isinstance(value, dict) else value, where, name)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise InputError(f"{where}: `{name}` must end with a response of the assistant that is not empty")
    return messages


def _of_answers(record: Record, where: str, most: int | None) -> list[Record]:
    """ReaL's pairs: good answer i against bad answer i."""
    sides = []
    for name in ANSWER_KEYS:
        answers = record.get(name)
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise InputError(f"{where}: `{name}` must be a list of at least one text that is not empty, got {short(answers)}")
        sides.append(answers)
    good, bad = sides
    if len(good) != len(bad):
        raise InputError(f"{where}: {len(good)} `pos_answers` for {len(bad)} `neg_answers`; the pairs need as many of each")
    others = {name: value for name, value in record.items() if name not in ANSWER_KEYS}
    prompt = prompt_of(record, where)
    return [others | {"prompt": prompt, "chosen": a, "rejected": b} for a, b in list(zip(good, bad, strict=True))[:most]]


def _of_rewards(record: Record, where: str, most: int, score: str | None, drops: Drops | None) -> list[Record]:
    # New Drops would name each in the log.
    counts = SimpleNamespace(add=lambda reason, name: None) if drops is None else drops
    annotated = annotated_of(record, where, score)
    if annotated is not record and len(annotated["responses"]) < 2:
        counts.add(ALONE, where)
        return []
    return list(pairs_of([(where, annotated)], PairSettings(pairs_per_prompt=most), counts))
