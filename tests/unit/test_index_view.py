"""What a master makes of etcd's news, case by case; in any order: `test_index_replay.py`."""

from __future__ import annotations

import pytest

from tests.index_news import KEYS, A, B, Etcd, Master
from xllm.cache import event_codec as codec
from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import EventBatch, Head, Section, TierCode
from xllm.cache.index import SLICE_BLOCKS, CacheIndex
from xllm.coordination import Snapshot
from xllm.protocol import Epoch
from xllm.roles.index_view import IndexView

DEVICE = TierCode.DEVICE


def batch(kind: BlockEventKind, *hashes: int) -> EventBatch:
    return EventBatch((Section(DEVICE, kind, hashes),))


def stored(*hashes: int) -> bytes:
    return codec.encode_delta(batch(BlockEventKind.STORED, *hashes))


def removed(*hashes: int) -> bytes:
    return codec.encode_delta(batch(BlockEventKind.REMOVED, *hashes))


def chunk(*hashes: int) -> bytes:
    return codec.encode_chunk(batch(BlockEventKind.STORED, *hashes))


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


def test_a_read_that_is_older_than_what_was_heard_meanwhile_is_repeated() -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7))
    etcd.delta(A, 7, 1, stored(1))
    master.feed(etcd.delta(A, 7, 2, stored(2)))
    old = etcd.worker_snapshot(A, Epoch(7))
    master.feed(etcd.delta(A, 7, 3, stored(3)))
    master.feed(old)
    assert master.view.missing() == [(A, Epoch(7))]
    master.feed(etcd.worker_snapshot(A, Epoch(7)))
    assert master.view.missing() == []
    assert master.held(A) == {1, 2, 3}


def test_what_was_heard_but_is_not_there_is_not_asked_for_again_and_again() -> None:
    etcd, master = Etcd(), Master()
    master.feed(etcd.register(A, 7), etcd.delta(A, 7, 1, stored(1)))
    ghost = etcd.delta(A, 7, 2**60, stored(9))
    etcd.delete(ghost.kv.key)
    master.feed(ghost)
    for _ in range(2):
        master.feed(etcd.worker_snapshot(A, Epoch(7)))
    assert master.view.missing() == []
    assert master.held(A) == {1}


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
