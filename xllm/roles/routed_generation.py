"""One request on the workers of a cluster, whichever of them run it one after the other.

    place ──> runs ──every sample ended──> end
      ^         │
      └─ lost, refused

Whoever consumes the deltas also moves the request: there is no task of its own. Nobody to move to
is no reason to give up at once: a worker may be just about to reconnect, or to be registered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Set as AbstractSet
from typing import NamedTuple, Protocol

from xllm.errors import NoWorker, Overloaded, RequestError, WorkerLost
from xllm.protocol import GenerateRequest, TokenDelta, WorkerId
from xllm.roles.delta_queue import Listener
from xllm.roles.progress import RequestProgress

logger = logging.getLogger(__name__)

PLACE_TIMEOUT_S = 10.0
"""How long an accepted request waits for a worker that takes it over."""

PLACE_PERIOD_S = 0.1


class Placed(NamedTuple):
    worker_id: WorkerId
    cancel: Callable[[], None]


class Place(Protocol):
    def __call__(
        self, request: GenerateRequest, listener: Listener, excluded: AbstractSet[WorkerId]
    ) -> Placed:
        """Sends an attempt to a worker that is not in `excluded`.

        Raises: UnknownModel, NoWorker, Overloaded.
        """
        ...


class _Attempt:
    __slots__ = ("cancel", "excluded", "homeless_since", "reason", "request", "worker_id")

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.worker_id = WorkerId("")
        self.cancel: Callable[[], None] | None = None
        """None while no worker runs it."""
        self.excluded: frozenset[WorkerId] = frozenset()
        """Who need not be asked for now."""
        self.homeless_since = 0.0
        """Since when one worker after the other has refused it."""
        self.reason: RequestError | None = None
        """Why it had to move."""


class RoutedGeneration:
    """A `Generation` that outlives its workers, at most `max_retries` of them per sample."""

    def __init__(
        self,
        request: GenerateRequest,
        place: Place,
        max_retries: int,
        on_move: Callable[[], None] = lambda: None,
        may_wait: bool = False,
    ) -> None:
        """Sends the first attempt; `may_wait`: when there is a worker. Raises: UnknownModel,
        NoWorker, Overloaded."""
        self._place = place
        self._on_move = on_move
        self._progress = RequestProgress(request, max_retries)
        self._running: set[_Attempt] = set()
        self._homeless: list[_Attempt] = []
        self._inbox: deque[tuple[_Attempt, TokenDelta | RequestError]] = deque()
        """Bounded by the request's own output."""
        self._wake = asyncio.Event()
        self._is_cancelled = False
        self._worker_id = WorkerId("")
        self._loop = asyncio.get_running_loop()
        first = _Attempt(request)
        try:
            self._start(first)
        except NoWorker as error:
            if not may_wait:
                raise
            first.homeless_since = self._loop.time()
            first.reason = error
            self._homeless.append(first)

    @property
    def worker_id(self) -> WorkerId:
        return self._worker_id

    async def __aiter__(self) -> AsyncIterator[TokenDelta]:
        try:
            while not self._is_cancelled and not self._progress.has_ended:
                while self._inbox:
                    delta = self._take(*self._inbox.popleft())
                    if delta is not None:
                        yield delta
                self._place_homeless()
                if not self._progress.has_ended:
                    await self._wait()
        finally:
            self.cancel()

    def cancel(self) -> None:
        self._is_cancelled = True
        self._homeless.clear()
        self._inbox.clear()
        running, self._running = self._running, set()
        for attempt in running:
            if attempt.cancel is not None:
                attempt.cancel()
        self._wake.set()

    async def _wait(self) -> None:
        """For news, or until the homeless may try again."""
        self._wake.clear()
        if self._inbox or self._is_cancelled:
            return
        if not self._homeless:
            await self._wake.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PLACE_PERIOD_S):
                await self._wake.wait()

    def _start(self, attempt: _Attempt) -> None:
        """Raises: what `place` raises."""

        def listen(news: TokenDelta | RequestError) -> None:
            if not self._is_cancelled:
                self._inbox.append((attempt, news))
                self._wake.set()

        placed = self._place(attempt.request, listen, attempt.excluded)
        attempt.worker_id, attempt.cancel = placed
        self._running.add(attempt)
        self._worker_id = placed.worker_id

    def _take(self, attempt: _Attempt, news: TokenDelta | RequestError) -> TokenDelta | None:
        """Raises: RequestError when the request cannot go on."""
        if attempt not in self._running:
            return None
        if isinstance(news, RequestError):
            self._move(attempt, news)
            return None
        try:
            return self._progress.take(news)
        except WorkerLost as error:
            assert attempt.cancel is not None
            attempt.cancel()
            self._move(attempt, error)
            return None

    def _move(self, attempt: _Attempt, error: RequestError) -> None:
        """Makes what `attempt` leaves undone homeless. Raises: RequestError if it cannot move."""
        self._running.discard(attempt)
        if not isinstance(error, WorkerLost | NoWorker | Overloaded):
            raise error
        logger.info(
            "request_moves request_id=%s attempt=%d worker_id=%s reason=%r",
            *(attempt.request.request_id, attempt.request.attempt, attempt.worker_id, str(error)),
        )
        is_loss = isinstance(error, WorkerLost)
        since = self._loop.time() if is_loss else attempt.homeless_since or self._loop.time()
        for request in self._progress.next_attempts(attempt.request, is_loss=is_loss):
            following = _Attempt(request)
            following.excluded = attempt.excluded | {attempt.worker_id}
            following.homeless_since = since
            following.reason = error
            self._homeless.append(following)

    def _place_homeless(self) -> None:
        """Raises: RequestError for one that has waited too long."""
        homeless, self._homeless = self._homeless, []
        for attempt in homeless:
            try:
                self._start(attempt)
            except (NoWorker, Overloaded) as error:
                self._give_up_if_late(attempt, error)
                attempt.excluded = frozenset()
                self._homeless.append(attempt)
            else:
                self._on_move()

    def _give_up_if_late(self, attempt: _Attempt, error: RequestError) -> None:
        """Raises: RequestError."""
        reason = attempt.reason
        if isinstance(reason, Overloaded) and not self._progress.has_begun:
            raise reason
        if self._loop.time() - attempt.homeless_since < PLACE_TIMEOUT_S:
            return
        if isinstance(reason, WorkerLost):
            raise WorkerLost(f"{reason.message}; no other took the request over in time")
        raise error
