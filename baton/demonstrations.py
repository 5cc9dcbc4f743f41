"""Demonstrations of every common shape, read as a conversation that ends with the assistant, or as a plain text.

{"messages"}, {"conversations"}                      OpenAI's, ShareGPT's and ColossalChat's conversations
{"prompt", "response"}, also `completion`, `answer`  a prompt as text or messages, and what is said to it
{"instruction", "input", "output"}                   Alpaca's
{"response": a whole conversation}                   named by --output_key, such as `chosen` of HH-RLHF's pairs
{"text"}, {"source": "", "Target"}                   continued pretraining, the second ColossalChat's: every token is learnt
"""

from typing import Any

from baton.conversations import as_messages, hh_turns, is_answered, short
from baton.errors import InputError
from baton.jsonl import Record
from baton.records import CONVERSATION_KEYS, Messages, and_system, named, prompt_as_written, with_system

RESPONSE_KEYS = ("response", "completion", "output", "answer")
# ColossalChat's text for continued pretraining: an empty system instruction, and the text.
TEXT_KEYS = ("source", "Target")


def demonstration_of(record: Record, where: str) -> Messages | str:
    """A demonstration as a conversation that ends with the assistant, or a plain text. Raises InputError if it is neither."""
    return demonstration_as_written(record, where)[0]


def demonstration_record(record: Record, where: str) -> Record:
    """A demonstration as Baton's record: `messages`, or `text`, and the keys that neither was read from."""
    demonstration, keys = demonstration_as_written(record, where)
    others = {name: value for name, value in record.items() if name not in keys}
    return others | {"text" if isinstance(demonstration, str) else "messages": demonstration}


def is_colossal_text(record: Record) -> bool:
    """Whether a record is ColossalChat's text for continued pretraining."""
    return record.keys() >= set(TEXT_KEYS) and record["source"] == ""


def text_token_ids(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a plain text, with the special tokens that the tokenizer puts around it and the end of a text."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def demonstration_as_written(record: Record, where: str) -> tuple[Messages | str, tuple[str, ...]]:
    """What a record demonstrates, and the keys that it was read from. Raises InputError naming what is wrong."""
    response_key = next((name for name in RESPONSE_KEYS if record.get(name) is not None), None)
    conversation_key = next((name for name in CONVERSATION_KEYS if record.get(name) is not None), None)
    if conversation_key:
        messages, keys = prompt_as_written(record, where, conversation_key)
        if is_answered(messages) or response_key is None:
            return _answered(messages, conversation_key, where), keys
    if response_key is None:
        return _without_response(record, where)
    if "label" in record:
        raise InputError(
            f"{where}: has a `label`, so `{response_key}` may be one to avoid. dpo_iteration/run_kto.py learns from both; "
            "as demonstrations give a file of good ones without `label`"
        )
    if conversation := _whole_conversation(record, response_key, where):
        return with_system(conversation, record), and_system(record, (response_key,))
    prompt, keys = prompt_as_written(record, where)
    return [*prompt, *_responses(record, response_key, where)], (*keys, response_key)


def _without_response(record: Record, where: str) -> tuple[Messages | str, tuple[str, ...]]:
    """A conversation under the prompt's key, or a text."""
    if isinstance(record.get("prompt"), list):
        messages, keys = prompt_as_written(record, where)
        return _answered(messages, "prompt", where), keys
    keys = TEXT_KEYS if is_colossal_text(record) else ("text",)
    text = record.get(keys[-1])
    if isinstance(text, str) and "prompt" not in record and "instruction" not in record:
        if not text.strip():
            raise InputError(f"{where}: `{keys[-1]}` is empty")
        return text, keys
    raise InputError(
        f"{where}: a demonstration needs `messages`, or a prompt and its response ("
        f"{', '.join(f'`{key}`' for key in RESPONSE_KEYS)}), or `text`; the record has {named(record)}; name the key of the "
        "response with --output_key"
    )


def _answered(messages: Messages, name: str, where: str) -> Messages:
    """`messages`, which must end with the assistant."""
    if not is_answered(messages):
        raise InputError(f"{where}: `{name}` must end with the assistant, this ends with {messages[-1]['role']!r}")
    return messages


def _says_something(messages: Messages, record: Record) -> bool:
    # A policy that stopped at once said nothing in text, but something in tokens.
    return bool(messages[-1]["content"].strip() or record.get("response_token_ids"))


def _whole_conversation(record: Record, key: str, where: str) -> Messages | None:
    """What stands under the response's key, where that is a whole conversation: messages, or HH-RLHF's text without prompt."""
    value = record[key]
    if isinstance(value, list) and len(value) > 1:
        messages = as_messages(value, where, key)
        return messages if messages[0]["role"] != "assistant" and is_answered(messages) else None
    if isinstance(value, str) and "prompt" not in record and "instruction" not in record:
        messages = hh_turns(value)
        return messages if messages and is_answered(messages) and messages[-1]["content"] else None
    return None


def _responses(record: Record, key: str, where: str) -> Messages:
    """What the assistant says to the prompt: a text, or messages."""
    value = record[key]
    if isinstance(value, list | dict):
        messages = as_messages(value if isinstance(value, list) else [value], where, key)
        if is_answered(messages) and _says_something(messages, record):
            return messages
    elif isinstance(value, str) and (value.strip() or record.get("response_token_ids")):
        return [{"role": "assistant", "content": value}]
    raise InputError(f"{where}: `{key}` must be a text that is not empty (see --output_key), got {short(value)}")
