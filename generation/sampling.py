"""From prompt records to an engine's requests, and from its answers back to records."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.models.templates import prompt_text, prompt_token_ids, template_hash
from baton.pairs import PER_RESPONSE_KEYS
from baton.partial import PartialRecords
from baton.progress import Progress
from baton.prompts import PromptSet
from baton.sampling import seed_from
from generation.arguments import GenerationArguments

TEMPLATE_HASH = "chat_template_hash"


class Task(NamedTuple):
    """One prompt to sample K responses to: its place in the shard, its record, its token ids."""

    position: int
    where: str
    record: Record
    token_ids: list[int]


class Completion(NamedTuple):
    """One sampled response; `logps` are in nats, one for each token, of the distribution that was sampled."""

    text: str
    token_ids: Sequence[int] | None
    finish_reason: str | None
    logps: Sequence[float] | None = None


def prompt_seed(arguments: GenerationArguments, record: Record) -> int | None:
    """With --reproducible the prompt's own seed, from run seed, round and prompt id; else None."""
    return seed_from(arguments.seed, arguments.iter, record["id"]) if arguments.reproducible else None


def check_tokenizer(tokenizer: Any, arguments: GenerationArguments, prompts: PromptSet, shard: tuple[int, int]) -> None:
    """Raise InputError for end ids that are no tokens, and for the first prompt of the shard that the chat template refuses."""
    if strange := [id_ for id_ in arguments.eos_ids if not 0 <= id_ < len(tokenizer)]:
        raise InputError(f"--eos_ids {strange[0]}: no token of {tokenizer.name_or_path}, which has {len(tokenizer)}")
    for _, where, _, messages in prompts.shard(*shard):
        prompt_text(tokenizer, messages, where)


def unfinished(
    tokenizer: Any,
    prompts: PromptSet,
    shard: tuple[int, int],
    partial: PartialRecords,
    drops: Drops,
    context: int | None,
) -> Iterator[Task]:
    """Yield what is still to do; drop prompts that fill a context of `context` tokens (None: not known).

    The records say which chat template made the token ids, so that later stages can compare theirs.
    """
    template = {TEMPLATE_HASH: template_hash(tokenizer)}
    for position, where, record, messages in prompts.shard(*shard):
        if position in partial:
            continue
        token_ids = prompt_token_ids(tokenizer, messages, where)
        if context is None or len(token_ids) < context:
            yield Task(position, where, record | template, token_ids)
        else:
            reason = f"prompt longer than the context of {context} tokens"
            drops.add(reason, f"{record['id']} ({where}, {len(token_ids)} tokens)")


def write(sample: Callable[[Iterable[Task]], Iterator], tasks: Iterable[Task], partial: PartialRecords) -> int:
    """Have `sample` answer the tasks, and put each on disk once it is finished; returns the sampled tokens.

    `sample` yields (task, completions) in any order, completions as `Completion`s.
    """
    progress, tokens, start = Progress(partial.count, "prompts", partial.done), 0, time.monotonic()
    for task, completions in sample(tasks):
        record = generated(task.record, completions)
        partial.append(task.position, record)
        tokens += count_tokens(record)
        progress.update(note=f"{tokens / (time.monotonic() - start):.0f} tokens/s")
    progress.close()
    return tokens


def generated(record: Record, completions: Sequence[Completion]) -> Record:
    """The prompt's record with its K responses; what an engine does not give for all of them is left out.

    What the record says of earlier responses goes: the file of prompts may be one of generated records.
    """
    kept = {name: value for name, value in record.items() if name not in PER_RESPONSE_KEYS}
    record = {**kept, "responses": [completion.text for completion in completions]}
    if all(completion.token_ids is not None for completion in completions):
        record["response_token_ids"] = [list(completion.token_ids) for completion in completions]
    if all(completion.finish_reason is not None for completion in completions):
        record["finish_reasons"] = [completion.finish_reason for completion in completions]
    if all(completion.logps is not None for completion in completions):
        record["response_logps"] = [[_rounded(logp) for logp in completion.logps] for completion in completions]
    return record


def _rounded(logp: float) -> float:
    """6 significant digits: less than samplers and scorers differ by, and half the bytes."""
    return float(f"{logp:.6g}")


def count_tokens(record: Record) -> int:
    """The sampled tokens of a generated record, over all its responses."""
    return sum(map(len, record.get("response_token_ids", ())))
