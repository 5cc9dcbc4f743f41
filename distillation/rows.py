"""From demonstrations and sampled responses to the token ids that are trained on."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from baton.demonstrations import demonstration_of, text_token_ids
from baton.drops import Drops
from baton.jsonl import Record
from baton.models.templates import (
    FOREIGN,
    FROM_TEXT,
    OTHER_TEMPLATE,
    SAMPLED,
    decodes_to,
    has_stopped,
    prompt_token_ids,
    response_pieces,
    sampled_or_tokenised,
    template_hash,
)
from baton.program import harmless
from baton.records import Messages, check_token_ids, how_sampled, prompt_of, responses_of

PLAIN = "plain texts, learnt whole"

Pieces = list[tuple[list[int], bool]]  # token ids, and whether they are learnt


class Example(NamedTuple):
    """A conversation that ends with the assistant, or a text that is learnt whole.

    Of its last turn, where it was sampled, the token ids, the finish reason, and the hash of the chat template. `generated`:
    nothing but the last turn is learnt.
    """

    where: str
    messages: Messages | str
    token_ids: list[int] | None
    finish_reason: str | None
    template: str | None
    generated: bool


def examples_of(record: Record, where: str) -> Iterator[Example]:
    """Yield what there is to learn from in a record: each response of a generated one, or one demonstration.

    Raises InputError naming `where` and the field.
    """
    if "responses" in record:
        prompt, template = prompt_of(record, where), record.get("chat_template_hash")
        for number, response in enumerate(responses_of(record, where)):
            sampled = how_sampled(record, number, "ids", "reason")
            messages = [*prompt, {"role": "assistant", "content": response}]
            yield Example(
                f"{where}, response {number + 1}", messages, sampled.get("ids"), sampled.get("reason"), template, True
            )
        return
    sampled = record.get("response_token_ids")
    if sampled is not None:
        check_token_ids(sampled, where, "response_token_ids")
    said = demonstration_of(record, where)
    yield Example(where, said, sampled, record.get("finish_reason"), record.get("chat_template_hash"), False)


def rows_of_examples(
    tokenizer: Any, max_length: int, examples: Iterable[Example], drops: Drops, counted: Counter[str]
) -> Iterator[dict[str, list[int]]]:
    """Yield `input_ids` and `labels` (-100 where nothing is learnt) of each example that fits.

    `counted` gets where the last responses' token ids come from, and how many were sampled with another chat template than this
    tokenizer's.
    """
    template = template_hash(tokenizer)
    for example in examples:
        pieces, source = pieces_of(tokenizer, example)
        input_ids = [id_ for ids, _ in pieces for id_ in ids]
        labels = [id_ if learnt else -100 for ids, learnt in pieces for id_ in ids]
        labels[:1] = [-100] * len(labels[:1])  # nothing predicts the first token
        if len(input_ids) > max_length:
            drops.add(f"longer than max_length {max_length} tokens", example.where)
        elif all(label == -100 for label in labels):
            drops.add("no token to learn", example.where)
        else:
            counted[source] += 1
            if source not in (FOREIGN, PLAIN) and example.template not in (None, template):
                counted[f"{OTHER_TEMPLATE} {harmless(str(example.template))}"] += 1
            yield {"input_ids": input_ids, "labels": labels}


def pieces_of(tokenizer: Any, example: Example) -> tuple[Pieces, str]:
    """A conversation as pieces of token ids, and where those of its last response come from."""
    where, messages, sampled, finish_reason, _, generated = example
    if isinstance(messages, str):
        return [(text_token_ids(tokenizer, messages), True)], PLAIN
    *prompt, last = messages
    if generated:
        ids, source = sampled_or_tokenised(tokenizer, prompt, last["content"], sampled, finish_reason, where)
        return [(prompt_token_ids(tokenizer, prompt, where), False), (ids, True)], source
    if not (sampled and decodes_to(tokenizer, sampled, last["content"])):
        return response_pieces(tokenizer, messages, where, has_stopped(finish_reason)), FOREIGN if sampled else FROM_TEXT
    if prompt and all(message["role"] != "assistant" for message in prompt):
        return [(prompt_token_ids(tokenizer, prompt, where), False), (sampled, True)], SAMPLED
    return [*response_pieces(tokenizer, messages, where)[:-1], (sampled, True)], SAMPLED
