"""Figures of one run."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from xllm.cache.index import CacheIndex


class Summary:
    """Filled while the run goes on; `finish` ends it."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.ttft_s: list[float] = []
        self.route_s: list[float] = []
        self.hit_blocks: Counter[int] = Counter()
        """By tier."""
        self.num_fetched = 0
        """Blocks that came from peers."""
        self.num_blocks = 0
        self.puts_per_s = self.bytes_per_s = 0.0
        """Of the busiest ten seconds, load reports included."""
        self.busy = 0.0
        """Share of the workers' time in which they computed prompts, until the last one came."""
        self.index_bytes = 0
        self.apply_s = 0.0
        self.errors_s: Sequence[float] = ()
        """Estimated TTFT less what it was."""
        self._writes: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()

    def add(self, ttft_s: float, prefix: Sequence[int], num_fetched: int, num_blocks: int) -> None:
        self.ttft_s.append(ttft_s)
        self.num_blocks += num_blocks
        for tier, count in enumerate(prefix):
            self.hit_blocks[tier] += count
        self.num_fetched += num_fetched

    def add_write(self, now: float, num_bytes: int) -> None:
        self._writes[int(now / 10)] += 1
        self._bytes[int(now / 10)] += num_bytes

    def finish(
        self,
        index: CacheIndex,
        load_puts_per_s: float,
        load_bytes_per_s: float,
        apply_s: float,
        errors_s: Sequence[float],
    ) -> None:
        self.puts_per_s = load_puts_per_s + max(self._writes.values(), default=0) / 10
        self.bytes_per_s = load_bytes_per_s + max(self._bytes.values(), default=0) / 10
        self.index_bytes = index_bytes(index)
        self.apply_s = apply_s
        self.errors_s = errors_s

    @property
    def reuse(self) -> float:
        """The share of prompt blocks that were not computed."""
        return (sum(self.hit_blocks.values()) + self.num_fetched) / self.num_blocks

    @property
    def mean_ttft_s(self) -> float:
        return sum(self.ttft_s) / len(self.ttft_s)

    def ttft_at(self, quantile: float) -> float:
        return quantile_of(self.ttft_s, quantile)

    @property
    def route_p99_s(self) -> float:
        return quantile_of(self.route_s, 0.99)


def quantile_of(values: Sequence[float], quantile: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]


def index_bytes(index: CacheIndex) -> int:
    """Tables and the ints in them; what is shared between blocks is left out."""
    statistics = index.statistics()
    tables = sum(map(sys.getsizeof, index._shards))
    tables += sum(sys.getsizeof(held) for tiers in index._held for held in tiers)
    return tables + 48 * statistics.num_copies
