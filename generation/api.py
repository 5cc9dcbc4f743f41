"""The request to an OpenAI-compatible server for one prompt, and how its answer is read."""

from dataclasses import dataclass
from typing import Any

from baton.errors import FailuresListed, InputError
from baton.records import with_prefix
from baton.sampling import SWITCHED_OFF, words
from baton.servers.addresses import Refused, Transient
from baton.servers.answers import choices, sampled_logps
from baton.servers.pool import Servers
from generation.arguments import GenerationArguments, changed
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
        messages = with_prefix(task.record["prompt"], task.record.get("prompt_prefix"), task.where)
        path, prompt = "chat/completions", {"messages": messages}
    body = {**prompt, **_sampling(service, task, arguments)}
    return await service.servers.post(path, body, lambda answer: _completions(answer, arguments))


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
        body |= {"top_k": arguments.top_k, **SWITCHED_OFF, "return_token_ids": True}
        if service.context and task.token_ids:
            body["max_tokens"] = min(arguments.max_new_tokens, service.context - len(task.token_ids))
        if arguments.eos_ids:
            body["stop_token_ids"] = arguments.eos_ids
        if arguments.min_new_tokens:
            body["min_tokens"] = min(arguments.min_new_tokens, body["max_tokens"])
        if arguments.response_logps:
            body["logprobs"] = 0 if task.token_ids else True  # of no token but the sampled one
    elif arguments.top_k > 0 or arguments.eos_ids or arguments.response_logps or arguments.min_new_tokens:
        own = "--top_k, --eos_ids, --min_new_tokens and --response_logps"
        raise InputError(f"{own} are vLLM's own; these servers are not vLLM")
    return body


async def check_logps(service: Service, arguments: GenerationArguments) -> None:
    """Raise InputError if a server gives log-probabilities of another distribution than the one that is sampled.

    vLLM gives those of the model unless it is told otherwise. Where one token alone is allowed, it is sampled with probability
    1, whatever the model says of it. Raises FailuresListed where a server does not answer.
    """
    if not arguments.response_logps or service.engine != "vllm" or not changed(arguments):
        return
    body = {"model": service.model, "prompt": [0], "max_tokens": 1, "allowed_token_ids": [0], "logprobs": 0}
    try:
        answers = await service.servers.post_to_each("completions", body)
    except (Transient, Refused) as error:
        raise FailuresListed(f"whose log-probabilities the servers give cannot be found out: {error}") from None
    for url, answer in answers.items():
        if answer["choices"][0]["logprobs"]["token_logprobs"][0] < 0:
            raise InputError(
                f"{url}: gives the log-probabilities of the model, and not those of {words(changed(arguments))}; "
                "for --response_logps start it with `register_server.sh MODEL -- --logprobs-mode processed_logprobs`"
            )


def _completions(answer: dict[str, Any], arguments: GenerationArguments) -> list[Completion]:
    """The K responses in an answer. Raises Transient, Refused as answers.py does, and TypeError for text that is none."""
    return [_completion(choice, arguments.response_logps) for choice in choices(answer, arguments.K)]


def _completion(choice: dict[str, Any], with_logps: bool) -> Completion:
    text = choice["message"].get("content") if "message" in choice else choice.get("text")
    if not isinstance(text, str | None):
        raise TypeError(f"a response is text, not {type(text).__name__}")
    token_ids = choice.get("token_ids") if isinstance(choice.get("token_ids"), list) else None
    logps = sampled_logps(choice, token_ids) if with_logps else None
    return Completion(text or "", token_ids, choice.get("finish_reason"), logps)
