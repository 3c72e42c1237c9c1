"""How long a queue is estimated to be, on a clock of the test's own."""

from __future__ import annotations

import pytest

from xllm.roles.admission import WINDOW_S, QueueMeter


def test_an_empty_queue_waits_for_nothing() -> None:
    assert QueueMeter().wait_s(100.0, 5.0) == 0.0


def test_a_burst_is_known_at_once_by_its_tokens() -> None:
    queue = QueueMeter()
    for _ in range(10):
        queue.add(200, now=1.0)
    assert queue.wait_s(500.0, 1.0) == 4.0
    assert queue.wait_s(0.0, 1.0) == 0.0, "nothing was measured yet"


def test_requests_that_have_begun_or_ended_do_not_count() -> None:
    queue = QueueMeter()
    for _ in range(3):
        queue.add(100, now=1.0)
    queue.remove(100, now=1.1, has_begun=True)
    queue.remove(100, now=1.1, has_begun=False)
    assert (queue.num_queued, queue.wait_s(100.0, 1.2)) == (1, 1.0)


def test_a_full_batch_is_seen_by_how_seldom_requests_begin() -> None:
    queue = QueueMeter()
    now = 0.0
    for _ in range(40):
        queue.add(10, now)
    for i in range(20):
        now = i * 0.5
        queue.add(10, now)
        queue.remove(10, now, has_begun=True)
    assert queue.wait_s(1e6, now) == pytest.approx(20, rel=0.15), "40 of them, two a second"


def test_a_worker_that_begins_nothing_gets_worse_with_time() -> None:
    queue = QueueMeter()
    for _ in range(5):
        queue.add(10, 0.0)
    assert queue.wait_s(1e6, 0.9) < 1e-3
    assert queue.wait_s(1e6, 2.0) == pytest.approx(10.0)
    assert queue.wait_s(1e6, 60.0) == pytest.approx(5 * WINDOW_S)


def test_a_queue_that_was_empty_says_nothing_of_throughput() -> None:
    queue = QueueMeter()
    for second in range(10):
        queue.add(10, second)
        queue.remove(10, second + 0.01, has_begun=True)
    queue.add(10, 10.0)
    assert queue.wait_s(1e6, 10.5) < 1e-3
