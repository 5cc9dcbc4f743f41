"""Several OpenAI-compatible servers as one: each request to the one with the fewest in flight, the dead set aside.

A server that fails to answer is probed, at growing intervals, until it answers again; meanwhile its requests go
to the others.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx
import orjson
import tenacity

from baton.errors import FailuresListed, InputError
from baton.servers.addresses import BROKEN, PASSING, UNEXPECTED, Refused, Transient, check_url, error_text, proxy_settings

log = logging.getLogger("baton")

PROBE_SECONDS = (0.2, 30.0)  # the first interval between probes of a dead server, doubled up to the last
RETRY_SECONDS = (0.2, 30.0)  # the same between attempts at a request, with full jitter
# Responses in flight at a vLLM server. It samples 128 at once on a CPU, up to 1024 on a GPU; what waits there has a timeout.
PER_SERVER = 512


class Server:
    """One base URL, ending in /v1, and how it is doing."""

    def __init__(self, url: str):
        self.url, self.in_flight, self.alive, self.probe = url, 0, True, None


class Servers:
    """The servers at `urls`, used through `post`; to be closed with `close`.

    timeout: seconds for one answer. max_retries: attempts at a request after the first. patience: seconds to
    wait while no server at all is alive. is_usable: whether a server that answers may be used, if that is not enough.
    """

    def __init__(
        self,
        urls: list[str],
        api_key: str | None,
        timeout: float,
        max_retries: int,
        patience: float,
        is_usable: Callable[[httpx.AsyncClient, str], Awaitable[bool]] | None = None,
    ):
        self.servers, self.is_usable = [Server(url) for url in urls], is_usable
        self.patience = patience
        self.client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            **proxy_settings(),
        )
        self.attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Transient),
            wait=tenacity.wait_random_exponential(multiplier=RETRY_SECONDS[0], max=RETRY_SECONDS[1]),
            stop=tenacity.stop_after_attempt(max_retries + 1),
            reraise=True,
        )
        self.changed = asyncio.Event()

    async def models(self) -> list[dict[str, Any]]:
        """The models that the servers alive serve, as their /models says.

        Sets those that do not answer aside. Raises InputError if none answers or one refuses the API key.
        """
        answers = await asyncio.gather(*map(self._list_models, self.servers))
        if not any(server.alive for server in self.servers):
            urls = ", ".join(server.url for server in self.servers)
            raise InputError(f"no server answers at {urls}; start them with generation/register_server.sh")
        return [model for models in answers for model in models]

    async def post(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Any] = lambda answer: answer) -> Any:
        """`read` of the JSON answer to `body` at `path`, from any server, after as many attempts as it takes.

        `read` raises Transient for an answer that another attempt may better; an answer of another shape than it expects is one
        too. Raises Transient after the last attempt, Refused for a 4xx, FailuresListed if no server is alive.
        """
        tried: Counter[Server] = Counter()

        async def attempt() -> Any:
            server = await self._pick(tried)
            tried[server] += 1
            answer = await self._post_to(server, path, body)
            try:
                return read(answer)
            except UNEXPECTED as error:
                raise Transient(f"{server.url}: not the expected answer ({type(error).__name__}: {error})") from None

        return await self.attempts(attempt)

    async def post_to_each(self, path: str, body: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The JSON answers to `body` at `path` of all servers alive, by their URL. Raises Transient or Refused, as `post`."""
        alive = [server for server in self.servers if server.alive]
        answers = await asyncio.gather(*(self._post_to(server, path, body) for server in alive))
        return dict(zip((server.url for server in alive), answers, strict=True))

    async def check_again(self) -> None:
        """Find out which servers can be used now."""
        for server, usable in zip(self.servers, await asyncio.gather(*map(self._can_be_used, self.servers)), strict=True):
            if server.alive and not usable:
                log.warning("%s: set aside: it does not answer, or not with what is wanted", server.url)
                self._set_aside(server)
            elif usable and not server.alive:
                server.probe.cancel()
                self._take_back(server)

    async def close(self) -> None:
        probes = [server.probe for server in self.servers if server.probe]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        await self.client.aclose()

    async def _pick(self, tried: Mapping[Server, int]) -> Server:
        """The server alive with the fewest requests in flight, of those that have failed at this request least often.

        One that fails at once is always free: it would be asked again and again.
        """
        while not (alive := [server for server in self.servers if server.alive]):
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), self.patience)
            except asyncio.TimeoutError:
                raise FailuresListed(
                    f"no server has answered for {self.patience:g} s; what is finished is kept: start the "
                    "servers, and run the same command again"
                ) from None
        return min(alive, key=lambda server: (tried[server], server.in_flight))

    async def _post_to(self, server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
        server.in_flight += 1
        try:
            response = await self.client.post(
                f"{server.url}/{path}", content=orjson.dumps(body), headers={"Content-Type": "application/json"}
            )
        except httpx.TimeoutException as error:
            if isinstance(error, httpx.ConnectTimeout):
                self._set_aside(server)
            raise Transient(f"{server.url}: no answer in time ({type(error).__name__})") from None
        except BROKEN as error:
            self._set_aside(server)
            raise Transient(f"{server.url}: {type(error).__name__}: {error}") from None
        finally:
            server.in_flight -= 1
        return self._checked(server, response)

    def _checked(self, server: Server, response: httpx.Response) -> dict[str, Any]:
        """The JSON object in an answer. Raises Transient or Refused for what is none."""
        if response.status_code in PASSING or response.status_code >= 500:
            raise Transient(f"{server.url}: HTTP {response.status_code}: {error_text(response)}")
        if response.status_code in (401, 403):
            raise InputError(
                f"{server.url}: refuses the API key (HTTP {response.status_code}: {error_text(response)}); give "
                "it with --api_key or VLLM_API_KEY"
            )
        if response.status_code >= 400:
            raise Refused(f"HTTP {response.status_code}: {error_text(response)}")
        try:
            answer = orjson.loads(response.content)
        except json.JSONDecodeError:
            raise Transient(f"{server.url}: an answer that is not JSON: {response.text[:60]!r}") from None
        if not isinstance(answer, dict):
            raise Transient(f"{server.url}: an answer that is no JSON object: {response.text[:60]!r}")
        return answer

    async def _list_models(self, server: Server) -> list[dict[str, Any]]:
        try:
            response = await self.client.get(f"{server.url}/models", timeout=10)
            models = self._checked(server, response).get("data")
        except BROKEN:
            self._set_aside(server)  # the probe says so
            return []
        except Transient as error:
            log.warning("%s: set aside: %s", server.url, error)
            self._set_aside(server)
            return []
        except Refused as refused:
            raise InputError(f"{server.url}/models: {refused}; is this an OpenAI-compatible server?") from None
        return [model for model in models or [] if isinstance(model, dict)]

    def _set_aside(self, server: Server) -> None:
        if server.alive:
            server.alive = False
            server.probe = asyncio.create_task(self._revive(server))

    async def _revive(self, server: Server) -> None:
        """Probe a server until it can be used. One that only dropped a connection is back at once."""
        seconds = 0.0
        while not await self._can_be_used(server, warn=not seconds):
            seconds = min(max(2 * seconds, PROBE_SECONDS[0]), PROBE_SECONDS[1])
            await asyncio.sleep(seconds)
        if seconds:
            log.info("%s: answers again", server.url)
        self._take_back(server)

    async def _can_be_used(self, server: Server, warn: bool = False) -> bool:
        try:
            response = await self.client.get(f"{server.url}/models", timeout=10)
            return response.status_code < 500 and (not self.is_usable or await self.is_usable(self.client, server.url))
        except (*BROKEN, ValueError) as error:  # the last: what should be JSON is none
            if warn:
                log.warning("%s: set aside: %s", server.url, str(error) or type(error).__name__)
            return False

    def _take_back(self, server: Server) -> None:
        server.alive = True
        self.changed.set()


def base_url(url: str) -> str:
    """A server's address as a base URL that ends in /v1. Raises InputError if it is no HTTP address."""
    bare = check_url(url, "--url").rstrip("/")
    return bare if bare.endswith("/v1") else f"{bare}/v1"
