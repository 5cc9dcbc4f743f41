"""From conversations and plain texts to rows of token ids, of which some are learnt."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from baton.demonstrations import demonstration_of, text_token_ids
from baton.drops import Drops
from baton.errors import InputError
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
from baton.program import harmless, rank
from baton.records import Messages, check_token_ids

log = logging.getLogger("baton")

PLAIN = "plain texts, learnt whole"
CUT = "further pieces of plain texts longer than max_length"

Row = dict[str, list[int]]
Pieces = list[tuple[list[int], bool]]  # token ids, and whether they are learnt


class Demonstration(NamedTuple):
    """A conversation that ends with the assistant, or a text that is learnt whole.

    Of its last turn, where it was sampled, the token ids, the finish reason, and the hash of the chat template. `generated`:
    nothing but the last turn is learnt.
    """

    where: str
    messages: Messages | str
    token_ids: list[int] | None
    finish_reason: str | None
    template: str | None = None
    generated: bool = False


def demonstration_in(record: Record, where: str) -> Demonstration:
    """The demonstration that a record holds. Raises InputError naming `where` and the field."""
    sampled = record.get("response_token_ids")
    if sampled is not None:
        check_token_ids(sampled, where, "response_token_ids")
    said = demonstration_of(record, where)
    return Demonstration(where, said, sampled, record.get("finish_reason"), record.get("chat_template_hash"))


class Rows(NamedTuple):
    """Rows of token ids, mapped from disk; of a long text there are several.

    How many demonstrations there were, what was dropped of them, and what was counted of the others, knows process 0, which
    alone reads them.
    """

    data: Any
    count: int
    drops: Drops
    counted: Counter[str]

    @property
    def kept(self) -> int:
        """How many demonstrations are in the rows."""
        return self.count - self.drops.counts.total()


def rows_of(
    read: Callable[[], Iterator[Demonstration]], source: str, name: str, max_length: int, tokenizer: Any, config: Any
) -> Rows:
    """The rows of the demonstrations that `read` yields of `source`, as a data set called `name`.

    To be called by all processes once the process group is there, or those of another machine would not notice that a record
    is bad. Raises InputError on the first bad one, and if no row is left.
    """
    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    count = sum(1 for _ in read()) if rank() == 0 else 0
    drops, counted = Drops(), Counter()

    def token_ids() -> Iterator[Row]:
        yield from tokenised(partial(rows_of_demonstrations, tokenizer, max_length), read(), drops, counted, count)
        if drops.counts.total() == count:
            raise InputError(f"{source}: nothing is left to learn from ({name}); dropped: {drops}")

    data = rows_on_disk(token_ids, config, name)
    log.info("%s: %s; dropped: %s", name, ", ".join(f"{number} {origin}" for origin, number in counted.items()), drops)
    return Rows(data, count, drops, counted)


def rows_of_demonstrations(
    tokenizer: Any, max_length: int, demonstrations: Iterable[Demonstration], drops: Drops, counted: Counter[str]
) -> Iterator[Row]:
    """Yield `input_ids` and `labels` (-100 where nothing is learnt) of each conversation that fits, and of all plain texts.

    A text longer than `max_length` tokens is cut into rows of that length. Of a row the first token is never learnt, since
    nothing predicts it. `counted` gets where the last responses' token ids come from, and how many were sampled with another
    chat template than this tokenizer's.
    """
    template = template_hash(tokenizer) if tokenizer.chat_template else None  # plain texts need none
    for demonstration in demonstrations:
        row, source = row_of(tokenizer, demonstration)
        rows = [_without_first(piece) for piece in (_cut(row, max_length) if source == PLAIN else [row])]
        if len(rows[0]["input_ids"]) > max_length:
            drops.add(f"longer than max_length {max_length} tokens", demonstration.where)
        elif all(label == -100 for label in rows[0]["labels"]):
            drops.add("no token to learn", demonstration.where)
        else:
            counted[source] += 1
            if len(rows) > 1:
                counted[CUT] += len(rows) - 1
            if source not in (FOREIGN, PLAIN) and demonstration.template not in (None, template):
                counted[f"{OTHER_TEMPLATE} {harmless(str(demonstration.template))}"] += 1
            yield from rows


def row_of(tokenizer: Any, demonstration: Demonstration) -> tuple[Row, str]:
    """A row `input_ids`, `labels` (-100 where nothing is learnt), and where the last response's token ids come from."""
    pieces, source = pieces_of(tokenizer, demonstration)
    input_ids = [id_ for ids, _ in pieces for id_ in ids]
    return {"input_ids": input_ids, "labels": [id_ if learnt else -100 for ids, learnt in pieces for id_ in ids]}, source


def pieces_of(tokenizer: Any, demonstration: Demonstration) -> tuple[Pieces, str]:
    """A demonstration as pieces of token ids, and where those of its last response come from."""
    where, messages, sampled, finish_reason, _, generated = demonstration
    if isinstance(messages, str):
        return [(text_token_ids(tokenizer, messages), True)], PLAIN
    *prompt, last = messages
    if generated:
        ids, source = sampled_or_tokenised(tokenizer, prompt, last["content"], sampled, finish_reason, where)
        return [(prompt_token_ids(tokenizer, prompt, where), False), (ids, True)], source
    if not (sampled and decodes_to(tokenizer, sampled, last["content"])):
        return response_pieces(tokenizer, messages, where, has_stopped(finish_reason)), FOREIGN if sampled else FROM_TEXT
    if prompt and all(message["role"] != "assistant" for message in prompt):
        # Alone, for a template often leaves out the thoughts of a response that it sees.
        return [(prompt_token_ids(tokenizer, prompt, where), False), (sampled, True)], SAMPLED
    return [*response_pieces(tokenizer, messages, where)[:-1], (sampled, True)], SAMPLED


def _cut(row: Row, length: int) -> list[Row]:
    """A row in pieces of so many tokens; of a last piece of one token nothing could be learnt."""
    starts = range(0, max(len(row["input_ids"]) - 1, 1), length)
    return [{name: values[start : start + length] for name, values in row.items()} for start in starts]


def _without_first(row: Row) -> Row:
    return {"input_ids": row["input_ids"], "labels": [-100] * len(row["labels"][:1]) + row["labels"][1:]}
