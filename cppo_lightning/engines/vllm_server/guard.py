"""What a vLLM server runs of this project before every route: the key, and our own route."""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import TYPE_CHECKING, Any

from cppo_lightning.engines.vllm_server.route import attach  # here, so that a vLLM that it does not fit is told at the start

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class RequireKey:
    """ASGI middleware: a request on any route needs ``Authorization: Bearer`` with the server's ``VLLM_API_KEY``.

    vLLM's own check covers the routes under /v1 and /inference alone, not those that change weights.  A server that starts
    with it also gets :mod:`~cppo_lightning.engines.vllm_server.route`, so that our route is never there without the key.

    Raises:
        RuntimeError: the server has no key.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise RuntimeError("set VLLM_API_KEY: this server answers only those who know it")
        self._app = app
        self._expected = hashlib.sha256(b"Bearer " + key.encode()).digest()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan":  # once, before the first request
            attach(scope["app"])
        elif not self._knows_key(scope["headers"]):
            return await self._refuse(scope["type"], send)
        await self._app(scope, receive, send)

    def _knows_key(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = b"".join(value for name, value in headers if name.lower() == b"authorization")
        # digests of one length: the time taken tells nothing about the key
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._expected)

    @staticmethod
    async def _refuse(kind: str, send: Callable[..., Any]) -> None:
        if kind == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        body = b'{"error": "this server needs its API key"}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})
