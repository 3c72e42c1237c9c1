"""How fast a tier delivers, as measured on this machine under its real load. Pure.

The rate is that of whole loads, bytes over the time from their start to the end of their last
transfer: queueing included, since that is what the next request will see. It decides how long a
load may take, whether a tier is worth reading at all, and later what a router expects.
"""

from __future__ import annotations

from collections.abc import Callable

HALF_LIFE_BYTES = 256 << 20
"""Bytes after which half of a rate comes from newer measurements."""

FORGET_AFTER_S = 30.0
"""A rate as old as this is unknown again: a tier that was slow gets another chance."""


class TransferRate:
    """A moving average of bytes per second, weighted by bytes: see HALF_LIFE_BYTES."""

    __slots__ = ("_bytes", "_clock", "_measured_at", "_seconds", "total_bytes", "total_seconds")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._bytes = 0.0
        self._seconds = 0.0
        self._measured_at = -FORGET_AFTER_S
        self.total_bytes = 0
        self.total_seconds = 0.0

    def observe(self, num_bytes: int, seconds: float) -> None:
        """A load that took `seconds` brought `num_bytes`, maybe none."""
        if self.bytes_per_s is None:
            self._bytes = self._seconds = 0.0
        weight = 0.5 ** (num_bytes / HALF_LIFE_BYTES) if num_bytes else 0.5
        self._bytes = self._bytes * weight + num_bytes
        self._seconds = self._seconds * weight + seconds
        self._measured_at = self._clock()
        self.total_bytes += num_bytes
        self.total_seconds += seconds

    @property
    def bytes_per_s(self) -> float | None:
        """None: not known, or not any more."""
        if self._clock() - self._measured_at >= FORGET_AFTER_S or self._seconds <= 0:
            return None
        return self._bytes / self._seconds
