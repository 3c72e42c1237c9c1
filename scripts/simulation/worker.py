"""A worker that takes the time its rates say: one prompt after the other, decodes beside them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import msgspec

from simulation.trace import Arrival
from xllm.cache.block_pool import BlockEvent, BlockEventKind
from xllm.cache.event_codec import TierCode
from xllm.protocol import PEER, BlockHash, Epoch, PrefillCost, WorkerId, WorkerLoad
from xllm.roles.cost_model import MAX_STEP_S

RATES = {
    path.stem.removeprefix("rates_"): path for path in Path(__file__).parent.glob("rates_*.json")
}
"""Committed files by name."""

_STORED, _REMOVED = BlockEventKind.STORED, BlockEventKind.REMOVED
_pack = Struct("<QQ").pack
"""A name of 16 bytes for a block's number."""


class Decode(msgspec.Struct, frozen=True):
    step_s: float
    sequence_s: float


class Prefill(msgspec.Struct, frozen=True):
    step_s: float
    token_s: float
    pair_s: float


class Rates(msgspec.Struct, frozen=True):
    source: str
    block_size: int
    prefill: Prefill
    decode: Decode
    device_blocks: int
    tier_block_s: dict[str, float]
    """Seconds per block to load from below the device, or from a peer."""
    speedup_per_worker: float
    """Of the trace's clock, times the number of workers: the same load for each."""


def read_rates(path: Path) -> Rates:
    return msgspec.json.decode(path.read_bytes(), type=Rates)


@dataclass(slots=True)
class Running:
    """One request on its worker."""

    arrival: Arrival
    came_at: float
    estimate_s: float = 0.0
    prefix: tuple[int, ...] = (0, 0, 0)
    """Blocks by tier that it holds itself."""
    num_fetched: int = 0
    """Blocks behind these that a peer holds."""
    finishes_at: float = 0.0
    source: SimulatedWorker | None = None
    """Who has blocks up to `fetch_end`, and may be asked for them."""
    fetch_end: int = 0

    @property
    def num_held(self) -> int:
        return sum(self.prefix) + self.num_fetched


