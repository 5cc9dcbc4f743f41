"""Conversations as toolkits write them, read as a list of {"role", "content"}.

[{"role", "content"}]                       OpenAI's messages; a content may be a list of parts of type `text`
[{"from", "value"}], [{"from", "content"}]  ShareGPT's and ColossalChat's
"\\n\\nHuman: …\\n\\nAssistant: …"              HH-RLHF's text
any other text                              one user turn
"""

import re
from itertools import takewhile

from baton.errors import InputError

Messages = list[dict[str, str]]

# How chat templates of wide use open a response.
OPENINGS = (
    "<|start_header_id|>assistant<|end_header_id|>",
    "<|im_start|>assistant",
    "<start_of_turn>model",
    "<|assistant|>",
    "[/INST]",
    "Correct Assistant:",
)

TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}

# Who speaks, under the names that ShareGPT and its relatives use.
SPEAKERS = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}


def as_messages(value: object, where: str, field: str) -> Messages:
    """A conversation as a list of {"role", "content"}; a plain string is one user turn, or HH-RLHF's turns.

    Raises InputError naming `where` and `field` for anything else, and for a text that a chat template has written.
    """
    if isinstance(value, str):
        return _of_text(value, where, field)
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `{field}` must be a string or a list of messages, got {short(value)}")
    for message in value:
        if not _is_plain(message):
            return [_as_message(message, where, field) for message in value]
    return value


def hh_turns(text: str) -> Messages | None:
    """The turns of HH-RLHF's text, at least two, or None for any other text."""
    if "Assistant:" not in text:  # what is searched for fast
        return None
    before, *parts = TURN.split(text)
    if before.strip() or len(parts) < 4:
        return None
    return [{"role": HH_ROLES[role], "content": said.strip()} for role, said in zip(parts[::2], parts[1::2], strict=True)]


def is_answered(messages: Messages) -> bool:
    """Whether a conversation ends with the assistant."""
    return messages[-1]["role"] == "assistant"


def without_answer(messages: Messages, where: str, field: str) -> Messages:
    """A conversation up to its last turn that is not the assistant's. Raises InputError if there is none."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if end == 0:
        raise InputError(f"{where}: `{field}` holds only what the assistant says; a prompt needs a turn of the user")
    return messages[:end]


def shared_beginning(first: Messages, second: Messages) -> Messages:
    """The messages that two conversations begin with alike, their last ones left out."""
    both = zip(first[:-1], second[:-1], strict=False)
    return [message for message, _ in takewhile(lambda pair: pair[0] == pair[1], both)]


def short(value: object) -> str:
    """A value as Python writes it, at most 60 characters of it, for an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _of_text(text: str, where: str, field: str) -> Messages:
    if not text.strip():
        raise InputError(f"{where}: `{field}` is empty")
    if text.rstrip().endswith(OPENINGS):
        raise InputError(
            f"{where}: `{field}` is a text that a chat template has written already, which would be written into another "
            "turn; give the messages that it was made from"
        )
    turns = hh_turns(text) if text.startswith("\n\n") else None
    if turns is None:
        return [{"role": "user", "content": text}]
    # HH-RLHF's prompts end where the assistant is about to speak.
    return turns if turns[-1]["content"] else turns[:-1]


def _is_plain(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def _as_message(message: object, where: str, field: str) -> dict[str, str]:
    """One message of another toolkit as {"role", "content"}; its other keys stay."""
    if not isinstance(message, dict):
        raise InputError(f"{where}: `{field}`: a message needs `role` and `content`, got {short(message)}")
    role, content = message.get("role"), message.get("content")
    if role is None and message.get("from") is not None:
        role = _role_of(message["from"], where, field)
        content = message.get("value") if content is None else content
    if not isinstance(role, str):
        raise InputError(
            f"{where}: `{field}`: a message needs `role` and `content` (or `from` and `value`), got {short(message)}"
        )
    if isinstance(content, list):
        content = _joined(content, where, field)
    if not isinstance(content, str):
        raise InputError(f"{where}: `{field}`: `content` must be a string, got {short(message)}")
    others = {name: value for name, value in message.items() if name not in ("from", "value", "role", "content")}
    return {"role": role, "content": content, **others}


def _role_of(speaker: object, where: str, field: str) -> str:
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise InputError(f"{where}: `{field}`: `from` must be one of {', '.join(SPEAKERS)}; got {short(speaker)}")
    return role


def _joined(parts: list[object], where: str, field: str) -> str:
    """The text of a content in parts, as APIs take it."""
    if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        raise InputError(f"{where}: `{field}`: a `content` in parts must hold texts alone, got {short(parts)}")
    return "".join(part["text"] for part in parts)
