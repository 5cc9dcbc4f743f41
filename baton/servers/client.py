"""JSON over HTTP to one of several equal servers, with patience: retries, backoff with jitter, another server next."""

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import tenacity

from baton.errors import FailuresListed, InputError
from baton.program import harmless
from baton.servers.addresses import BROKEN, PASSING, UNEXPECTED, Refused, Transient, error_text, proxy_settings

ALONE = 3  # requests in a row that fail, with no answer to any in between: then the service is away
TOO_SLOW = 408


class TooSlow(Transient):
    """A 408: this request takes too long. The service itself is well."""


class Client:
    """POSTs to `urls` in turn; a call that fails moves on to the next one. Safe to call from several threads."""

    def __init__(self, urls: list[str], api_key: str | None, seconds: float, tries: int):
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(headers=headers, timeout=httpx.Timeout(seconds, connect=10.0), **proxy_settings())
        self.urls, self.tries = urls, tries
        self.calls = itertools.count()
        self.answers = self.failed_in_a_row = 0
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """From another thread: no call of `ask` tries again, nor waits to do so."""
        self.cancelled.set()

    def ask(self, body: dict[str, Any], read: Callable[[Any], Any], name: str) -> Any:
        """`read(answer)` of the first usable answer; `read` raises one of UNEXPECTED for another.

        Raises Refused for a request that a server refuses whenever it is sent, Transient when no try gave an answer though
        others may get one, FailuresListed when the service is away: nobody can be reached, or nobody got an answer for a while
        (a 408 is one: it is about its request). So it does after `cancel`.
        Raises InputError, naming `name` where it is about the request, for a wrong key or address.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            stop=tenacity.stop_after_attempt(self.tries),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            sleep=tenacity.sleep_using_event(self.cancelled),
            reraise=True,
        )
        answers_before = self.answers
        try:
            answer = retrying(self._once, itertools.count(next(self.calls)), body, read, name)
        except (Refused, TooSlow):
            self._answered()
            raise
        except Transient as error:
            self.failed_in_a_row += 1
            unreachable = isinstance(error.__cause__, httpx.ConnectError) and self.answers == answers_before
            if unreachable or self.failed_in_a_row >= ALONE:
                raise FailuresListed(f"{error} ({self.tries} tries)") from None
            raise
        self._answered()
        return answer

    def _answered(self) -> None:
        """Take note of an answer. (Threads may count over each other: all that matters is whether there was one.)"""
        self.answers += 1
        self.failed_in_a_row = 0

    def _once(self, turns: Iterator[int], body: dict[str, Any], read: Callable[[Any], Any], name: str) -> Any:
        if self.cancelled.is_set():
            raise FailuresListed("the requests were cancelled")
        url = self.urls[next(turns) % len(self.urls)]
        try:
            answer = self.http.post(url, json=body)
        except BROKEN as error:
            raise Transient(f"{url}: {str(error) or type(error).__name__}") from error
        status = answer.status_code
        if status == TOO_SLOW:
            raise TooSlow(f"{url}: status {status}: {error_text(answer)}")
        if status in PASSING or status >= 500:
            raise Transient(f"{url}: status {status}: {error_text(answer)}")
        if status in (401, 403):
            raise InputError(f"{url}: refuses the API key (status {status}): give it with --api_key")
        if 300 <= status < 400 or status in (404, 405, 407):
            said = f"status {status}: {error_text(answer)}"
            raise InputError(f"{name}: {url}: {said}; are the address and the model's name right?")
        if status >= 400:
            raise Refused(f"status {status}: {error_text(answer)}")
        try:
            return read(answer.json())
        except UNEXPECTED as error:
            text = harmless(answer.text[:200])
            raise Transient(f"{url}: not the expected answer ({type(error).__name__}: {error}): {text}") from None
