"""From responses to the token ids of whole conversations, written by the scoring model's own chat template."""

from typing import Any

from annotate_data.work import Task
from baton.errors import InputError
from baton.models.templates import conversation_token_ids, encode_all
from baton.records import Messages

TRUNCATED = "truncated: longer than max_length tokens, so the conversation's beginning was left out"

# Of scorers that must know which tokens are the response's. A template may leave out its thoughts or blanks, for one.
REWRITTEN = "changed by the chat template, so that its tokens are not known: give another template with --chat_template"


def with_response(task: Task, index: int) -> Messages:
    """The conversation that ends with response `index`."""
    return [*task.prompt, {"role": "assistant", "content": task.responses[index]}]


def token_ids(tokenizer: Any, window: list[tuple[Task, int]], max_length: int) -> tuple[list[list[int]], list[str | None]]:
    """The token ids of each conversation, its last `max_length` at most, and a note for each that lost its beginning.

    The end is kept because a reward is read there, after the response. A task's `texts`, where it has them, are read as they
    are. Raises InputError naming the record that the chat template refuses, or whose text has no token.
    """
    written = [with_response(task, index) for task, index in window if task.texts is None]
    encoded = iter(encode_all(tokenizer, written, [task.where for task, _ in window if task.texts is None]) if written else ())
    sequences = [text_ids(tokenizer, task, index) if task.texts else next(encoded) for task, index in window]
    notes = [TRUNCATED if len(ids) > max_length else None for ids in sequences]
    return [ids[-max_length:] for ids in sequences], notes


def check_conversation(tokenizer: Any, task: Task, index: int) -> None:
    """Raise InputError, naming the record, where the chat template refuses the conversation with response `index`."""
    conversation_token_ids(tokenizer, with_response(task, index), task.where)


def text_ids(tokenizer: Any, task: Task, index: int) -> list[int]:
    """The token ids of a text that is read as it is. Raises InputError if it has none."""
    ids = tokenizer(task.texts[index], add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"{task.where}: a text without a token")
    return ids
