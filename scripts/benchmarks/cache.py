"""Hit rates of the cache's real code on Mooncake's conversation trace, without a model.

`one_tier`: a tier of 5, 10, 25 and 50 % of the working set (the trace's distinct blocks), with each
eviction policy, against LRU and against Belady's optimum, which knows the future.

`three_tiers`: device, host and disk in the proportion 1 : 2 : 4, together as large as that; the
device pool, the tiers' facade and all below it are those of a worker, only that moving a block
moves no bytes. Hits are counted by the tier that a block came from.

A hit is a block of a prompt's unbroken cached prefix; rates are of all prompt blocks.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.report import Row, at_least, plain
from benchmarks.trace import CONVERSATION, TracedRequest, read_trace
from benchmarks.weightless import make_tiers
from xllm.cache.block_pool import BlockPool
from xllm.cache.eviction import EvictionPolicyName, make_eviction_policy
from xllm.cache.mover import Mover
from xllm.cache.tier import Lookup, SlotTable, TierName
from xllm.cache.tiers import Tiers
from xllm.protocol import BlockHash

SUMMARY = "hit rates of tiers and eviction policies on a trace of conversations"

SHARES = (0.05, 0.10, 0.25, 0.50)
OPTIMUM = "belady"
MIN_OPERATIONS_PER_S = 100_000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, default=CONVERSATION, help="in Mooncake's format")
    parser.add_argument("--requests", type=int, default=0, help="only the first N; 0: all")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw it (needs matplotlib)")


def run(options: argparse.Namespace) -> list[Row]:
    requests = read_trace(options.trace)
    if options.requests:
        requests = requests[: options.requests]
    working_set = len({block for request in requests for block in request.blocks})
    sizes = {share: max(7, int(working_set * share)) for share in SHARES}
    curves = _one_tier(requests, sizes)
    hits, operations_per_s = _three_tiers(requests, sizes)
    unlimited = _replay_table(requests, working_set, EvictionPolicyName.LRU)
    rows = [plain("unlimited", 100 * unlimited, "% hits")]
    lru = curves[EvictionPolicyName.LRU]
    for name, curve in curves.items():
        for share, rate in curve.items():
            target = 1.0 if name == EvictionPolicyName.GRADED else None
            label = f"one_tier {name} {share:.0%}"
            rows.append(at_least(label, 100 * rate, "% hits", 100 * lru[share], target))
    for (policy, share), by_tier in hits.items():
        label = f"three_tiers {policy} {share:.0%}"
        rows += [
            plain(f"{label} {tier}", 100 * by_tier[tier], "% hits")
            for tier in (TierName.DEVICE, TierName.HOST, TierName.DISK)
        ]
        total, optimum = sum(by_tier.values()), curves[OPTIMUM][share]
        rows.append(at_least(f"{label} all", 100 * total, "% hits", 100 * optimum, None))
    rows.append(
        at_least("operations", operations_per_s, "blocks/s", float(MIN_OPERATIONS_PER_S), 1.0)
    )
    if options.plot:
        _plot(options.plot, curves, hits, unlimited)
    return rows


Curve = dict[float, float]
"""Hit rate by share of the working set."""

TierHits = dict[tuple[str, float], dict[TierName, float]]
"""Hit rate by tier, for each policy and share."""


def _one_tier(requests: Sequence[TracedRequest], sizes: dict[float, int]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {
        policy: {share: _replay_table(requests, size, policy) for share, size in sizes.items()}
        for policy in EvictionPolicyName
    }
    curves[OPTIMUM] = {share: _replay_optimum(requests, size) for share, size in sizes.items()}
    return curves


def _replay_table(
    requests: Sequence[TracedRequest], num_slots: int, policy: EvictionPolicyName
) -> float:
    table = SlotTable(num_slots, make_eviction_policy(policy, num_slots), clock=lambda: 0.0)

    def is_cached(block: BlockHash) -> bool:
        return table.lookup(block) is Lookup.HIT

    def use(blocks: list[BlockHash]) -> None:
        table.touch(blocks)
        parent = None
        for block in blocks:
            slot = table.prepare_store(block, parent)
            if slot is not None:
                table.complete_store(slot, b"")
            parent = block
        table.take_events()

    return _hit_rate(requests, is_cached, use)


def _replay_optimum(requests: Sequence[TracedRequest], num_slots: int) -> float:
    """Belady: what is used again last goes first, and does not come in if that is itself.

    Over single blocks: no online policy gets more of the trace's blocks.
    """
    never = len(requests)
    uses: dict[BlockHash, list[int]] = {}
    for i in range(never - 1, -1, -1):
        for block in requests[i].blocks:
            uses.setdefault(block, []).append(i)
    next_use: dict[BlockHash, int] = {}
    latest: list[tuple[int, BlockHash]] = []
    now = 0

    def use(blocks: list[BlockHash]) -> None:
        nonlocal now
        for block in blocks:
            while uses[block] and uses[block][-1] <= now:
                uses[block].pop()
            used_at = uses[block][-1] if uses[block] else never
            if block not in next_use and len(next_use) >= num_slots:
                while next_use.get(latest[0][1]) != -latest[0][0]:
                    heapq.heappop(latest)
                if -latest[0][0] <= used_at:
                    continue
                del next_use[heapq.heappop(latest)[1]]
            next_use[block] = used_at
            heapq.heappush(latest, (-used_at, block))
        now += 1

    return _hit_rate(requests, next_use.__contains__, use)


def _hit_rate(
    requests: Sequence[TracedRequest],
    is_cached: Callable[[BlockHash], bool],
    use: Callable[[list[BlockHash]], None],
) -> float:
    num_hits = num_blocks = 0
    for request in requests:
        num_blocks += len(request.blocks)
        for block in request.blocks:
            if not is_cached(block):
                break
            num_hits += 1
        use(request.blocks)
    return num_hits / num_blocks


def _three_tiers(
    requests: Sequence[TracedRequest], sizes: dict[float, int]
) -> tuple[TierHits, float]:
    """Hit rates, and block operations per second of CPU time over all replays."""
    hits: TierHits = {}
    num_operations = 0
    num_blocks = sum(len(request.blocks) for request in requests)
    largest = max(len(request.blocks) for request in requests)
    started = time.process_time()
    for policy in EvictionPolicyName:
        for share, size in sizes.items():
            worker = Worker(max(size // 7, largest), 2 * size // 7, 4 * size // 7, policy)
            for request in requests:
                worker.serve(request.blocks)
            num_operations += worker.num_operations
            hits[policy, share] = {
                tier: worker.hits[tier] / num_blocks
                for tier in (TierName.DEVICE, TierName.HOST, TierName.DISK)
            }
    return hits, num_operations / (time.process_time() - started)


class Worker:
    """What a worker's scheduler does with its cache, one request at a time."""

    def __init__(
        self, num_device: int, num_host: int, num_disk: int, policy: EvictionPolicyName
    ) -> None:
        self.hits: Counter[TierName] = Counter()
        self._num_served = 0
        """Blocks looked up, loaded or committed."""
        self._pool = BlockPool(num_device)
        self._mover = Mover(0)
        self._tiers: Tiers = make_tiers(self._mover, num_host, num_disk, policy)
        self._pool.on_evict = self._tiers.evicted

    def serve(self, blocks: list[BlockHash]) -> None:
        pool, tiers = self._pool, self._tiers
        cached = []
        for block in blocks:
            block_id = pool.lookup(block)
            if block_id is None:
                break
            cached.append(block_id)
        lower = tiers.match(blocks[len(cached) :])
        pool.acquire(cached)
        num_new = len(blocks) - len(cached)
        fresh = pool.allocate(num_new)
        assert fresh is not None
        num_found = len(cached) + len(lower)
        load = list(zip(blocks[len(cached) : num_found], lower, fresh, strict=False))
        if load:
            ticket = tiers.start_load(load, timeout_s=1.0)
            self._move()
            assert ticket.num_arrived == len(load)
        tiers.used(blocks[:num_found])
        for i in range(len(cached), len(blocks)):
            pool.commit(fresh[i - len(cached)], blocks[i])
            tiers.committed(blocks[i], blocks[i - 1] if i else None, fresh[i - len(cached)])
        pool.release(cached + fresh)
        self._move()
        self.hits[TierName.DEVICE] += len(cached)
        self.hits.update(source.tier for source in lower)
        self._num_served += len(blocks) + len(load) + num_new

    @property
    def num_operations(self) -> int:
        """What was done to one block in one tier: looked up, committed, loaded, stored, evicted."""
        tables = self._tiers.statistics().tables.values()
        num_moved = sum(table.num_stores + table.num_evictions for table in tables)
        return self._num_served + num_moved + self._pool.statistics().num_evictions

    def _move(self) -> None:
        """Lets every transfer run to its end."""
        self._tiers.poll()
        while (transfer := self._mover.take_work()) is not None:
            self._mover.run(transfer)
            self._tiers.poll()
        self._tiers.take_events()
        self._pool.take_events()


def _plot(path: Path, curves: dict[str, Curve], hits: TierHits, unlimited: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for name, curve in curves.items():
        left.plot([100 * s for s in curve], [100 * r for r in curve.values()], "o-", label=name)
    left.axhline(100 * unlimited, color="grey", linestyle=":", label="unlimited")
    left.set(title="one tier", xlabel="% of the working set", ylabel="% of prompt blocks hit")
    left.legend()
    labels = [f"{policy}\n{share:.0%}" for policy, share in hits]
    below = [0.0] * len(labels)
    for tier in (TierName.DEVICE, TierName.HOST, TierName.DISK):
        heights = [100 * by_tier[tier] for by_tier in hits.values()]
        right.bar(labels, heights, bottom=below, label=str(tier))
        below = [a + b for a, b in zip(below, heights, strict=True)]
    right.axhline(100 * unlimited, color="grey", linestyle=":")
    right.set(title="device : host : disk = 1 : 2 : 4")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
