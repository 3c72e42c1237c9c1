"""The generations of one HTTP request: one per prompt, their deltas merged in order of arrival.

A small task per generation moves its deltas into one list; who takes from it gets everything that
has arrived, to be written at once. The list is bounded by the requests' own `max_tokens`.

Leaving the context, however that happens, cancels what still runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from xllm.errors import EngineFault, RequestError
from xllm.protocol import GenerateRequest, TokenDelta, WorkerId
from xllm.roles.backend import Backend, Generation

logger = logging.getLogger(__name__)


class Generations:
    """An asynchronous context that runs `requests` on `backend`."""

    def __init__(self, backend: Backend, requests: Sequence[GenerateRequest]) -> None:
        self._backend = backend
        self._requests = requests
        self._generations: list[Generation] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._arrived: list[tuple[int, TokenDelta]] = []
        self._num_running = len(requests)
        self._error: RequestError | None = None
        self._wake = asyncio.Event()

    @property
    def worker_ids(self) -> list[WorkerId]:
        """Who runs them, without repetition; empty before one was picked."""
        return list(dict.fromkeys(g.worker_id for g in self._generations if g.worker_id))

    async def __aenter__(self) -> Self:
        """Raises: UnknownModel, NoWorker, Overloaded: then none of them runs."""
        try:
            for request in self._requests:
                await self._backend.prepare(request)
            for request in self._requests:
                self._generations.append(self._backend.generate(request))
        except BaseException:
            self._cancel_all()
            raise
        self._pumps = [
            asyncio.create_task(self._pump(i, generation))
            for i, generation in enumerate(self._generations)
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cancel_all()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def take(self) -> list[tuple[int, TokenDelta]]:
        """Waits for deltas and returns all there are, each with the index of its request.

        Raises: the RequestError that ended one of them, after the deltas before it.
        """
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self._num_running:
                raise EngineFault("the generation ended before its last token")
            self._wake.clear()
            await self._wake.wait()
        arrived, self._arrived = self._arrived, []
        return arrived

    def cancel(self, index: int) -> None:
        """What the request at `index` would still bring is not needed."""
        self._generations[index].cancel()

    def _cancel_all(self) -> None:
        for generation in self._generations:
            generation.cancel()

    async def _pump(self, index: int, generation: Generation) -> None:
        try:
            async for delta in generation:
                self._arrived.append((index, delta))
                self._wake.set()
        except RequestError as error:
            self._error = self._error or error
        except Exception:
            logger.exception("generation_failed request_id=%s", self._requests[index].request_id)
            self._error = self._error or EngineFault("internal error")
        finally:
            self._num_running -= 1
            self._wake.set()
