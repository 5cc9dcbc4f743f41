"""Chat templates: from a conversation to the token ids that a model reads."""

from pathlib import Path
from typing import Any

from baton.errors import InputError
from baton.records import Messages


def load_tokenizer(model: str, chat_template: str | None = None) -> Any:
    """A model's tokenizer, with its chat template replaced by the file `chat_template` where one is given.

    Raises InputError if the tokenizer cannot be loaded, or if there is no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: its tokenizer cannot be loaded: {error}") from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"--chat_template {chat_template}: {error.strerror}") from None
    if tokenizer.chat_template is None:
        raise InputError(f"{model}: its tokenizer has no chat template; give one as a Jinja file with --chat_template")
    return tokenizer


def prompt_text(tokenizer: Any, messages: Messages, where: str) -> str:
    """The text of a conversation up to where the response begins. Raises InputError if the template refuses it."""
    return _text(tokenizer, messages, where, add_generation_prompt=True)


def prompt_token_ids(tokenizer: Any, messages: Messages, where: str) -> list[int]:
    """The token ids of a conversation up to where the response begins. Raises InputError if the template refuses it."""
    return _encode(tokenizer, prompt_text(tokenizer, messages, where))


def conversation_token_ids(tokenizer: Any, messages: Messages, where: str) -> list[int]:
    """The token ids of a whole conversation, last response included. Raises InputError if the template refuses it."""
    return _encode(tokenizer, _text(tokenizer, messages, where, add_generation_prompt=False))


def encode_all(tokenizer: Any, conversations: list[Messages], wheres: list[str]) -> list[list[int]]:
    """`conversation_token_ids` of many conversations, tokenised in parallel; `wheres` names each in an error."""
    import jinja2

    try:
        texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    except (jinja2.TemplateError, TypeError, KeyError):  # one by one, to name the record
        return [conversation_token_ids(tokenizer, *both) for both in zip(conversations, wheres, strict=True)]
    return _encode(tokenizer, texts)


def response_pieces(tokenizer: Any, messages: Messages, where: str) -> list[tuple[list[int], bool]]:
    """A conversation as pieces of token ids, each with whether the assistant said it (and so is to be learnt).

    The pieces joined are the conversation as the template writes it, up to the end-of-turn token of the last response. Text
    and responses are tokenised apart, as in generation, where the response's tokens follow those of the finished prompt.
    Raises InputError if there is no response, or if the template rewrites earlier turns.
    """
    pieces: list[tuple[list[int], bool]] = []
    written = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening = _text(tokenizer, messages[:turn], where, add_generation_prompt=True) if turn else ""
        closing = _text(tokenizer, messages[: turn + 1], where, add_generation_prompt=False)
        if not opening.startswith(written) or not closing.startswith(opening):
            raise InputError(
                f"{where}: the chat template writes message {turn + 1} differently once it is answered, so a response "
                "cannot be separated from its prompt; give another template with --chat_template"
            )
        pieces.append((_encode(tokenizer, opening[len(written) :]), False))
        pieces.append((_encode(tokenizer, closing[len(opening) :]), True))
        written = closing
    if not pieces:
        raise InputError(f"{where}: the conversation has no assistant message to learn from")
    ids, _ = pieces.pop()
    return [*pieces, (until_end_of_turn(tokenizer, ids), True)]


def response_token_ids(tokenizer: Any, prompt: Messages, response: str, stopped: bool, where: str) -> list[int]:
    """The token ids of `response` after `prompt`, with the end-of-turn token only if the policy really `stopped`."""
    ids, _ = response_pieces(tokenizer, [*prompt, {"role": "assistant", "content": response}], where)[-1]
    while ids and not stopped and ids[-1] in tokenizer.all_special_ids:
        ids = ids[:-1]
    return ids


def until_end_of_turn(tokenizer: Any, ids: list[int]) -> list[int]:
    """`ids` without what a template writes after the last special token, such as a line break after `<|im_end|>`."""
    special = set(tokenizer.all_special_ids)
    end = next((place for place in range(len(ids), 0, -1) if ids[place - 1] in special), len(ids))
    return ids[:end]


def decodes_to(tokenizer: Any, ids: list[int], response: str) -> bool:
    """Whether sampled token ids are those of `response` under this tokenizer: that it is the one that sampled them.

    The tokens may say a little more: engines leave a stop string, and half a character where a response was cut
    off, out of the text.
    """
    if any(not 0 <= id_ < len(tokenizer) for id_ in ids):
        return False
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decoded.startswith(response)


def _text(tokenizer: Any, messages: Messages, where: str, **options: Any) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise InputError(f"{where}: the chat template cannot take this conversation: {error}") from None


def _encode(tokenizer: Any, text: Any) -> Any:
    """The token ids of a text, or of each of several."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
