"""The deltas of one request, on their way from whoever produces them to its one consumer.

What waits for a slow consumer is at most the request's own output, so it is bounded by the
model's length.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from xllm.errors import RequestError
from xllm.protocol import TokenDelta

Listener = Callable[[TokenDelta | RequestError], None]
"""Called on the event loop's thread with every delta of a request, or its one error."""


class DeltaQueue:
    """Filled synchronously, emptied as an async iterator."""

    __slots__ = ("_deltas", "_ended", "_error", "_wakeup")

    def __init__(self) -> None:
        self._deltas: deque[TokenDelta] = deque()
        self._error: RequestError | None = None
        self._ended = False
        self._wakeup: asyncio.Future[None] | None = None

    def push(self, delta: TokenDelta) -> None:
        self._deltas.append(delta)
        self._wake()

    def end(self, error: RequestError | None = None) -> None:
        """Nothing comes any more; the consumer still gets what is here, then `error`."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._wake()

    def __aiter__(self) -> DeltaQueue:
        return self

    async def __anext__(self) -> TokenDelta:
        """Raises: the error that ended the request."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
        return self._deltas.popleft()

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)
