"""The last requests of one master, for people: where each was sent, why, and what then happened.

A ring of `MAX_ENTRIES`. It costs a request a few appends: estimates are kept as routing made them,
and become text when somebody looks (`describe`). Nothing is counted per token.

    request    one entry, found by its id
    attempt    each time that it is sent: to one worker, of one or all samples

Not here: requests that never found a worker; whose figures are sums, `figures.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import orjson

from xllm.errors import NoWorker, Overloaded, RequestError, WorkerLost
from xllm.protocol import GenerateRequest, PhaseSeconds, TokenDelta, WorkerId
from xllm.roles.car_policy import CostRoute, describe

MAX_ENTRIES = 100
MAX_CANDIDATES = 8
"""Estimates that are shown of one attempt, the best ones."""

MAX_ATTEMPTS = 16
"""That are kept of one request, the last ones: it may have 128 samples."""

MOVING_S = 15.0
"""So long after an attempt was lost it may still find another worker."""

MAX_FRESH = 4096

RUNNING, DONE, CANCELLED, LOST, FAILED, MOVING = (
    *("running", "done", "cancelled", "lost", "failed", "moving"),
)


class Attempt:
    """One request, or one sample of it, on one worker."""

    __slots__ = (
        *("_entry", "_journal", "_num_open", "cached", "ended_at", "error", "first_at", "fetch"),
        *("num_output", "phases", "reason", "route", "sent_at", "state", "worker_id"),
    )

    def __init__(
        self, journal: Journal, entry: Entry, request: GenerateRequest, route: CostRoute
    ) -> None:
        self._journal = journal
        self._entry = entry
        self._num_open = request.n
        self.worker_id: WorkerId = route.worker_id
        self.route: CostRoute | None = route
        self.sent_at = journal.clock()
        self.first_at: float | None = None
        self.ended_at: float | None = None
        self.state = RUNNING
        self.error = ""
        self.reason = ""
        self.cached: dict[str, int] = {}
        self.phases: PhaseSeconds | None = None
        self.num_output = 0

    def begin(self, delta: TokenDelta) -> None:
        """The first tokens came."""
        self.first_at = now = self._journal.clock()
        self.cached = delta.cached_tokens_by_tier
        self._entry.begin(now)
        self._journal.touch(self._entry)

    def finish(self, delta: TokenDelta) -> None:
        """The last tokens of a sample came."""
        self._num_open -= 1
        self.num_output += delta.offset + len(delta.token_ids)
        self.phases = delta.phases
        self.reason = "" if delta.finish_reason is None else delta.finish_reason.value
        if not self._num_open:
            self._end(DONE)

    def fail(self, error: RequestError) -> None:
        is_lost = isinstance(error, WorkerLost | NoWorker | Overloaded)
        self.error = error.message
        self._end(LOST if is_lost else FAILED)

    def cancel(self) -> None:
        """Whoever asked has gone, or has found a stop string. Idempotent, also after the end."""
        if self.state == RUNNING:
            self._end(CANCELLED)

    def _end(self, state: str) -> None:
        self.state = state
        self.ended_at = self._journal.clock()
        self._journal.touch(self._entry)

    def describe(self, began_at: float, now: float) -> dict[str, Any]:
        ended_at = now if self.ended_at is None else self.ended_at
        estimate = None if self.route is None else self.route.estimate
        described: dict[str, Any] = {
            "worker_id": self.worker_id,
            "state": self.state,
            "sent_s": round(self.sent_at - began_at, 6),
            "seconds": round(ended_at - self.sent_at, 6),
            "ttft_s": None if self.first_at is None else round(self.first_at - self.sent_at, 6),
            "estimated_s": None if estimate is None else round(estimate.parts.ttft_s, 6),
            "error": self.error,
            "finish_reason": self.reason,
            "cached_tokens_by_tier": self.cached,
            "output_tokens": self.num_output,
        }
        fetch = self.route.fetch if self.route is not None else ()
        described["fetch"] = [{"worker_id": r.worker_id, "blocks": r.count} for r in fetch]
        if self.phases is not None:
            queue, load, prefill, decode = _fields(self.phases)
            described["phases"] = {
                "queue": queue,
                "load": load,
                "prefill": prefill,
                "decode": decode,
            }
        return described


class Entry:
    """One request."""

    __slots__ = (
        *(
            "attempts",
            "began_at",
            "changed",
            "first_at",
            "is_moving",
            "model_id",
            "num_prompt",
            "request_id",
        ),
        *("started_at", "_journal", "_text"),
    )

    def __init__(self, journal: Journal, request: GenerateRequest) -> None:
        self._journal = journal
        self.request_id = request.request_id
        self.model_id = request.model_id
        self.num_prompt = len(request.prompt_ids)
        self.began_at = journal.clock()
        self.started_at = journal.wall_clock()
        self.first_at: float | None = None
        self.attempts: deque[Attempt] = deque(maxlen=MAX_ATTEMPTS)
        self.changed = 0
        self._text: bytes | None = None
        self.is_moving = False
        """As it was last described: that ends by itself."""

    def touch(self, version: int) -> None:
        self.changed = version
        self._text = None

    def begin(self, now: float) -> None:
        if self.first_at is None:
            self.first_at = now
            self._journal.fresh_ttfts.append(now - self.began_at)

    def state(self, now: float) -> str:
        if any(attempt.state == RUNNING for attempt in self.attempts):
            return RUNNING
        last = self.attempts[-1]
        if last.state == LOST:
            assert last.ended_at is not None
            return MOVING if now - last.ended_at < MOVING_S else FAILED
        return last.state

    def as_json(self, now: float) -> bytes:
        """`describe`, made once for all who look if it cannot change any more."""
        if self._text is not None:
            return self._text
        described = self.describe(now)
        text = orjson.dumps(described)
        self.is_moving = described["state"] == MOVING
        if not self.is_moving and described["state"] != RUNNING:
            self._text = text
        return text

    def describe(self, now: float) -> dict[str, Any]:
        """As JSON: seconds, and unix seconds for `started_at`."""
        last = self.attempts[-1]
        ended_at = now if last.ended_at is None else last.ended_at
        candidates = []
        if last.route is not None:
            estimates = last.route.estimate.alternatives(MAX_CANDIDATES)
            candidates = [describe(estimate) for estimate in estimates]
        return {
            "request_id": self.request_id,
            "model": self.model_id,
            "state": self.state(now),
            "started_at": round(self.started_at, 3),
            "prompt_tokens": self.num_prompt,
            "ttft_s": None if self.first_at is None else round(self.first_at - self.began_at, 6),
            "seconds": round(ended_at - self.began_at, 6),
            "attempts": [attempt.describe(self.began_at, now) for attempt in self.attempts],
            "candidates": candidates,
        }


class Journal:
    """`clock` is monotonic, `wall_clock` is for people; both in seconds."""

    def __init__(
        self,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        self.clock = clock
        self.wall_clock = wall_clock
        self.version = 0
        """Grows with each change of an entry."""
        self.fresh_ttfts: deque[float] = deque(maxlen=MAX_FRESH)
        """Of requests since somebody has taken them."""
        self._max_entries = max_entries
        self._entries: dict[str, Entry] = {}

    def sent(self, request: GenerateRequest, route: CostRoute) -> Attempt:
        """An attempt was sent; tell the answer what becomes of it."""
        entry = self._entries.get(request.request_id)
        if entry is None:
            entry = self._entries[request.request_id] = Entry(self, request)
            if len(self._entries) > self._max_entries:
                del self._entries[next(iter(self._entries))]
        attempt = Attempt(self, entry, request, route)
        entry.attempts.append(attempt)
        self.touch(entry)
        return attempt

    def touch(self, entry: Entry) -> None:
        self.version += 1
        entry.touch(self.version)

    def entries(self, since: int = 0) -> list[Entry]:
        """Those that have changed after `since`, a `version`: the oldest first."""
        now = self.clock()
        for entry in self._entries.values():
            if entry.is_moving and entry.state(now) != MOVING:
                entry.is_moving = False
                self.touch(entry)
        return [entry for entry in self._entries.values() if entry.changed > since]

    def take_ttfts(self) -> list[float]:
        """Of the requests since the last call."""
        taken = list(self.fresh_ttfts)
        self.fresh_ttfts.clear()
        return taken


def _fields(phases: PhaseSeconds) -> tuple[float, float, float, float]:
    return phases.queue, phases.load, phases.prefill, phases.decode
