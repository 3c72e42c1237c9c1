"""The eight defects of upstream's cache-aware router, by number: none of them may be here.

All pure parts are connected as in a cluster: what workers store goes through their upload plans,
as keys and values of etcd, into a master's view, whose index the router asks.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest

from xllm.cache.block_hash import CacheRoot, hash_blocks
from xllm.cache.block_pool import BlockEvent, BlockEventKind
from xllm.cache.event_codec import TierCode
from xllm.cache.index import CacheIndex
from xllm.cache.upload_budget import Share
from xllm.cache.upload_plan import UploadPlan
from xllm.coordination import DELETE, PUT, Change, Keys, KeyValue
from xllm.protocol import (
    BlockHash,
    Epoch,
    GenerateRequest,
    PrefillCost,
    SamplingParams,
    TokenDelta,
    WorkerId,
    WorkerLoad,
)
from xllm.roles.car_policy import CostAware, CostRoute
from xllm.roles.global_scheduler import Candidate
from xllm.roles.index_view import IndexView, WorkerSnapshot
from xllm.roles.progress import RequestProgress

KEYS = Keys("t")
BLOCK = 16
ROOT = CacheRoot("weights", "float32", BLOCK)
COST = PrefillCost(step_s=0.01, token_s=1e-3, pair_s=0.0)
BLOCK_S = BLOCK * COST.token_s
A, B = WorkerId("a"), WorkerId("b")
DEVICE, HOST, DISK, _ = TierCode
NUM_BLOCKS = 10
PROMPT = list(range(NUM_BLOCKS * BLOCK))
NAMES = hash_blocks(ROOT.hash(), PROMPT, BLOCK)


class World:
    """Two workers and a master; `lost` names keys whose changes do not reach the master."""

    def __init__(self) -> None:
        self.now = 100.0
        self.index = CacheIndex()
        self.view = IndexView(KEYS, self.index)
        self.router = CostAware(self.index, lambda _: ROOT, lambda: self.now)
        self.kvs: dict[str, KeyValue] = {}
        self.lost: set[str] = set()
        self.num_puts = 0
        self.plans: dict[WorkerId, UploadPlan] = {}
        self.epochs: dict[WorkerId, Epoch] = {}
        for number, worker in enumerate((A, B), 1):
            self.begin(worker, Epoch(number))
            self.report(worker)

    def begin(self, worker: WorkerId, epoch: Epoch) -> None:
        self.epochs[worker] = epoch
        self.put(KEYS.worker(worker), b"{}", epoch)
        self.plans[worker] = UploadPlan(Share(1000, 1e7), random.Random(1))
        self.plans[worker].begin_epoch(self.now)
        self.flush()

    def report(self, worker: WorkerId, **fields: object) -> None:
        load = WorkerLoad(epoch=self.epochs[worker], prefill_cost=COST, **fields)  # type: ignore[arg-type]
        self.router.report(ROOT, worker, load)

    def put(self, key: str, value: bytes, lease: int) -> None:
        kv = KeyValue(key, value, 1, 1, lease)
        self.kvs[key] = kv
        if not any(key.endswith(end) for end in self.lost):
            self.view.feed([Change(PUT, kv)])
            self.view.work()

    def hold(self, worker: WorkerId, names: Iterable[BlockHash], tier: TierCode = DEVICE) -> None:
        events = [BlockEvent(BlockEventKind.STORED, name) for name in names]
        self.plans[worker].record(tier, events, self.now)
        self.flush()

    def flush(self) -> None:
        """Every plan writes what it has, as it would within the next tenth of a second."""
        self.now += 0.1
        for worker, plan in self.plans.items():
            epoch = self.epochs[worker]
            while (write := plan.take(self.now)) is not None:
                self.num_puts += len(write.puts)
                for key, value in write.puts:
                    self.put(KEYS.cache_of(worker, epoch) + key, value, epoch)
                plan.written(self.now)

    def explain(self, *workers: WorkerId) -> list[tuple[WorkerId, int, float]]:
        """Worker, blocks of the prompt that count, and estimate; the chosen one first."""
        candidates = [Candidate(worker, None, 0) for worker in workers or (A, B)]
        return [
            (line["worker_id"], sum(line["prefix_blocks"].values()), line["ttft_s"])
            for line in self.router.explain(request(), candidates)
        ]


def request(output: Sequence[int] = ()) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        model_id="m",
        prompt_ids=PROMPT,
        sampling=SamplingParams(max_tokens=8),
        output_ids=list(output),
    )


def test_defect_1_anything_below_a_full_match_counts_nothing() -> None:
    world = World()
    world.hold(B, NAMES[:1])
    (best, num_held, best_s), (_, _, other_s) = world.explain()
    assert (best, num_held) == (B, 1)
    assert other_s - best_s == pytest.approx(BLOCK_S)


@pytest.mark.parametrize("tier", [HOST, DISK])
def test_defect_2_hits_below_the_device_are_ignored(tier: TierCode) -> None:
    world = World()
    world.report(B, tier_block_s={tier.name.lower(): BLOCK_S / 4})
    world.hold(B, NAMES, tier)
    best, num_held, best_s = world.explain()[0]
    assert (best, num_held) == (B, NUM_BLOCKS)
    assert NUM_BLOCKS * BLOCK_S / 4 < best_s < NUM_BLOCKS * BLOCK_S / 2


def test_defect_3_a_block_that_is_on_no_device_is_a_crash() -> None:
    world = World()
    world.report(A, tier_block_s={"host": BLOCK_S / 8, "disk": BLOCK_S / 4})
    world.hold(A, NAMES[:4], HOST)
    world.hold(A, NAMES[4:6], DISK)
    assert world.explain()[0][:2] == (A, 6)
    assert world.explain(B)[0][:2] == (B, 0)


def test_defect_4_a_block_counts_without_the_one_before_it() -> None:
    world = World()
    world.hold(A, NAMES[:2])
    world.hold(B, [NAMES[0], *NAMES[2:]])
    assert [line[:2] for line in world.explain()] == [(A, 2), (B, 1)]


def test_defect_5_a_dead_worker_stays_in_the_index() -> None:
    world = World()
    world.hold(B, NAMES)
    assert world.index.num_held(B)[DEVICE] == NUM_BLOCKS
    dead = world.plans.pop(B)
    world.view.feed([Change(DELETE, KeyValue(KEYS.worker(B), b"", 0, 9, 0))])
    world.view.work()
    world.router.forget(B)
    assert world.index.statistics().num_copies == 0
    # What it had still on the way changes nothing, nor does another process of its name.
    dead.record(DEVICE, [BlockEvent(BlockEventKind.STORED, NAMES[0])], world.now)
    world.plans[B] = dead
    world.flush()
    assert world.index.statistics().num_copies == 0
    world.begin(B, Epoch(7))
    assert [line[1] for line in world.explain()] == [0, 0]


def test_defect_6_a_lost_event_lies_for_ever() -> None:
    world = World()
    world.hold(B, NAMES[:5])
    (last,) = [key for key in world.kvs if "/d/" in key]
    number = int(last.rpartition("/")[2], 16)
    world.lost = {f"{number + 1:016x}"}
    events = [BlockEvent(BlockEventKind.REMOVED, name) for name in NAMES[:5]]
    world.plans[B].record(DEVICE, events, world.now)
    world.flush()
    world.hold(B, NAMES[5:])
    assert world.view.missing() == [(B, world.epochs[B])], "the gap is seen"
    folder = KEYS.cache_of(B, world.epochs[B])
    kvs = [kv for key, kv in sorted(world.kvs.items()) if key.startswith(folder)]
    world.view.feed(WorkerSnapshot(B, world.epochs[B], kvs))
    world.view.work()
    assert world.view.missing() == []
    assert world.index.num_held(B)[DEVICE] == 5
    assert [line[1] for line in world.explain()] == [0, 0], "the first five are gone"


def test_defect_7_each_changed_block_is_a_put() -> None:
    world = World()
    before = world.num_puts
    tokens = list(range(1000 * BLOCK))
    world.hold(A, hash_blocks(ROOT.hash(), tokens, BLOCK))
    assert world.index.num_held(A)[DEVICE] == 1000
    assert world.num_puts - before == 1


def test_defect_8_running_requests_are_cancelled_when_their_worker_is_lost() -> None:
    world = World()
    candidates = [Candidate(A, None, 0), Candidate(B, None, 0)]
    progress = RequestProgress(request(), max_retries=2)

    def send(asked: GenerateRequest, among: list[Candidate]) -> CostRoute:
        route = world.router.route(asked, among)
        world.router.dispatched(route)
        return route

    first = send(request(), candidates)
    delta = TokenDelta(request_id="r", attempt=0, index=0, offset=0, token_ids=[5, 6])
    assert progress.take(delta) is not None
    # Its worker is lost: what it has goes on, with nothing of it left behind.
    world.router.ended(first)
    world.router.forget(first.worker_id)
    (moved,) = progress.next_attempts(request(), is_loss=True)
    assert (moved.attempt, moved.output_ids, moved.prompt_ids) == (1, [5, 6], PROMPT)
    others = [c for c in candidates if c.worker_id != first.worker_id]
    assert send(moved, others).worker_id != first.worker_id
