"""Responses from vLLM servers to prompts of token ids, as a call that a program makes: token ids in, token ids out.

The requests run in a thread of their own, so that a program can compute, or train, while they do.
"""

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
import xxhash

from baton.errors import FailuresListed, InputError
from baton.sampling import SWITCHED_OFF
from baton.servers.addresses import Refused, Transient
from baton.servers.answers import choices, sampled_logps
from baton.servers.pool import PER_SERVER, Servers, base_url

DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, **SWITCHED_OFF}


class Sampled(NamedTuple):
    """The responses to one prompt, n of each; the last token of one with finish reason `stop` is the end token.

    `logps` are in nats, one for each token, of the distribution that was sampled (`--logprobs-mode processed_logprobs`).
    """

    token_ids: list[list[int]]
    finish_reasons: list[str]
    logps: list[list[float]]
    texts: list[str]


class Rollouts:
    """Equal vLLM servers at `urls`, used through `sample`, from any thread, one call at a time; to be closed, or a context.

    per_server: responses in flight at a server, those of two requests at least. timeout: seconds for one answer. max_retries:
    attempts at a request after the first, which go to another server if there is one. patience: seconds to wait while no server
    at all is alive.

    Raises InputError if no server answers, they serve different models, or refuse the API key.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None,
        *,
        per_server: int = PER_SERVER,
        timeout: float = 600.0,
        max_retries: int = 8,
        patience: float = 60.0,
    ):
        self.loop = asyncio.new_event_loop()
        self.results: queue.SimpleQueue[tuple[int, Sampled] | BaseException] | None = None  # of the last call of `sample`
        self.thread = threading.Thread(target=self.loop.run_forever, name="rollouts", daemon=True)
        self.thread.start()
        self.per_server = per_server
        try:
            self._run(self._open([base_url(url) for url in urls], api_key, timeout, max_retries, patience))
        except BaseException:
            self._end_loop()
            raise

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections and the thread."""
        self._run(self.servers.close())
        self._end_loop()

    def sample(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Mapping[str, Any],
        seeds: Sequence[int],
        version: int | None = None,
    ) -> Iterator[tuple[int, Sampled]]:
        """(index of a prompt, n responses to it), in the order in which they come in.

        `prompts` are token ids, `seeds` one for each of them, any numbers that differ. `sampling` are parameters of vLLM's
        /v1/completions, `max_tokens` among them, which the model's context bounds. The requests begin with the call; they end
        with the iterator. With a `version`, servers whose weights are of another one are set aside until they have it: one that
        was started anew has those of its beginning.

        Raises InputError for a prompt as long as the context or a request that the servers refuse, FailuresListed for one that
        no attempt has answered, or where no server is alive.
        """
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.context:
                raise InputError(f"prompt {index}: {len(prompt)} tokens; the servers take 1 to {self.context - 1}")
        bodies = [self._body(prompt, n, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        results: queue.SimpleQueue[tuple[int, Sampled] | BaseException] = queue.SimpleQueue()
        asking = asyncio.run_coroutine_threadsafe(self._ask_all(bodies, n, version, results), self.loop)
        self.results = results
        return self._results(len(bodies), results, asking.cancel)

    def cancel(self) -> None:
        """End the call of `sample` that runs, if one does, from another thread: it raises FailuresListed."""
        if self.results is not None:
            self.results.put(FailuresListed("the sampling was cancelled"))

    def _results(self, count: int, results: queue.SimpleQueue, cancel) -> Iterator[tuple[int, Sampled]]:
        try:
            for _ in range(count):
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            cancel()

    async def _open(self, urls: list[str], *settings: Any) -> None:
        self.servers, self.version = Servers(urls, *settings, self._has_version), None
        try:
            self.model, self.context = common_model(await self.servers.models())
        except BaseException:
            await self.servers.close()
            raise

    async def _has_version(self, client: httpx.AsyncClient, url: str) -> bool:
        if self.version is None:
            return True
        answer = await client.get(f"{url.removesuffix('/v1')}/weight_info", timeout=10)
        return answer.status_code == 200 and answer.json().get("weight_version") == str(self.version)

    async def _ask_all(self, bodies: list[dict[str, Any]], n: int, version: int | None, results: queue.SimpleQueue) -> None:
        """Put what `sample` gives into `results`; the first failure ends all."""
        free, tasks = asyncio.Semaphore(max(self.per_server // n, 2) * len(self.servers.servers)), []

        async def ask(index: int) -> None:
            async with free:
                results.put((index, await self._ask(bodies[index], n, f"prompt {index}")))

        try:
            self.version = version
            await self.servers.check_again()
            tasks += [asyncio.create_task(ask(index)) for index in range(len(bodies))]
            await asyncio.gather(*tasks)
        except Exception as error:
            results.put(error)
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(self, body: dict[str, Any], n: int, name: str) -> Sampled:
        try:
            return await self.servers.post("completions", body, lambda answer: sampled(answer, n))
        except Refused as refused:
            raise InputError(f"{name}: the server refuses the request: {refused}") from None
        except Transient as failure:
            raise FailuresListed(f"{name}: {failure}") from None

    def _body(self, prompt: list[int], n: int, sampling: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """A request, in which the defaults of a model's generation_config.json are not used."""
        body = {"model": self.model, **DEFAULTS, "max_tokens": self.context, **sampling, "prompt": prompt, "n": n}
        body["max_tokens"] = min(body["max_tokens"], self.context - len(prompt))
        # vLLM samples the n responses with seed, seed + 1, …: those of neighbouring seeds would be the same but for one.
        body["seed"] = xxhash.xxh3_64_intdigest(str(seed).encode()) >> 33
        return body | {"return_token_ids": True, "logprobs": 0}  # log-probabilities of no token but the sampled one

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def _end_loop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def common_model(models: list[dict[str, Any]]) -> tuple[str, int]:
    """Name and context, in tokens, of the one model that all servers serve. Raises InputError if there is none, or another."""
    found = {(str(model.get("id")), model.get("max_model_len")) for model in models}
    if len(found) != 1:
        named = ", ".join(sorted(f"{name} (context {context})" for name, context in found)) or "none"
        raise InputError(f"the servers must serve one and the same model, with one context; they serve: {named}")
    name, context = found.pop()
    if not isinstance(context, int):
        raise InputError(f"the servers do not say the context of {name}: are they vLLM servers?")
    return name, context


def sampled(answer: dict[str, Any], n: int) -> Sampled:
    """The n responses in an answer of vLLM. Raises what answers.py does, and Transient where one has no end."""
    found = choices(answer, n)
    if any(choice.get("finish_reason") is None for choice in found):
        raise Transient("a response without its end")
    ids = [choice.get("token_ids") for choice in found]
    logps = [sampled_logps(choice, of) for choice, of in zip(found, ids, strict=True)]
    return Sampled(ids, [choice["finish_reason"] for choice in found], logps, [choice.get("text") or "" for choice in found])
