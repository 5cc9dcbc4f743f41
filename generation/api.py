"""The request to an OpenAI-compatible server for one prompt, and how its answer is read."""

from dataclasses import dataclass
from typing import Any

from baton.errors import InputError
from baton.servers.pool import Refused, Servers, Transient
from generation.arguments import GenerationArguments
from generation.sampling import Completion, Task, prompt_seed


@dataclass(frozen=True)
class Service:
    """A model at some servers. `engine` is their make, as they say; `context` in tokens, None if they do not."""

    servers: Servers
    model: str
    engine: str
    context: int | None

    @classmethod
    async def find(cls, servers: Servers, name: str | None) -> "Service":
        """The model called `name`, or the one that the servers serve. Raises InputError if there is none."""
        models = {model.get("id"): model for model in await servers.models()}
        name = name or next(iter(models), None)
        if name is None:
            raise InputError("the servers name no model; give --model")
        if models and name not in models:
            raise InputError(f"--model {name}: the servers serve {', '.join(map(str, models))}")
        known = models.get(name, {})
        return cls(servers, name, str(known.get("owned_by", "unknown")), known.get("max_model_len"))


async def ask(service: Service, task: Task, arguments: GenerationArguments) -> list[Completion]:
    """K responses to a prompt. Raises Transient, Refused or FailuresListed as `Servers.post` does."""
    if task.token_ids:
        path, prompt = "completions", {"prompt": task.token_ids}
    else:
        path, prompt = "chat/completions", {"messages": task.record["prompt"]}
    answer = await service.servers.post(path, {**prompt, **_sampling(service, task, arguments)})
    return _completions(answer, arguments.K)


def _sampling(service: Service, task: Task, arguments: GenerationArguments) -> dict[str, Any]:
    """How to sample, in the API's words, and in vLLM's own where a vLLM answers."""
    body: dict[str, Any] = {
        "model": service.model,
        "n": arguments.K,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "max_tokens": arguments.max_new_tokens,
    }
    if arguments.stop:
        body["stop"] = arguments.stop
    if (seed := prompt_seed(arguments, task.record)) is not None:
        body["seed"] = seed
    if service.engine == "vllm":
        # The defaults in a model's generation_config.json are not those of this run.
        body |= {"top_k": arguments.top_k, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        if service.context and task.token_ids:
            body["max_tokens"] = min(arguments.max_new_tokens, service.context - len(task.token_ids))
        if arguments.eos_ids:
            body["stop_token_ids"] = arguments.eos_ids
    elif arguments.top_k > 0 or arguments.eos_ids:
        raise InputError("--top_k and --eos_ids are vLLM's own; these servers are not vLLM")
    return body


def _completions(answer: dict[str, Any], count: int) -> list[Completion]:
    """The completions in an answer, in the order of their index. Raises Transient if it is not one of `count`."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Transient("an answer without `choices`")
    if len(choices) != count:
        raise Refused(f"{len(choices)} responses instead of {count}: the server may not support `n`")
    return [_completion(choice) for choice in sorted(choices, key=lambda choice: choice.get("index", 0))]


def _completion(choice: dict[str, Any]) -> Completion:
    text = choice["message"].get("content") if "message" in choice else choice.get("text")
    token_ids = choice.get("token_ids")
    return Completion(text or "", token_ids if isinstance(token_ids, list) else None, choice.get("finish_reason"))
