"""Whether the other side of a stream is alive, as far as its frames tell. Pure.

    heard ──suspect_s──> SUSPECT ──lost_s──> LOST

Silence counts only while this process was there to listen. A check that comes late shows that it
was not (frozen, or its event loop held up): what arrived meanwhile waits in the socket, and the
other side must not pay for it.

A worker that answers but whose engine makes no step while requests run is SUSPECT, too; it is not
LOST, because one step over a long context may take long.
"""

from __future__ import annotations

import enum


class Health(enum.Enum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    LOST = "lost"


class Silence:
    """How long nothing was heard. `check` is to be called every `period_s`."""

    __slots__ = ("_checked_at", "_heard_at", "_period_s")

    def __init__(self, period_s: float, now: float) -> None:
        self._period_s = period_s
        self._heard_at = self._checked_at = now

    def heard(self, now: float) -> None:
        self._heard_at = now

    def check(self, now: float) -> float:
        """Seconds of silence."""
        late_s = now - self._checked_at - self._period_s
        self._checked_at = now
        if late_s > self._period_s:
            self._heard_at = min(now, self._heard_at + late_s)
        return now - self._heard_at


class StepWatch:
    """How long an engine that has something to do has made no step."""

    __slots__ = ("_advanced_at", "_step_counter")

    def __init__(self, now: float) -> None:
        self._step_counter = -1
        self._advanced_at = now

    def report(self, step_counter: int, *, is_busy: bool, now: float) -> None:
        if step_counter != self._step_counter or not is_busy:
            self._step_counter = step_counter
            self._advanced_at = now

    def stalled_s(self, now: float) -> float:
        return now - self._advanced_at


def judge(silence_s: float, *, suspect_s: float, lost_s: float) -> Health:
    if silence_s > lost_s:
        return Health.LOST
    return Health.SUSPECT if silence_s > suspect_s else Health.ALIVE
