"""From demonstrations to the token ids that are trained on."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from baton.demonstrations import text_token_ids
from baton.drops import Drops
from baton.models.templates import (
    FOREIGN,
    FROM_TEXT,
    OTHER_TEMPLATE,
    SAMPLED,
    decodes_to,
    has_stopped,
    prompt_token_ids,
    response_pieces,
    template_hash,
)
from baton.records import Messages

PLAIN = "plain texts, learnt whole"


class Demonstration(NamedTuple):
    """A conversation that ends with the assistant, or a text that is learnt whole.

    Of its last turn, where it was sampled, the token ids, the finish reason, and the hash of the chat template.
    """

    where: str
    messages: Messages | str
    token_ids: list[int] | None
    finish_reason: str | None
    template: str | None = None


def rows_of_demonstrations(
    tokenizer: Any, max_length: int, demonstrations: Iterable[Demonstration], drops: Drops, counted: Counter[str]
) -> Iterator[dict[str, list[int]]]:
    """Yield the row of each demonstration that fits; `counted` gets where their last responses' token ids come from.

    Sampled token ids that answered a prompt in another chat template than this tokenizer's are counted too.
    """
    template = template_hash(tokenizer)
    for demonstration in demonstrations:
        row, source = row_of(tokenizer, demonstration)
        if len(row["input_ids"]) > max_length:
            drops.add(f"longer than max_length {max_length} tokens", demonstration.where)
        elif all(label == -100 for label in row["labels"]):
            drops.add("no token to learn", demonstration.where)
        else:
            counted[source] += 1
            if source == SAMPLED and demonstration.template not in (None, template):
                counted[f"{OTHER_TEMPLATE} {demonstration.template}"] += 1
            yield row


def row_of(tokenizer: Any, demonstration: Demonstration) -> tuple[dict[str, list[int]], str]:
    """A row `input_ids`, `labels` (-100 where nothing is learnt), and where the last response's token ids come from."""
    where, messages, sampled, finish_reason, _ = demonstration
    if isinstance(messages, str):
        ids = text_token_ids(tokenizer, messages)
        return {"input_ids": ids, "labels": ids}, PLAIN
    source = FOREIGN if sampled else FROM_TEXT
    if sampled and decodes_to(tokenizer, sampled, messages[-1]["content"]):
        pieces, source = [*_prompt_pieces(tokenizer, messages, where), (sampled, True)], SAMPLED
    else:
        pieces = response_pieces(tokenizer, messages, where, has_stopped(finish_reason))
    input_ids = [id_ for ids, _ in pieces for id_ in ids]
    return {"input_ids": input_ids, "labels": [id_ if learnt else -100 for ids, learnt in pieces for id_ in ids]}, source


def _prompt_pieces(tokenizer: Any, messages: Messages, where: str) -> list[tuple[list[int], bool]]:
    """`response_pieces` before the last response. Alone it is not seen by the template, which often leaves out thoughts."""
    *prompt, _ = messages
    if prompt and all(message["role"] != "assistant" for message in prompt):
        return [(prompt_token_ids(tokenizer, prompt, where), False)]
    return response_pieces(tokenizer, messages, where)[:-1]
