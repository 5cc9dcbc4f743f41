"""Servers that a stage talks to over HTTP: their addresses, and what they say when they refuse."""

import json
import urllib.request
from typing import Any

import httpx
import orjson

from baton.errors import InputError
from baton.program import harmless
from baton.secrets import is_secret

PASSING = (408, 425, 429)  # statuses of a refusal that may pass: too slow, too early, too often
# What reading an answer of another shape raises.
UNEXPECTED = (AttributeError, LookupError, OverflowError, TypeError, ValueError)
BROKEN = (httpx.TransportError, httpx.DecodingError)  # a connection that ends early, or an answer that cannot be unpacked
HERE = ("localhost", "127.0.0.1", "[::1]")


class Transient(Exception):
    """A failure that may pass: a timeout, a broken connection or answer, a 408, 425, 429 or 5xx."""


class Refused(Exception):
    """A request that the server will refuse whenever it is sent: another 4xx. The message has the server's own."""


def proxy_settings() -> dict[str, Any]:
    """What makes an httpx client use the proxies of HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, but not for this machine.

    Raises InputError for a proxy that httpx cannot use.
    """
    for name, url in urllib.request.getproxies().items():
        try:
            usable = name == "no" or httpx.URL(url if "://" in url else f"http://{url}").scheme in ("http", "https")
        except httpx.InvalidURL:
            usable = False
        if not usable:  # the address, which may hold a password, is not shown
            raise InputError(f"{name.upper()}_PROXY: expected the address of a proxy that begins with http:// or https://")
    return {"trust_env": True, "mounts": {f"all://{host}": None for host in HERE}}


def check_url(url: str, argument: str) -> str:
    """`url` as it is. Raises InputError naming `argument` if it is no http(s) address, or holds a secret."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"{argument} {url}: {error}") from None
    if parsed.userinfo:
        raise InputError(f"{argument}: an address with a user and a password would be shown in logs; give a key with --api_key")
    if secret := next((name for name in parsed.params if is_secret(name)), None):
        raise InputError(f"{argument}: `{secret}` in an address would be shown in logs; give a key with --api_key")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"{argument} {url}: expected an address that begins with http:// or https://")
    return url


def error_text(response: httpx.Response) -> str:
    """What a server says about an error, in OpenAI's shape or as text, at most 500 characters, harmless on a terminal."""
    try:
        content = orjson.loads(response.content)
    except json.JSONDecodeError:
        return harmless(response.text[:200].strip() or response.reason_phrase)
    if isinstance(content, dict):
        content = content.get("error", content)
    if isinstance(content, dict):
        content = content.get("message") or content.get("detail") or content
    return harmless(str(content)[:500])
