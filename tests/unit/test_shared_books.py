"""Work on shared books is done once, by one thread at a time, whoever holds them."""

from __future__ import annotations

import threading

from xllm.cache.shared_books import SharedBooks


def test_work_is_done_at_once_where_nobody_holds_the_books() -> None:
    books = SharedBooks()
    done: list[str] = []
    books.submit(lambda: done.append("free"))
    assert done == ["free"]
    with books.hold(), books.pause():
        books.submit(lambda: done.append("paused"))
        assert done == ["free", "paused"]


def test_who_holds_them_does_the_work_before_letting_go() -> None:
    books = SharedBooks()
    done: list[int] = []
    with books.hold():
        books.submit(lambda: done.append(1))
        assert done == []
        with books.pause():
            assert done == [1]
        books.submit(lambda: done.append(2))
        assert done == [1]
    assert done == [1, 2]


def test_work_may_submit_work() -> None:
    books = SharedBooks()
    done: list[int] = []

    def work() -> None:
        books.submit(lambda: done.append(2))
        done.append(1)

    books.submit(work)
    assert done == [1, 2]


def test_nothing_is_lost_and_nothing_overlaps() -> None:
    """Two threads submit while a third holds and pauses."""
    books = SharedBooks()
    active = 0
    num_done = [0, 0]

    def work(submitter: int) -> None:
        nonlocal active
        active += 1
        assert active == 1
        num_done[submitter] += 1
        active -= 1

    def submit(submitter: int) -> None:
        for _ in range(300):
            books.submit(lambda: work(submitter))

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    with books.hold():
        while any(thread.is_alive() for thread in threads):
            active += 1
            assert active == 1
            active -= 1
            with books.pause():
                pass
    assert num_done == [300, 300]
