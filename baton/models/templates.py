"""Chat templates: from a conversation to the token ids that a model reads, and from sampled ids to their text."""

import hashlib
from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from baton.errors import InputError
from baton.records import Messages

# Where the token ids of a response come from.
SAMPLED = "responses with sampled token ids"
FROM_TEXT = "responses tokenised from text"
FOREIGN = "responses with another tokenizer's token ids"

# Counts of records that were sampled with another chat template than this one, by its hash.
OTHER_TEMPLATE = "records sampled with chat template"

PLACEHOLDER = "Response0"  # stands for a response; a template leaves letters and digits as they are
LINE_BREAK = "\n"


def load_tokenizer(
    model: str, chat_template: str | None = None, of_texts: bool = False, *, trust_remote_code: bool = False
) -> Any:
    """A model's tokenizer, with its chat template replaced by the file `chat_template` where one is given.

    Code beside the model runs with `trust_remote_code` alone. Raises InputError if the tokenizer cannot be loaded, or if there
    is no chat template, which plain texts alone (`of_texts`) do not need.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: its tokenizer cannot be loaded: {error}") from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"--chat_template {chat_template}: {error.strerror}") from None
    if tokenizer.chat_template is None and not of_texts:
        raise InputError(f"{model}: its tokenizer has no chat template; give one as a Jinja file with --chat_template")
    return tokenizer


def template_hash(tokenizer: Any) -> str:
    """The first 16 hexadecimal digits of SHA-256 over the Jinja text of the template that writes conversations.

    Of a tokenizer with several templates it is the default one. Raises InputError if there is none.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer has no chat template: {error}") from None
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def template_warning(counted: Mapping[str, int], tokenizer: Any) -> str | None:
    """What to say where `counted` holds records of OTHER_TEMPLATE, or None."""
    others = {name.rpartition(" ")[2]: count for name, count in counted.items() if name.startswith(OTHER_TEMPLATE) and count}
    if not others:
        return None
    sampled = ", ".join(f"{count} of template {other}" for other, count in others.items())
    return (
        f"records were sampled with another chat template ({sampled}) than the one that they are trained with "
        f"({template_hash(tokenizer)}): the policy reads other prompts than those that it answered. Give the template of the "
        "sampling: --chat_template FILE"
    )


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


