"""Demonstrations for SFT from annotated responses: the best of each prompt, or all of them with their reward level."""

import bisect
from collections.abc import Iterator, Sequence

from annotate_data.filters import only
from baton.drops import Drops
from baton.jsonl import Record
from baton.pairs import PER_RESPONSE_KEYS
from baton.records import Messages, how_sampled, with_prefix

LOW = "best reward below min_reward"


def best_of_n(records: Iterator[tuple[str, Record]], min_reward: float | None, drops: Drops) -> Iterator[Record]:
    """Yield each prompt's best response as a demonstration; a best one below `min_reward` is a drop."""
    for record, best in _bests(records, min_reward, drops):
        yield demonstration(record, best, record["prompt"])


def best_alone(records: Iterator[tuple[str, Record]], min_reward: float | None, drops: Drops) -> Iterator[Record]:
    """Yield each record with its best response alone; `best_of` says of how many. A best one below `min_reward` is a drop."""
    for record, best in _bests(records, min_reward, drops):
        yield {**only(record, [best]), "best_of": len(record["responses"])}


def _bests(records: Iterator[tuple[str, Record]], min_reward: float | None, drops: Drops) -> Iterator[tuple[Record, int]]:
    """Yield each record with the index of its best response, the first of equals; one below `min_reward` is a drop."""
    for _, record in records:
        rewards = record["rewards"]
        best = max(range(len(rewards)), key=rewards.__getitem__)
        if min_reward is not None and rewards[best] < min_reward:
            drops.add(LOW, record["id"])
        else:
            yield record, best


def conditional(records: Iterator[tuple[str, Record]], edges: list[float], levels: Sequence[str]) -> Iterator[Record]:
    """Yield every response as a demonstration whose last user turn begins with the text of its reward level.

    `levels` are the texts, the lowest first; `edges` are the rewards, ascending, at which the next one begins. At inference, a
    prompt with the highest level requests a response of the highest rewards.
    """
    for where, record in records:
        for index, reward in enumerate(record["rewards"]):
            level = 1 + bisect.bisect_right(edges, reward)
            prompt = with_prefix(record["prompt"], f"{levels[level - 1]} ", where)
            yield {**demonstration(record, index, prompt), "reward_level": level}


def demonstration(record: Record, index: int, prompt: Messages) -> Record:
    """Response `index` of a record as a conversation to learn from, with its token ids and finish reason if they are known."""
    rest = {key: value for key, value in record.items() if key not in (*PER_RESPONSE_KEYS, "prompt", "context_messages")}
    messages = [*prompt, {"role": "assistant", "content": record["responses"][index]}]
    sampled = how_sampled(record, index, "response_token_ids", "finish_reason")
    return {**rest, "messages": messages, "reward": record["rewards"][index], **sampled}
