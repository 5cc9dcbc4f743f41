"""Models to talk to: of a running server, in vLLM, or in Transformers. Each answers a conversation piece by piece.

A model has a `name`, the `template` hash of its prompts (None: not known here), and `answer(messages, seed)`: an iterator of
pieces of text, and last of all the `Completion`. An answer that is not read to its end is given up when the iterator is closed.
"""

import json
from collections.abc import Generator
from typing import Any

from baton.errors import InputError
from baton.models.templates import load_tokenizer, prompt_token_ids, template_hash
from baton.program import harmless
from baton.records import Messages
from baton.sampling import SWITCHED_OFF
from baton.servers.addresses import error_text, proxy_settings
from baton.sources import check_hub, check_model_path
from generation import engine, get_hf2
from generation.arguments import SamplingArguments
from generation.sampling import Completion, Task

Pieces = Generator[str | Completion]

WHERE = "the conversation"
OWN = ("top_k", "eos_ids", "min_new_tokens")  # settings that only vLLM's servers have


class TooLong(InputError):
    """The conversation leaves no room for an answer in the model's context."""


class LocalModel:
    """A model in this process, loaded at its first answer at the latest; vLLM gives up one model for another."""

    latest: "LocalModel | None" = None  # whose engine is vLLM's one of this process

    def __init__(self, arguments: get_hf2.Arguments):
        """Raises InputError where there is no such model, or no chat template."""
        self.name, self.arguments, self.sampler = arguments.model_name_or_path, arguments, None
        check_model_path(self.name)
        check_hub(self.name)
        self.tokenizer = load_tokenizer(self.name, arguments.chat_template, trust_remote_code=arguments.trust_remote_code)
        self.template = template_hash(self.tokenizer)
        if strange := [id_ for id_ in arguments.eos_ids if not 0 <= id_ < len(self.tokenizer)]:
            raise InputError(f"--eos_ids {strange[0]}: no token of {self.name}, which has {len(self.tokenizer)}")

    def answer(self, messages: Messages, seed: int) -> Pieces:
        """Raises TooLong, or InputError where the chat template refuses the messages."""
        token_ids = prompt_token_ids(self.tokenizer, messages, WHERE)
        self.load()
        context = self.sampler.context
        if context and len(token_ids) + min(self.arguments.max_new_tokens, context // 4) > context:
            raise TooLong(
                f"{self.name}: {len(token_ids)} tokens leave no room for an answer in the context of {context} tokens"
            )
        yield from self.sampler.stream(Task(0, WHERE, {"prompt": messages}, token_ids), seed)

    def load(self) -> None:
        """Load the model, unless it is there."""
        if self.arguments.backend == "hf":
            from generation import transformers_engine

            self.sampler = self.sampler or transformers_engine.start(self.arguments, self.tokenizer, already_done=0)
        elif LocalModel.latest is not self:
            LocalModel.latest = None  # its engine ends before the new one starts, which may fail
            self.sampler = engine.start(self.arguments, already_done=0)
            LocalModel.latest = self


class ServedModel:
    """A model at an OpenAI-compatible server, which applies its own chat template."""

    template = None

    def __init__(self, url: str, name: str | None, arguments: SamplingArguments, key: str | None):
        """Raises InputError where the server does not answer, or has no such model."""
        import httpx

        self.url, self.arguments = url, arguments
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(headers=headers, timeout=httpx.Timeout(10, read=None), **proxy_settings())
        listed = [model for model in self._listed() if isinstance(model, dict)]
        models = {model["id"]: model for model in listed if isinstance(model.get("id"), str)}
        self.name = name or next(iter(models), None)
        if self.name not in models:
            raise InputError(f"{url}: serves {harmless(', '.join(models)) or 'no model'}, not {self.name}")
        self.is_vllm = models[self.name].get("owned_by") == "vllm"
        own = [f"--{each}" for each in OWN if getattr(arguments, each) not in (-1, [], None)]
        if own and not self.is_vllm:
            raise InputError(f"{', '.join(own)}: vLLM's own, and {url} is no vLLM server")

    def answer(self, messages: Messages, seed: int) -> Pieces:
        """Raises TooLong, or InputError where the server refuses the request or ends the connection."""
        import httpx

        text, token_ids, reason = "", [], None
        try:
            with self.client.stream("POST", f"{self.url}/chat/completions", json=self._body(messages, seed)) as response:
                if response.status_code != 200:
                    response.read()
                    self._refuse(response)
                for piece, ids, ends in map(self._part, filter(_is_event, response.iter_lines())):
                    text, reason = text + piece, ends or reason
                    token_ids += ids
                    yield piece
        except httpx.HTTPError as error:
            raise InputError(f"{self.url}: {type(error).__name__}: {error}") from None
        yield Completion(text, token_ids or None, reason or "abort")  # an answer that was cut off has no end of turn

    def _body(self, messages: Messages, seed: int) -> dict[str, Any]:
        """The request, in the API's words, and in vLLM's own where a vLLM answers."""
        arguments = self.arguments
        body = {"model": self.name, "messages": messages, "stream": True, "seed": seed}
        body |= {"temperature": arguments.temperature, "top_p": arguments.top_p, "max_tokens": arguments.max_new_tokens}
        body |= {"stop": arguments.stop} if arguments.stop else {}
        if self.is_vllm:
            body |= {"top_k": arguments.top_k, **SWITCHED_OFF, "return_token_ids": True}
            body |= {"stop_token_ids": arguments.eos_ids} if arguments.eos_ids else {}
            body |= {"min_tokens": arguments.min_new_tokens} if arguments.min_new_tokens else {}
        return body

    def _part(self, line: str) -> tuple[str, list[int], str | None]:
        """Text, token ids and finish reason in a stream's event, as far as it has them. Raises InputError for an error."""
        try:
            event = json.loads(line.removeprefix("data:"))
            if "error" in event:
                raise InputError(f"{self.url}: {harmless(str(event['error']))}")
            choice = (event.get("choices") or [{}])[0]
            text = (choice.get("delta") or {}).get("content") or ""
            text = text.encode(errors="replace").decode()  # half of a surrogate pair can be neither sent back nor saved
            return text, list(choice.get("token_ids") or ()), choice.get("finish_reason")
        except (ValueError, TypeError, AttributeError, LookupError):
            raise InputError(f"{self.url}: an answer that is not one of the OpenAI API: {line[:60]!r}") from None

    def _listed(self) -> list[Any]:
        import httpx

        try:
            response = self.client.get(f"{self.url}/models")
        except httpx.HTTPError as error:
            raise InputError(f"{self.url}: does not answer ({type(error).__name__}: {error}); is the server up?") from None
        if response.status_code != 200:
            self._refuse(response)
        try:
            return list(response.json()["data"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.url}/models: not an answer of an OpenAI-compatible server") from None

    def _refuse(self, response: Any) -> None:
        """Raise what a refusal says."""
        text = f"{self.url}: HTTP {response.status_code}: {error_text(response)}"
        if response.status_code in (401, 403):
            raise InputError(f"{text}; give the key with --api_key or VLLM_API_KEY")
        raise TooLong(text) if response.status_code == 400 and "context" in text else InputError(text)


def _is_event(line: str) -> bool:
    """Whether a line of the stream holds a part of the answer."""
    return line.startswith("data:") and line.strip() != "data: [DONE]"
