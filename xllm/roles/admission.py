"""How long a request would wait on a worker before it begins, by what one master sees. Pure.

Two estimates; the longer one counts:

    by compute     prompt tokens sent and not begun / prefill rate that the worker measured
    by throughput  requests sent and not begun / rate at which the worker has begun them lately

The first knows a burst at once; the second knows what the first cannot see: a batch that is full,
other masters, preemption. It counts only while the queue was never empty, because a worker that
waits for requests begins them as they come.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 4.0
MIN_WINDOW_S = 1.0
MIN_QUEUED = 16
"""So many may always wait on a worker: a prompt that alone takes longer than the limit must not
keep all others out. A slow worker has them done soon after a crowd has gone."""

_MAX_BEGUN = 1024


class QueueMeter:
    """The requests that this master has sent to one worker and that have no token yet."""

    __slots__ = ("_begun_at", "_busy_since", "num_queued", "num_tokens")

    def __init__(self) -> None:
        self.num_queued = 0
        self.num_tokens = 0
        """Of their prompts."""
        self._busy_since = 0.0
        self._begun_at: deque[float] = deque(maxlen=_MAX_BEGUN)

    def add(self, num_tokens: int, now: float) -> None:
        if not self.num_queued:
            self._busy_since = now
        self.num_queued += 1
        self.num_tokens += num_tokens

    def remove(self, num_tokens: int, now: float, *, has_begun: bool) -> None:
        """Its first token came, or it ended without one."""
        self.num_queued -= 1
        self.num_tokens -= num_tokens
        if has_begun:
            self._begun_at.append(now)

    def wait_s(self, prefill_tokens_per_s: float, now: float) -> float:
        """For a request that would come now; a rate of 0 is not known."""
        if not self.num_queued:
            return 0.0
        by_compute_s = self.num_tokens / prefill_tokens_per_s if prefill_tokens_per_s else 0.0
        return max(by_compute_s, self._by_throughput_s(now))

    def _by_throughput_s(self, now: float) -> float:
        while self._begun_at and self._begun_at[0] < now - WINDOW_S:
            self._begun_at.popleft()
        since = max(self._busy_since, now - WINDOW_S)
        if len(self._begun_at) == _MAX_BEGUN:
            since = max(since, self._begun_at[0])
        if now - since < MIN_WINDOW_S:
            return 0.0
        num_begun = sum(at >= since for at in self._begun_at)
        return self.num_queued * (now - since) / max(num_begun, 1)