def with_places(tokenizer: Any, prompt: Messages, response: str, ends: list[int], where: str) -> tuple[list[int], list[int]]:
    """The token ids of a conversation that ends with `response`, and the places in them where some of its beginnings end.

    `ends` are how many characters of the response each beginning has, at least one; its place is that of the token with its
    last character. Raises InputError if the template rewrites what is said, or the tokenizer does not tell where tokens stand.
    """
    messages = [*prompt, {"role": "assistant", "content": response}]
    opening, written, _ = _turn(tokenizer, messages, where)
    start = written.rfind(response.strip())  # templates may strip it, and write something of their own before it
    if start < 0:
        raise _rewritten(len(messages), where)
    if not tokenizer.is_fast:
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer does not tell which characters a token has: a fast one does")
    start += len(opening) - (len(response) - len(response.lstrip()))
    text = _text(tokenizer, messages, where, add_generation_prompt=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first = [begin for begin, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], [bisect_left(first, start + end) - 1 for end in ends]


def response_pieces(tokenizer: Any, messages: Messages, where: str, stopped: bool = True) -> list[tuple[list[int], bool]]:
    """A conversation as pieces of token ids, each with whether the assistant said it (and so is to be learnt).

    The pieces joined are the conversation as the template writes it, up to the end of the last response. What is learnt of a
    response ends with its end-of-turn token; the last one has that only if it `stopped` by itself. Text and responses are
    tokenised apart, as in generation, where the response's tokens follow those of the finished prompt.
    Raises InputError if there is no response, or if the template rewrites earlier turns.
    """
    pieces: list[tuple[list[int], bool]] = []
    written = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening, response, end = _turn(tokenizer, messages[: turn + 1], where)
        if not opening.startswith(written):
            raise _rewritten(turn + 1, where)
        pieces.append((_encode_after(tokenizer, written, opening[len(written) :]), False))
        ended = stopped or turn + 1 < len(messages)
        pieces.append((_encode_after(tokenizer, opening, response + end if ended else response), True))
        written = opening + response + end
    if not pieces:
        raise InputError(f"{where}: the conversation has no assistant message to learn from")
    return pieces


def response_token_ids(tokenizer: Any, prompt: Messages, response: str, stopped: bool, where: str) -> list[int]:
    """The token ids of `response` after `prompt`, with the end-of-turn token only if the policy really `stopped`."""
    opening, text, end = _turn(tokenizer, [*prompt, {"role": "assistant", "content": response}], where)
    return _encode_after(tokenizer, opening, text + end if stopped else text)


def sampled_or_tokenised(
    tokenizer: Any, prompt: Messages, response: str, sampled: list[int] | None, finish_reason: str | None, where: str
) -> tuple[list[int], str]:
    """The token ids of a response, and where they come from: SAMPLED, FROM_TEXT or FOREIGN.

    They are the `sampled` ids as they are, if this tokenizer is the one that sampled them, else those of the text, with the
    end-of-turn token where the response stopped by itself or nothing is known of that.
    """
    if sampled and decodes_to(tokenizer, sampled, response):
        return sampled, SAMPLED
    ids = response_token_ids(tokenizer, prompt, response, has_stopped(finish_reason), where)
    return ids, FOREIGN if sampled else FROM_TEXT


def has_stopped(finish_reason: str | None) -> bool:
    """Whether a response ended by itself, as far as is known."""
    return finish_reason in (None, "stop")


def end_token_id(tokenizer: Any, messages: Messages, where: str) -> int | None:
    """The token that ends the response of a conversation, or None where its template ends it with ordinary text."""
    *_, end = _turn(tokenizer, messages, where)
    ids = _encode(tokenizer, end)
    return ids[-1] if ids and ids[-1] in _marks(tokenizer).values() else None


def decodes_to(tokenizer: Any, ids: list[int], response: str) -> bool:
    """Whether sampled token ids are those of `response` under this tokenizer: that it is the one that sampled them.

    Texts that differ in one space at their start count as equal: engines decode after the prompt, and alone many decoders
    strip it. The tokens may say a little more than the text: engines leave out a stop string, a stop token and half a
    character where a response was cut off. A response without a word is only that of tokens without a word.
    """
    if any(not 0 <= id_ < len(tokenizer) for id_ in ids):
        return False
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    readings = (decoded, " " + decoded, decoded.removeprefix(" "))
    # A response that ended with an end-of-turn token did not end at a stop string.
    longer = bool(response.strip()) and not any(id_ in _marks(tokenizer).values() for id_ in ids[-1:])
    if response in readings or (longer and any(text.startswith(response) for text in readings)):
        return True
    if not response.strip() and not decoded.strip():
        return True
    # Prompts end with text or with a line break; the latter is a byte to some tokenizers, and bytes are read together.
    alone, after_break = (response_text(tokenizer, before, ids) for before in ([], _encode(tokenizer, LINE_BREAK)))
    return response in (alone, " " + alone, alone.removeprefix(" "), after_break)


def response_text(tokenizer: Any, prompt_ids: list[int], ids: list[int]) -> str:
    """The text that token ids say after those of the prompt, special tokens left out: what vLLM writes.

    It is read token by token, as vLLM does. So a first space stays, which many decoders strip from a text of its own; half a
    character at the end is left out; and half a character elsewhere does not spoil the whole ones beside it.
    """
    from tokenizers.decoders import DecodeStream

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        before, whole = (
            tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for part in (prompt_ids, [*prompt_ids, *ids])
        )
        return whole[len(before) :]
    stream, text = DecodeStream(ids=prompt_ids, skip_special_tokens=True), ""
    for id_ in ids:
        try:
            step = stream.step(backend, id_)
        except Exception as error:  # the only class that tokenizers raises
            if "Invalid prefix" not in str(error):
                raise
            stream = DecodeStream(skip_special_tokens=True)
            step = stream.step(backend, id_)
        text += step or ""
    return text


def _turn(tokenizer: Any, messages: Messages, where: str) -> tuple[str, str, str]:
    """The text before the last response, the response as the template writes it, and the end of its turn.

    What follows a response is seen where another one stands in its place, whatever either says. Raises InputError if the
    template writes the prompt differently once it is answered.
    """
    *prompt, message = messages
    opening = _text(tokenizer, prompt, where, add_generation_prompt=True) if prompt else ""
    closing = _text(tokenizer, messages, where, add_generation_prompt=False)
    other = _text(tokenizer, [*prompt, {**message, "content": PLACEHOLDER}], where, add_generation_prompt=False)
    _, found, rest = other.rpartition(PLACEHOLDER)
    if not found or not closing.startswith(opening) or not closing[len(opening) :].endswith(rest):
        raise _rewritten(len(messages), where)
    return opening, closing[len(opening) : len(closing) - len(rest)], _until_mark(tokenizer, rest)


def _rewritten(number: int, where: str) -> InputError:
    return InputError(
        f"{where}: the chat template writes message {number} differently once it is answered, so a response "
        "cannot be separated from its prompt; give another template with --chat_template"
    )


@lru_cache
def _until_mark(tokenizer: Any, rest: str) -> str:
    """What ends a turn: the text after a response, up to its first mark, such as `<|im_end|>` without the line break after it.

    Without a mark it is the whole text, its last spaces and line breaks left out if there is anything else.
    """
    places = {mark: rest.find(mark) for mark in _marks(tokenizer)}
    first = min(((place, -len(mark)) for mark, place in places.items() if place >= 0), default=None)
    if first is None:
        return rest.rstrip() or rest
    place, length = first
    return rest[: place - length]


@lru_cache
def _marks(tokenizer: Any) -> dict[str, int]:
    """The tokens that a text is not split into by chance, such as `<|eot_id|>`: all added ones, with their ids.

    A tokenizer names only some of them as its special tokens.
    """
    added = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _encode_after(tokenizer: Any, before: str, text: str) -> list[int]:
    """The token ids of a text that goes on after `before`, tokenised apart from it.

    Many tokenizers put a space before a text that they are given. So such a text is tokenised behind what is known to be a
    token of its own.
    """
    if before and text and _adds_space(tokenizer):
        anchor = max((mark for mark in _marks(tokenizer) if before.endswith(mark)), key=len, default=LINE_BREAK)
        start, ids = _encode(tokenizer, anchor), _encode(tokenizer, anchor + text)
        if ids[: len(start)] == start:
            return ids[len(start) :]
    return _encode(tokenizer, text)


@lru_cache
def _adds_space(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space before a text that has none."""
    after = _encode(tokenizer, LINE_BREAK + "a")[len(_encode(tokenizer, LINE_BREAK)) :]
    return after != _encode(tokenizer, "a")


def _text(tokenizer: Any, messages: Messages, where: str, **options: Any) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise InputError(f"{where}: the chat template cannot take this conversation: {error}") from None


def _encode(tokenizer: Any, text: Any) -> Any:
    """The token ids of a text, or of each of several. Those who cut or drop what is too long count it; no warning says it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
