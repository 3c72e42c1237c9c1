"""How much a worker may write to etcd: its share of what the whole cluster may. Pure."""

from __future__ import annotations

from dataclasses import dataclass

BURST_S = 5.0
"""Of its share that a worker may save up."""

LOAD_REPORT_BYTES = 1024
"""Of a report: 610 with three tiers and two masters, 50 for each further master, and its key."""
MIN_PUTS_PER_S = 0.1
MIN_BYTES_PER_S = 1024.0
"""For clusters so large that load reports alone use up the budget."""


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's part of the cluster's budget for writes to etcd."""

    puts_per_s: float
    bytes_per_s: float
    max_blocks: int = 1 << 40
    """That it may publish, so that masters can hold them all."""


SAFE_SHARE = Share(puts_per_s=1.0, bytes_per_s=16 * 1024.0)
"""Until a leader has spoken: 500 workers with this and their load reports keep to the default."""


class Bucket:
    """Puts and bytes that may be written now. May be overdrawn by one write, to be waited for."""

    __slots__ = ("_at", "_bytes", "_puts", "_share")

    def __init__(self, share: Share) -> None:
        self._share = share
        self._at = 0.0
        self._puts = self._capacity(share.puts_per_s)
        self._bytes = self._capacity(share.bytes_per_s)

    def set_share(self, share: Share, now: float) -> None:
        self._fill(now)
        self._share = share
        self._fill(now)

    def ready_at(self, num_bytes: int, now: float) -> float:
        """When one put of this size may leave, or a larger one than could ever be saved up for."""
        self._fill(now)
        share = self._share
        needed = min(float(num_bytes), self._capacity(share.bytes_per_s))
        wait_s = max(
            (1.0 - self._puts) / share.puts_per_s, (needed - self._bytes) / share.bytes_per_s
        )
        # Rounding must not make a caller that waited exactly so long wait again.
        return now + wait_s if wait_s > 1e-9 else now

    def take(self, num_bytes: int, now: float) -> None:
        self._fill(now)
        self._puts -= 1.0
        self._bytes -= num_bytes

    def room_bytes(self, now: float) -> int:
        self._fill(now)
        return max(0, int(self._bytes))

    def _fill(self, now: float) -> None:
        share = self._share
        passed_s = max(0.0, now - self._at)
        self._at = max(self._at, now)
        puts = self._puts + passed_s * share.puts_per_s
        num_bytes = self._bytes + passed_s * share.bytes_per_s
        self._puts = min(puts, self._capacity(share.puts_per_s))
        self._bytes = min(num_bytes, self._capacity(share.bytes_per_s))

    @staticmethod
    def _capacity(per_s: float) -> float:
        return max(1.0, per_s * BURST_S)


def even_share(
    puts_per_s: float, bytes_per_s: float, num_workers: int, report_s: float = 1.0
) -> Share:
    """Each worker's part of a cluster's budget, after a load report of each every `report_s`."""
    reports_per_s = num_workers / report_s
    return Share(
        max(MIN_PUTS_PER_S, (puts_per_s - reports_per_s) / num_workers),
        max(MIN_BYTES_PER_S, (bytes_per_s - reports_per_s * LOAD_REPORT_BYTES) / num_workers),
    )
