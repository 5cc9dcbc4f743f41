"""JSON over HTTP to one of several equal servers, with patience: retries, backoff with jitter, another server next."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import tenacity

from baton.errors import InputError
from baton.servers.addresses import error_text


class Unusable(Exception):
    """An answer that another try may better: the server is busy, gone, or sent half of it."""


class Client:
    """POSTs to `urls` in turn; a call that fails moves on to the next one. Safe to call from several threads."""

    def __init__(self, urls: list[str], api_key: str | None, seconds: float, tries: int):
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(headers=headers, timeout=httpx.Timeout(seconds, connect=10.0), trust_env=False)
        self.urls, self.tries = urls, tries
        self.calls = itertools.count()

    def ask(self, body: dict[str, Any], read: Callable[[Any], Any], name: str) -> Any:
        """`read(answer)` of the first usable answer; `read` raises Unusable, KeyError, TypeError or ValueError for another.

        Raises InputError, naming `name`, for a request that a server refuses (4xx), and when no try gave an answer.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unusable),
            stop=tenacity.stop_after_attempt(self.tries),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            reraise=True,
        )
        try:
            return retrying(self._once, itertools.count(next(self.calls)), body, read, name)
        except Unusable as error:
            raise InputError(
                f"{name}: {error} ({self.tries} tries); what is scored so far is kept; run the same command again"
            ) from None

    def _once(self, turns: Iterator[int], body: dict[str, Any], read: Callable[[Any], Any], name: str) -> Any:
        url = self.urls[next(turns) % len(self.urls)]
        try:
            answer = self.http.post(url, json=body)
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise Unusable(f"{url}: {str(error) or type(error).__name__}") from None
        if answer.status_code == 429 or answer.status_code >= 500:
            raise Unusable(f"{url}: status {answer.status_code}: {error_text(answer)}")
        if answer.status_code in (401, 403):
            raise InputError(f"{url}: refuses the API key (status {answer.status_code}): give it with --api_key")
        if answer.status_code >= 300:
            raise InputError(f"{name}: {url} refuses the request: status {answer.status_code}: {error_text(answer)}")
        try:
            return read(answer.json())
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise Unusable(f"{url}: not the expected answer ({type(error).__name__}: {error}): {answer.text[:200]}") from None
