"""Server-sent events whose headers wait for the first event.

So a request that is refused after it was accepted (no room, worker lost) still gets a proper
status. Once the headers are out, an error is an event, and the stream ends without `[DONE]`: the
current clients raise it, and one that only knows `[DONE]` sees that the end is missing.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from aiohttp import web

DONE = b"data: [DONE]\n\n"

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_WRITE_TIMEOUT_S = 60.0
"""A client that takes nothing for so long is gone."""


def event(payload: Any) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a response that nobody will read."""


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class EventStream:
    """One response; `send` waits while the client is slow."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response: web.StreamResponse | None = None
        """None until the first event is sent."""

    async def send(self, events: bytes) -> None:
        """Raises: ClientGone."""
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                if self.response is None:
                    self.response = web.StreamResponse(headers=_HEADERS)
                    await self.response.prepare(self._request)
                await self.response.write(events)
        except (ConnectionError, TimeoutError) as error:
            raise self._gone() from error

    async def close(self) -> web.StreamResponse:
        """Raises: ClientGone."""
        assert self.response is not None
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await self.response.write_eof()
        except (ConnectionError, TimeoutError) as error:
            raise self._gone() from error
        return self.response

    def _gone(self) -> ClientGone:
        if self._request.transport is not None:
            self._request.transport.abort()
        return ClientGone()
