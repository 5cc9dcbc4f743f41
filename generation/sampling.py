"""From prompt records to what an engine is asked, and from its answers back to records."""

from collections.abc import Iterator
from typing import Any, Protocol

import xxhash

from baton.jsonl import Record
from baton.partial import PartialRecords
from baton.prompts import PromptSet
from baton.stage import Drops
from baton.templates import prompt_text, prompt_token_ids

TOO_LONG = "prompt longer than the context"


class SamplingArguments(Protocol):
    """The arguments of a generation program that say how to sample."""

    K: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: list[str]
    eos_ids: list[int]
    seed: int


def seed_from(*parts: object) -> int:
    """A seed within 0 … 2^31-1 that differs, in all likelihood, whenever one of `parts` does."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode()) >> 33


def sampling_parameters(arguments: SamplingArguments) -> Any:
    """The arguments as vllm.SamplingParams: K samples of one prompt are one request."""
    from vllm import SamplingParams

    return SamplingParams(
        n=arguments.K,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_tokens=arguments.max_new_tokens,
        stop=arguments.stop or None,
        stop_token_ids=arguments.eos_ids or None,
    )


def check_templates(tokenizer: Any, prompts: PromptSet, shard: tuple[int, int]) -> None:
    """Raise InputError for the first prompt of the shard that the chat template refuses."""
    for _, where, _, messages in prompts.shard(*shard):
        prompt_text(tokenizer, messages, where)


def unfinished(
    tokenizer: Any,
    prompts: PromptSet,
    shard: tuple[int, int],
    partial: PartialRecords,
    drops: Drops,
    context: int,
) -> Iterator[tuple[int, Record, list[int]]]:
    """Yield (position, record, prompt token ids) of what is to do; drop prompts of `context` tokens."""
    for position, where, record, messages in prompts.shard(*shard):
        if position in partial:
            continue
        token_ids = prompt_token_ids(tokenizer, messages, where)
        if len(token_ids) < context:
            yield position, record, token_ids
        else:
            drops.add(f"{TOO_LONG} of {context} tokens", f"{record['id']} ({where}, {len(token_ids)} tokens)")


def generated(record: Record, completions: list[Any]) -> Record:
    """The prompt's record with its K responses, from K vllm.CompletionOutput."""
    return {
        **record,
        "responses": [completion.text for completion in completions],
        "response_token_ids": [list(completion.token_ids) for completion in completions],
        "finish_reasons": [completion.finish_reason for completion in completions],
    }


def count_tokens(record: Record) -> int:
    """The sampled tokens of a generated record, over all its responses."""
    return sum(map(len, record.get("response_token_ids", ())))
