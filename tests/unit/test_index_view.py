"""What a master makes of etcd's news, however they come: twice, late, with holes."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.cache import event_codec as codec
from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import EventBatch, Head, Section, TierCode
from xllm.cache.index import SLICE_BLOCKS, CacheIndex
from xllm.coordination import DELETE, PUT, Change, Keys, KeyValue, Snapshot
from xllm.protocol import Epoch, WorkerId
from xllm.roles.index_view import IndexView, WorkerSnapshot

KEYS = Keys("t")
A, B = WorkerId("a:1"), WorkerId("b:1")
DEVICE = TierCode.DEVICE


def batch(kind: BlockEventKind, *hashes: int) -> EventBatch:
    return EventBatch((Section(DEVICE, kind, hashes),))


def stored(*hashes: int) -> bytes:
    return codec.encode_delta(batch(BlockEventKind.STORED, *hashes))


def removed(*hashes: int) -> bytes:
    return codec.encode_delta(batch(BlockEventKind.REMOVED, *hashes))


def chunk(*hashes: int) -> bytes:
    return codec.encode_chunk(batch(BlockEventKind.STORED, *hashes))


class Etcd:
    """What is there now, and all changes since the beginning."""

    def __init__(self) -> None:
        self.kvs: dict[str, KeyValue] = {}
        self.log: list[Change] = []
        self.revision = 1

    def put(self, key: str, value: bytes, lease: int) -> Change:
        self.revision += 1
        kv = KeyValue(key, value, self.revision, self.revision, lease)
        self.kvs[key] = kv
        self.log.append(Change(PUT, kv))
        return self.log[-1]

    def delete(self, key: str) -> Change:
        self.revision += 1
        del self.kvs[key]
        self.log.append(Change(DELETE, KeyValue(key, b"", 0, self.revision, 0)))
        return self.log[-1]

    def register(self, worker: WorkerId, epoch: int) -> Change:
        return self.put(KEYS.worker(worker), b"{}", epoch)

    def delta(self, worker: WorkerId, epoch: int, seq: int, value: bytes) -> Change:
        return self.put(f"{KEYS.cache_of(worker, Epoch(epoch))}d/{seq:016x}", value, epoch)

    def chunk(self, worker: WorkerId, epoch: int, gen: int, i: int, value: bytes) -> Change:
        return self.put(f"{KEYS.cache_of(worker, Epoch(epoch))}s/{gen:016x}/{i:016x}", value, epoch)

    def head(self, worker: WorkerId, epoch: int, head: Head) -> Change:
        key = f"{KEYS.cache_of(worker, Epoch(epoch))}head"
        return self.put(key, codec.encode_head(head), epoch)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.revision, tuple(self.kvs[key] for key in sorted(self.kvs)))

    def worker_snapshot(self, worker: WorkerId, epoch: Epoch) -> WorkerSnapshot:
        prefix = KEYS.cache_of(worker, epoch)
        kvs = [kv for key, kv in sorted(self.kvs.items()) if key.startswith(prefix)]
        return WorkerSnapshot(worker, epoch, kvs)


class Master:
    def __init__(self, *keeps: WorkerId) -> None:
        self.index = CacheIndex()
        self.view = IndexView(KEYS, self.index, lambda worker: worker in keeps)

    def feed(self, *updates: Snapshot | WorkerSnapshot | Change) -> None:
        for update in updates:
            self.view.feed([update] if isinstance(update, Change) else update)
        self.view.work()
        assert self.view.is_idle
        self.index.check_invariants()

    def held(self, worker: WorkerId, blocks: Iterable[int] = range(100)) -> set[int]:
        return {b for b in blocks if (worker, DEVICE) in self.index.holders(b)}


def test_deltas_are_applied_in_order_and_once() -> None:
    etcd, master = Etcd(), Master()
    first = etcd.delta(A, 7, 1, stored(1, 2))
    master.feed(etcd.register(A, 7), first, etcd.delta(A, 7, 2, removed(1)))
    assert master.held(A) == {2}
    master.feed(first)
    assert master.held(A) == {2}


def test_a_late_batch_of_a_dead_epoch_changes_nothing() -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7), etcd.delta(A, 7, 1, stored(1)))
    late = etcd.delta(A, 7, 2, stored(2))
    master.feed(etcd.register(A, 8))
    assert master.held(A) == set()
    master.feed(late, etcd.delta(A, 8, 1, stored(3)))
    assert master.held(A) == {3}
    master.feed(etcd.delete(KEYS.worker(A)), etcd.delta(A, 8, 2, stored(4)))
    assert master.held(A) == set()
    assert master.view.statistics().num_late == 2


def test_a_gap_is_filled_by_reading_again_and_until_then_nothing_is_believed() -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7), etcd.delta(A, 7, 1, stored(1)))
    etcd.delta(A, 7, 2, removed(1))
    master.feed(etcd.delta(A, 7, 3, stored(3)))
    assert master.held(A) == {1}
    assert master.view.missing() == [(A, Epoch(7))]
    master.feed(etcd.delta(A, 7, 4, stored(4)))
    master.feed(etcd.worker_snapshot(A, Epoch(7)))
    assert master.held(A) == {3, 4}
    assert master.view.missing() == []
    master.feed(etcd.delta(A, 7, 5, stored(5)))
    assert master.held(A) == {3, 4, 5}


def test_deletes_under_cache_mean_nothing() -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7), etcd.delta(A, 7, 1, stored(1)))
    master.feed(etcd.delete(f"{KEYS.cache_of(A, Epoch(7))}d/{1:016x}"))
    assert master.held(A) == {1}


def test_a_fold_is_no_news_and_a_jump_replaces_all() -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7), etcd.delta(A, 7, 1, stored(1)))
    master.feed(etcd.chunk(A, 7, 1, 0, chunk(1)), etcd.delta(A, 7, 2, stored(2)))
    master.feed(etcd.head(A, 7, Head(1, 1, 1)))
    assert master.held(A) == {1, 2}
    master.feed(etcd.chunk(A, 7, 2, 0, chunk(5)), etcd.chunk(A, 7, 2, 1, chunk(6)))
    master.feed(etcd.head(A, 7, Head(2, 2, 3)))
    assert master.held(A) == {5, 6}
    master.feed(etcd.delta(A, 7, 4, stored(7)))
    assert master.held(A) == {5, 6, 7}


def test_a_jump_without_all_its_chunks_is_read_again() -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7))
    etcd.chunk(A, 7, 1, 0, chunk(5))
    master.feed(etcd.head(A, 7, Head(1, 1, 1)))
    assert master.view.missing() == [(A, Epoch(7))]
    master.feed(etcd.worker_snapshot(A, Epoch(7)))
    assert master.held(A) == {5}


def test_a_master_that_starts_late_reads_head_chunks_and_what_came_after() -> None:
    etcd, master = Etcd(), Master()
    etcd.register(A, 7)
    etcd.chunk(A, 7, 2, 0, chunk(1, 2))
    etcd.head(A, 7, Head(2, 1, 10))
    etcd.delta(A, 7, 11, removed(2))
    etcd.chunk(A, 7, 3, 0, chunk(9))
    etcd.delta(B, 5, 1, stored(1))
    master.feed(etcd.snapshot())
    assert master.held(A) == {1}
    assert master.held(B) == set()
    master.feed(etcd.delta(A, 7, 12, stored(3)))
    assert master.held(A) == {1, 3}


def test_a_snapshot_that_goes_on_where_the_view_is_does_not_start_over() -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7), etcd.delta(A, 7, 1, stored(1)))
    etcd.delta(A, 7, 2, stored(2))
    before = master.view.statistics().num_batches
    master.feed(etcd.snapshot())
    assert master.held(A) == {1, 2}
    assert master.view.statistics().num_batches == before + 1


def test_an_etcd_that_came_back_older_is_believed() -> None:
    etcd, master = Etcd(), Master()
    etcd.register(A, 7)
    etcd.delta(A, 7, 1, stored(1))
    backup = etcd.snapshot()
    etcd.delta(A, 7, 2, stored(2))
    master.feed(etcd.snapshot(), backup)
    assert master.held(A) == {1}


def test_an_etcd_that_came_back_empty_leaves_only_workers_that_still_answer() -> None:
    etcd, master = Etcd(), Master(B)
    for worker in (A, B):
        master.feed(etcd.register(worker, 7), etcd.delta(worker, 7, 1, stored(1)))
    master.feed(Snapshot(1, ()))
    assert (master.held(A), master.held(B)) == (set(), {1})
    late = etcd.delta(B, 7, 2, stored(2))
    master.feed(late)
    assert master.held(B) == {1}
    master.feed(Etcd().register(B, 8))
    assert master.held(B) == set()


def test_a_worker_that_was_kept_is_forgotten_when_it_stops_answering() -> None:
    etcd = Etcd()
    answering = {A}
    index = CacheIndex()
    view = IndexView(KEYS, index, lambda worker: worker in answering)
    view.feed([etcd.register(A, 7), etcd.delta(A, 7, 1, stored(1))])
    view.feed([etcd.delete(KEYS.worker(A))])
    view.work()
    assert index.statistics().num_blocks == 1
    answering.clear()
    view.forget(A)
    view.work()
    assert index.statistics().num_blocks == 0


def test_who_publishes_nothing_is_named() -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7), etcd.register(B, 7))
    master.feed(etcd.head(B, 7, Head(1, 0, 1)))
    assert master.view.workers_without_events() == [A]


@pytest.mark.parametrize(
    ("name", "value"),
    [("d/0000000000000001", b"garbage"), ("d/x", b""), ("nonsense", b""), ("head", b"\1\3")],
)
def test_a_bad_value_is_logged_and_harms_nobody(
    name: str, value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7), etcd.put(KEYS.cache_of(A, Epoch(7)) + name, value, 7))
    assert "bad_index_value" in caplog.text
    master.feed(etcd.register(B, 7), etcd.delta(B, 7, 1, stored(1)))
    assert master.held(B) == {1}


def test_a_head_that_counts_chunks_that_are_not_there_costs_nothing() -> None:
    etcd, master = Etcd(), Master()
    etcd.register(A, 7)
    etcd.chunk(A, 7, 1, 0, chunk(1))
    etcd.head(A, 7, Head(1, 2**32 - 1, 1))
    master.feed(etcd.snapshot())
    assert master.held(A) == set()
    master.feed(etcd.head(A, 7, Head(2, 2**32 - 1, 2)))
    assert master.view.missing() == [(A, Epoch(7))]


def test_a_jump_with_a_bad_chunk_is_read_again_and_until_then_nothing_is_believed() -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7), etcd.delta(A, 7, 1, stored(1)))
    master.feed(etcd.chunk(A, 7, 1, 0, chunk(5)), etcd.chunk(A, 7, 1, 1, b"garbage"))
    master.feed(etcd.head(A, 7, Head(1, 2, 3)))
    assert master.view.missing() == [(A, Epoch(7))]
    # Number 2 would be next for whoever thinks that nothing has happened.
    master.feed(etcd.delta(A, 7, 2, stored(9)))
    assert 9 not in master.held(A)
    etcd.delete(f"{KEYS.cache_of(A, Epoch(7))}d/{1:016x}")
    etcd.delete(f"{KEYS.cache_of(A, Epoch(7))}d/{2:016x}")
    etcd.chunk(A, 7, 1, 1, chunk(6))
    etcd.delta(A, 7, 4, stored(7))
    master.feed(etcd.worker_snapshot(A, Epoch(7)))
    assert master.held(A) == {5, 6, 7}


def test_work_stops_when_its_time_is_over_and_goes_on_later() -> None:
    etcd, master = Etcd(), Master()
    hashes = tuple(range(5 * SLICE_BLOCKS))
    master.view.feed([etcd.register(A, 7), etcd.delta(A, 7, 1, stored(*hashes))])
    turns = 0
    while not master.view.is_idle:
        master.view.work(lambda: True)
        turns += 1
    assert turns >= 5
    assert master.index.num_held(A)[DEVICE] == len(hashes)


def history(rng: random.Random) -> tuple[Etcd, dict[WorkerId, set[int]]]:
    """What two workers might write, with folds, jumps, restarts and farewells."""
    etcd = Etcd()
    states: dict[WorkerId, set[int]] = {}
    for worker in (A, B):
        epoch = rng.randrange(1, 100) * 10
        held: set[int] = set()
        for _ in range(rng.randrange(1, 4)):
            epoch += 1
            etcd.register(worker, epoch)
            seq, gen, held = 0, 0, set()
            for _ in range(rng.randrange(12)):
                action = rng.randrange(6)
                blocks = rng.sample(range(20), 3)
                if action < 4:
                    seq += 1
                    is_store = action < 3
                    etcd.delta(
                        worker, epoch, seq, stored(*blocks) if is_store else removed(*blocks)
                    )
                    held = held | set(blocks) if is_store else held - set(blocks)
                else:
                    gen += 1
                    if action == 5:
                        seq += 1
                        held = set(blocks)
                    etcd.chunk(worker, epoch, gen, 0, chunk(*held or {99}))
                    held = held or {99}
                    if action == 4 and held == {99}:
                        seq += 1
                    etcd.head(worker, epoch, Head(gen, 1, seq))
                    prefix = KEYS.cache_of(worker, Epoch(epoch))
                    for key in sorted(etcd.kvs):
                        name = key.removeprefix(prefix)
                        old_delta = name.startswith("d/") and int(name[2:], 16) <= seq
                        if old_delta or (name.startswith("s/") and int(name[2:18], 16) < gen):
                            etcd.delete(key)
        if rng.random() < 0.3:
            etcd.delete(KEYS.worker(worker))
            held = set()
        states[worker] = held
    return etcd, states


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_the_end_is_right_however_the_log_is_delivered(seed: int) -> None:
    rng = random.Random(seed)
    etcd, states = history(rng)
    master = Master()
    seen: list[Change] = []
    for change in etcd.log:
        is_registration = change.kv.key.startswith(KEYS.workers)
        if rng.random() < 0.15 and not is_registration:
            continue
        seen.append(change)
        master.feed(change)
        while seen and rng.random() < 0.3:
            again = rng.choice(seen)
            if not again.kv.key.startswith(KEYS.workers):
                master.feed(again)
    # What was lost at the very end nobody can notice; the next event, or a snapshot, brings it.
    if rng.random() < 0.5:
        master.feed(etcd.snapshot())
    else:
        for worker in states:
            registered = etcd.kvs.get(KEYS.worker(worker))
            if registered is not None:
                master.feed(etcd.worker_snapshot(worker, Epoch(registered.lease)))
    for worker, held in states.items():
        assert master.held(worker) == held
    assert master.view.missing() == []