class TierCache:
    """Blocks of one tier by their last use, the longest ago first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.used_at: OrderedDict[int, float] = OrderedDict()
        self.events: list[BlockEvent] = []

    def use(self, blocks: Iterable[int], now: float) -> list[int]:
        """Stores or refreshes them, one after the other; returns what was evicted."""
        used_at, num_blocks, events = self.used_at, self.num_blocks, self.events
        all_evicted = []
        for block in blocks:
            is_new = block not in used_at
            used_at[block] = now
            if not is_new:
                used_at.move_to_end(block)
                continue
            events.append(BlockEvent(_STORED, BlockHash(_pack(block, 0))))
            if len(used_at) > num_blocks:
                evicted, _ = used_at.popitem(last=False)
                events.append(BlockEvent(_REMOVED, BlockHash(_pack(evicted, 0))))
                all_evicted.append(evicted)
        return all_evicted

    def lend(self, blocks: Iterable[int]) -> None:
        """Somebody else has them now, too: they are the next to go unless they are used again."""
        for block in blocks:
            if block in self.used_at:
                self.used_at.move_to_end(block, last=False)

    def eviction_age_s(self, now: float) -> float | None:
        if len(self.used_at) < self.num_blocks:
            return None
        return now - next(iter(self.used_at.values()))


class SimulatedWorker:
    """What is on the device is in host memory, too; what leaves host memory goes to disk."""

    def __init__(
        self,
        worker_id: WorkerId,
        rates: Rates,
        tiers: Sequence[tuple[str, int]],
        with_peers: bool = False,
    ) -> None:
        """`tiers`: name and number of blocks of each, from the device down."""
        self.worker_id = worker_id
        self.rates = rates
        self.cost = PrefillCost(rates.prefill.step_s, rates.prefill.token_s, rates.prefill.pair_s)
        self.tiers = {name: TierCache(num_blocks) for name, num_blocks in tiers}
        self._caches = list(self.tiers.values())
        self._measured_s = {name: rates.tier_block_s[name] for name, _ in tiers[1:]}
        if with_peers:
            self._measured_s[PEER] = rates.tier_block_s[PEER]
        self._block_s = [0.0, *(rates.tier_block_s[name] for name, _ in tiers[1:])]
        self.waiting: deque[Running] = deque()
        self.computing: Running | None = None
        self.num_decoding = 0
        self.busy_s = 0.0
        """Seconds of computing prompts so far."""

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + (self.computing is not None) + self.num_decoding

    def enqueue(
        self,
        arrival: Arrival,
        now: float,
        source: SimulatedWorker | None = None,
        fetch_end: int = 0,
    ) -> None:
        """`source` may be asked for the prompt's blocks up to `fetch_end`."""
        running = Running(arrival, now, source=source, fetch_end=fetch_end)
        self._look(running)
        running.estimate_s = self._service_s(running)
        self.waiting.append(running)

    def start_next(self, now: float) -> Running | None:
        """The next prompt begins to be computed, if none is; it says when it finishes."""
        if self.computing is not None or not self.waiting:
            return None
        running = self.waiting.popleft()
        self._look(running)
        loading_s = sum(n * s for n, s in zip(running.prefix, self._block_s, strict=False))
        if running.num_fetched:
            loading_s += running.num_fetched * self._measured_s[PEER]
        service_s = self._service_s(running)
        running.finishes_at = max(now, running.came_at + loading_s) + service_s
        self.busy_s += service_s
        self.computing = running
        return running

    def finish(self, running: Running, now: float) -> None:
        """The first token is there, and the prompt's blocks with it."""
        self.computing = None
        self.num_decoding += 1
        blocks = running.arrival.hashes[::-1]
        device, *below = self._caches
        device.use(blocks, now)
        if running.source is not None and running.num_fetched:
            start = sum(running.prefix)
            fetched = running.arrival.hashes[start : start + running.num_fetched]
            running.source.lend(fetched)
        if below:
            demoted = below[0].use(blocks, now)
            if len(below) > 1:
                below[1].use(demoted, now)

    def lend(self, blocks: Sequence[int]) -> None:
        """They were sent to a peer: from host memory where there is any, which keeps them."""
        if len(self._caches) == 1:
            self._caches[0].lend(blocks)

    def decode_s(self, num_output: int) -> float:
        """From the first token to the last, as busy as it is now."""
        return num_output * self.step_s

    @property
    def step_s(self) -> float:
        decode = self.rates.decode
        return decode.step_s + decode.sequence_s * self.num_decoding

    def take_events(self) -> list[tuple[TierCode, list[BlockEvent]]]:
        taken = []
        for tier, cache in zip(TierCode, self._caches, strict=False):
            if cache.events:
                taken.append((tier, cache.events))
                cache.events = []
        return taken

    def load(self, epoch: Epoch, now: float) -> WorkerLoad:
        queue_s = sum(running.estimate_s for running in self.waiting)
        tokens = sum(running.arrival.num_tokens for running in self.waiting)
        if self.computing is not None:
            queue_s += self.computing.finishes_at - now
        ages = {name: cache.eviction_age_s(now) for name, cache in self.tiers.items()}
        capacity = self.rates.device_blocks
        used = len(self.computing.arrival.hashes) if self.computing is not None else 0
        return WorkerLoad(
            epoch=epoch,
            waiting_requests_num=len(self.waiting),
            running_requests_num=self.num_decoding + (self.computing is not None),
            waiting_tokens_num=tokens,
            gpu_cache_usage_perc=min(1.0, used / capacity),
            decode_step_s=self.step_s if self.num_decoding else 0.0,
            queue_s=queue_s,
            prefill_cost=self.cost,
            tier_block_s=self._measured_s,
            eviction_age_s={name: age for name, age in ages.items() if age is not None},
        )

    def _look(self, running: Running) -> None:
        """What it and its peer hold of the prompt now."""
        hashes = running.arrival.hashes
        running.prefix = self._match(hashes)
        running.num_fetched = 0
        if running.source is not None and (start := sum(running.prefix)) < running.fetch_end:
            running.num_fetched = sum(running.source._match(hashes[start : running.fetch_end]))

    def _match(self, hashes: Sequence[int]) -> tuple[int, ...]:
        counts = [0] * len(self._caches)
        caches = [cache.used_at for cache in self._caches]
        for block in hashes:
            for tier, cache in enumerate(caches):
                if block in cache:
                    counts[tier] += 1
                    break
            else:
                break
        return tuple(counts)

    def _service_s(self, running: Running) -> float:
        arrival = running.arrival
        start = min(running.num_held * self.rates.block_size, arrival.num_tokens - 1)
        share = 1.0 - self.step_s / MAX_STEP_S if self.num_decoding else 1.0
        return self.cost.seconds(start, arrival.num_tokens - start) / max(share, 0.25)
