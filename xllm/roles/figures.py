"""How one master has served over the last minutes, for people: a ring of points.

Every `PERIOD_S` the sums that the API counts anyway (`telemetry.Metrics`) are read; a point is what
came since the one before. Nothing is added to the path of a request. Percentiles of gaps between
tokens are interpolated in the buckets of their histogram; those of times to the first token are
exact, from the `Journal`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import Histogram

from xllm.protocol import TIER_NAMES
from xllm.roles.journal import Journal
from xllm.telemetry import Metrics

PERIOD_S = 2.0
WINDOW_S = 300.0
_MAX_POINTS = int(WINDOW_S / PERIOD_S)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram at one moment: how many values were at most each bound, the last one infinite."""

    bounds: Sequence[float]
    counts: Sequence[float]
    total: float = 0.0
    """Of the values."""

    @property
    def num(self) -> float:
        return self.counts[-1] if self.counts else 0.0

    def since(self, before: Distribution) -> Distribution:
        counts = [now - then for now, then in zip(self.counts, before.counts, strict=True)]
        return Distribution(self.bounds, counts, self.total - before.total)

    def percentile(self, share: float) -> float | None:
        """Linear within a bucket; None without values. What is over the last bound is that."""
        wanted = share * self.num
        if not wanted:
            return None
        lower, below = 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= wanted:
                if math.isinf(bound):
                    return lower
                return lower + (bound - lower) * (wanted - below) / (count - below)
            lower, below = bound, count
        return lower


@dataclass(frozen=True, slots=True)
class _Sums:
    gaps: Distribution
    num_first: float
    prompt_tokens: float
    num_ended: float
    cached: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Point:
    at: float
    sums: _Sums
    ttfts: Sequence[float]


class Figures:
    """Of one master: `sample` once a period."""

    def __init__(self, metrics: Metrics, journal: Journal) -> None:
        self._metrics = metrics
        self._journal = journal
        self._points: deque[_Point] = deque(maxlen=_MAX_POINTS + 1)
        self.num_points = 0
        """Ever made; the first one only starts the sums."""

    def sample(self, at: float) -> None:
        """Adds a point; `at` in unix seconds."""
        self._points.append(_Point(at, self._sums(), self._journal.take_ttfts()))
        self.num_points += 1

    def describe(self, since: int = 0) -> list[dict[str, Any]]:
        """Points after the `since`-th that was ever made, the oldest first, as JSON."""
        points = list(self._points)
        first = max(1, len(points) - (self.num_points - since))
        return [_describe(points[i - 1], points[i]) for i in range(first, len(points))]

    def summary(self) -> dict[str, Any]:
        """The whole window, as JSON."""
        if len(self._points) < 2:
            return {}
        first, last = self._points[0], self._points[-1]
        ttfts = sorted(ttft for point in list(self._points)[1:] for ttft in point.ttfts)
        gaps = last.sums.gaps.since(first.sums.gaps)
        prompt_tokens = last.sums.prompt_tokens - first.sums.prompt_tokens
        return {
            "seconds": round(last.at - first.at, 1),
            "requests": round(last.sums.num_ended - first.sums.num_ended),
            "ttft_s": {"p50": _rank(ttfts, 0.5), "p95": _rank(ttfts, 0.95), "num": len(ttfts)},
            "tbt_s": {
                "p50": _rounded(gaps.percentile(0.5)),
                "p99": _rounded(gaps.percentile(0.99)),
                "num": round(gaps.num),
            },
            "prompt_tokens": round(prompt_tokens),
            "cached_tokens_by_tier": _cached(last.sums, first.sums),
        }

    def _sums(self) -> _Sums:
        metrics = self._metrics
        prompts = _read(metrics.request_prompt_tokens)
        return _Sums(
            _read(metrics.inter_token_latency_seconds),
            _read(metrics.time_to_first_token_seconds).num,
            prompts.total,
            _read(metrics.e2e_request_latency_seconds).num,
            {
                sample.labels["tier"]: sample.value
                for family in metrics.request_cached_tokens.collect()
                for sample in family.samples
                if sample.name.endswith("_total")
            },
        )


def _read(histogram: Histogram) -> Distribution:
    bounds, counts, total = [], [], 0.0
    for family in histogram.collect():
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                bounds.append(float(sample.labels["le"]))
                counts.append(sample.value)
            elif sample.name.endswith("_sum"):
                total = sample.value
    return Distribution(bounds, counts, total)


def _describe(before: _Point, now: _Point) -> dict[str, Any]:
    gaps = now.sums.gaps.since(before.sums.gaps)
    seconds = max(now.at - before.at, 1e-3)
    ttfts = sorted(now.ttfts)
    num_first = now.sums.num_first - before.sums.num_first
    prompt_tokens = now.sums.prompt_tokens - before.sums.prompt_tokens
    return {
        "at": round(now.at, 2),
        "ttft_p50_s": _rank(ttfts, 0.5),
        "ttft_p95_s": _rank(ttfts, 0.95),
        "tbt_p50_s": _rounded(gaps.percentile(0.5)),
        "tbt_p99_s": _rounded(gaps.percentile(0.99)),
        "output_tokens_per_s": round((gaps.num + num_first) / seconds, 2),
        "prompt_tokens_per_s": round(prompt_tokens / seconds, 2),
        "prompt_tokens": round(prompt_tokens),
        "cached_tokens_by_tier": _cached(now.sums, before.sums),
    }


def _cached(now: _Sums, before: _Sums) -> dict[str, int]:
    return {
        tier: round(now.cached.get(tier, 0.0) - before.cached.get(tier, 0.0)) for tier in TIER_NAMES
    }


def _rank(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return _rounded(ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)])


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
