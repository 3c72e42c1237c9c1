"""How much an API key may ask for: one bucket of requests, one of tokens. Pure.

A bucket holds a minute's worth and fills all the time, so a key that was silent may ask for a
minute's worth at once. What is asked for is taken whole or refused; only output, whose length
nobody knows before, is taken as it comes and may leave a debt, which has to be paid back before
the next request. So over any time the rate holds, and what runs is never cut off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from xllm.errors import RateLimited

_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Per minute; 0: no limit."""

    requests: int = 0
    tokens: int = 0


class Bucket:
    """`per_minute` > 0. Full at first."""

    __slots__ = ("_at", "_level", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        """Negative: a debt."""
        self._at = now

    def wait_s(self, amount: int, now: float) -> float:
        """Seconds until `amount` is there. More than a minute's worth needs a full bucket: it
        could never be had otherwise."""
        self._fill(now)
        missing = min(amount, self.per_minute) - self._level
        return max(0.0, missing * _MINUTE_S / self.per_minute)

    def take(self, amount: int, now: float) -> None:
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        gained = max(0.0, now - self._at) * self.per_minute / _MINUTE_S
        self._level = min(float(self.per_minute), self._level + gained)
        self._at = now


class RateLimiter:
    """The buckets of one key's name."""

    def __init__(self, name: str, limits: RateLimits, now: float) -> None:
        self.limits = limits
        self.name = name
        self._requests = Bucket(limits.requests, now) if limits.requests else None
        self._tokens = Bucket(limits.tokens, now) if limits.tokens else None

    def take_request(self, now: float) -> None:
        """Raises: RateLimited; then nothing was taken."""
        if self._tokens is not None:
            self._check(self._tokens, 1, "tokens", now)
        if self._requests is not None:
            self._check(self._requests, 1, "requests", now)
            self._requests.take(1, now)

    def check_prompt(self, num_tokens: int, now: float) -> None:
        """Takes nothing. Raises: RateLimited."""
        if self._tokens is not None:
            self._check(self._tokens, num_tokens, "tokens", now)

    def take_tokens(self, num_tokens: int, now: float) -> None:
        """Of a request that runs: always taken."""
        if self._tokens is not None:
            self._tokens.take(num_tokens, now)

    def _check(self, bucket: Bucket, amount: int, kind: str, now: float) -> None:
        wait_s = bucket.wait_s(amount, now)
        if wait_s > 0:
            retry_after_s = max(1, math.ceil(wait_s))
            raise RateLimited(
                f"Rate limit reached for API key {self.name!r} on {kind} per min: limit "
                f"{bucket.per_minute}, requested {amount}. Please try again in {retry_after_s}s.",
                kind=kind,
                retry_after_s=retry_after_s,
            )
