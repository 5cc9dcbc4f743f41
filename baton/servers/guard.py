"""What a vLLM server loads as `--middleware`: every route but /health asks for the API key in VLLM_API_KEY.

vLLM itself asks for it under /v1 and a few other paths alone, and not where weights are changed.
"""

import os
import secrets

OPEN = "/health"


class Guard:
    """ASGI application around `app` that answers 401 unless a request carries `Authorization: Bearer KEY`."""

    def __init__(self, app):
        self.app, self.key = app, os.environ.get("VLLM_API_KEY", "")
        if not self.key:
            raise RuntimeError("VLLM_API_KEY: a server with this middleware needs an API key in it")

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or scope["path"] == OPEN or self.is_given(scope["headers"]):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "wrong or missing API key"}'})
        return None

    def is_given(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether the headers carry the key; the comparison takes the same time wherever the two differ."""
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self.key.encode())
