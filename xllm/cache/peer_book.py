"""Which peers are worth asking, from how they did before. Pure, for the engine's thread.

    asked ──fails──> avoided for 1 s ──asked, fails again──> 2 s .. 60 s
                                     ──asked, delivers────> as new

A failure is a connection that could not be had, broke, stood still or spoke nonsense, or a block
that came damaged. A block that the peer does not have any more is none: whoever routed was late.
A peer that delivers more slowly than the blocks can be computed is not asked either, until its rate
is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xllm.cache.peer_fetch import Peer
from xllm.cache.rates import TransferRate
from xllm.protocol import FetchRange

FIRST_AVOIDANCE_S = 1.0
LAST_AVOIDANCE_S = 60.0
MAX_RECORDS = 1024


@dataclass(slots=True)
class PeerCounters:
    """Since the start."""

    num_failures: int = 0
    """Times a peer was given up for a while."""
    num_absent: int = 0
    """Blocks that a peer was asked for and did not have."""
    num_corrupt: int = 0


class _Record:
    __slots__ = ("avoid_s", "avoided_until", "rate")

    def __init__(self, rate: TransferRate) -> None:
        self.avoid_s = FIRST_AVOIDANCE_S
        self.avoided_until = 0.0
        self.rate = rate


class PeerBook:
    """What is known of each peer."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counters = PeerCounters()
        self._clock = clock
        self._records: dict[Peer, _Record] = {}

    def find(
        self, fetch: Sequence[FetchRange], index: int, bytes_per_s: float | None = None
    ) -> Peer | None:
        """Who to ask for block `index` of a prompt; None: nobody.

        fetch: who holds what, the best first. `bytes_per_s`: what is not worth asking for less.
        """
        for item in fetch:
            if item.first <= index < item.first + item.count:
                peer = Peer(item.worker_id, item.address)
                if self._is_worth(peer, bytes_per_s):
                    return peer
        return None

    def failed(self, peer: Peer) -> None:
        """Several failures at a time count as one."""
        record = self._record(peer)
        now = self._clock()
        if record.avoided_until > now:
            return
        self.counters.num_failures += 1
        record.avoided_until = now + record.avoid_s
        record.avoid_s = min(2 * record.avoid_s, LAST_AVOIDANCE_S)

    def delivered(self, peer: Peer, num_bytes: int, seconds: float) -> None:
        """`num_bytes` came in so much time, and all of them were sound."""
        record = self._record(peer)
        record.rate.observe(num_bytes, seconds)
        if record.avoided_until <= self._clock():
            record.avoid_s = FIRST_AVOIDANCE_S

    @property
    def num_avoided(self) -> int:
        now = self._clock()
        return sum(record.avoided_until > now for record in self._records.values())

    def _is_worth(self, peer: Peer, bytes_per_s: float | None) -> bool:
        record = self._records.get(peer)
        if record is None:
            return True
        if record.avoided_until > self._clock():
            return False
        rate = record.rate.bytes_per_s
        return rate is None or bytes_per_s is None or rate >= bytes_per_s

    def _record(self, peer: Peer) -> _Record:
        record = self._records.pop(peer, None)
        if record is None:
            record = _Record(TransferRate(self._clock))
            if len(self._records) >= MAX_RECORDS:
                del self._records[next(iter(self._records))]
        self._records[peer] = record  # the last one heard of is forgotten last
        return record
