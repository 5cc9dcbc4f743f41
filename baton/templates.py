"""Chat templates: from a conversation to the token ids that a model reads."""

from pathlib import Path
from typing import Any

from baton.errors import InputError
from baton.records import Messages


def check_model_path(model: str) -> None:
    """Raise InputError, before any heavy import, if `model` is a local path that holds no model.

    A name of the form `owner/name` that is no local path is taken for a model of the Hugging Face hub.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
            raise InputError(f"{model}: no config.json in this folder, so it holds no model")
    elif path.exists():
        raise InputError(f"{model}: expected a model's folder, this is a file")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1 or path.parent.is_dir():
        raise InputError(f"{model}: no such folder, and not a Hugging Face name (`owner/name`)")


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


def prompt_token_ids(tokenizer: Any, messages: Messages, where: str) -> list[int]:
    """The token ids of a conversation up to where the response begins. Raises InputError if the template refuses it."""
    return _apply(tokenizer, messages, where, add_generation_prompt=True)


def conversation_token_ids(tokenizer: Any, messages: Messages, where: str) -> list[int]:
    """The token ids of a whole conversation, last response included. Raises InputError if the template refuses it."""
    return _apply(tokenizer, messages, where, add_generation_prompt=False)


def _apply(tokenizer: Any, messages: Messages, where: str, **options: Any) -> list[int]:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise InputError(f"{where}: the chat template cannot take this conversation: {error}") from None
