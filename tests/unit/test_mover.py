"""Queues of the mover, step by step without threads, and with them."""

import threading

import pytest

from xllm.cache.mover import Mover, Transfer, TransferState
from xllm.cache.rates import FORGET_AFTER_S, HALF_LIFE_BYTES, TransferRate


def ignore(transfer: Transfer) -> None:
    pass


def nothing() -> None:
    pass


def test_loads_go_before_stores_and_each_in_order() -> None:
    mover = Mover(0)
    stores = [mover.try_start_store(nothing, ignore) for _ in range(2)]
    loads = [mover.start_load(nothing, ignore) for _ in range(2)]
    assert [mover.take_work() for _ in range(5)] == [*loads, *stores, None]


def test_stores_beyond_the_bound_are_refused_until_one_has_ended() -> None:
    mover = Mover(0, max_stores=2)
    first = mover.try_start_store(nothing, ignore)
    assert mover.try_start_store(nothing, ignore) is not None
    assert mover.try_start_store(nothing, ignore) is None
    assert not mover.can_store
    assert mover.take_work() is first
    assert not mover.can_store, "running stores count"
    assert first is not None
    mover.run(first)
    assert mover.can_store


def test_a_load_does_not_wait_for_stores_that_hang() -> None:
    began, go_on, loaded = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        assert go_on.wait(10)

    mover = Mover(1, num_store_threads=1)
    mover.try_start_store(hang, ignore)
    mover.try_start_store(hang, ignore)
    assert began.wait(10)
    mover.start_load(loaded.set, ignore)
    assert loaded.wait(10)
    go_on.set()
    assert mover.close(timeout_s=10.0)


def test_only_what_has_not_begun_is_cancelled() -> None:
    mover = Mover(0, max_stores=1)
    load, store = mover.start_load(nothing, ignore), mover.try_start_store(nothing, ignore)
    assert store is not None
    assert mover.try_cancel(store)
    assert not mover.try_cancel(store)
    assert mover.can_store
    assert mover.take_work() is load
    assert not mover.try_cancel(load)
    mover.run(load)
    assert mover.take_ended() == [load]
    assert store.state is TransferState.CANCELLED
    assert mover.take_work() is None


def test_an_error_is_kept_for_whoever_started_the_transfer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise ValueError("a defect")

    mover = Mover(0)
    transfer = mover.start_load(fail, ignore)
    work = mover.take_work()
    assert work is transfer
    mover.run(work)
    assert mover.take_ended() == [transfer]
    assert isinstance(transfer.error, ValueError)
    assert "transfer_failed" in caplog.text


def test_a_closed_mover_finishes_what_was_begun_and_nothing_else() -> None:
    began, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def first() -> None:
        began.set()
        assert go_on.wait(10)
        done.append(0)

    mover = Mover(1, num_store_threads=1)
    mover.try_start_store(first, ignore)
    mover.try_start_store(lambda: done.append(1), ignore)
    assert began.wait(10)
    assert not mover.close(timeout_s=0.0)
    assert mover.try_start_store(nothing, ignore) is None
    go_on.set()
    assert mover.close(timeout_s=10.0)
    assert done == [0]
    errors = [type(transfer.error) for transfer in mover.take_ended()]
    assert sorted(errors, key=str) == [type(None), TimeoutError]


def test_a_rate_follows_bytes_and_is_forgotten() -> None:
    now = [0.0]
    rate = TransferRate(lambda: now[0])
    assert rate.bytes_per_s is None
    rate.observe(100, 1.0)
    assert rate.bytes_per_s == 100
    rate.observe(10 * HALF_LIFE_BYTES, 1.0)
    assert rate.bytes_per_s == pytest.approx(10 * HALF_LIFE_BYTES, rel=0.01)
    now[0] = FORGET_AFTER_S
    assert rate.bytes_per_s is None
    rate.observe(50, 1.0)
    assert rate.bytes_per_s == 50
    assert rate.total_bytes == 150 + 10 * HALF_LIFE_BYTES


def test_a_load_that_brought_nothing_halves_a_rate() -> None:
    rate = TransferRate(lambda: 0.0)
    rate.observe(100, 1.0)
    rate.observe(0, 1.0)
    assert rate.bytes_per_s is not None
    assert rate.bytes_per_s < 50
