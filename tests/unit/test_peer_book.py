"""Which peers are asked."""

from __future__ import annotations

from xllm.cache.peer_book import MAX_RECORDS, PeerBook
from xllm.cache.peer_fetch import Peer
from xllm.protocol import FetchRange, WorkerId

A, B = Peer(WorkerId("a"), "h:1"), Peer(WorkerId("b"), "h:2")
HINT = [FetchRange(*A, 2, 3), FetchRange(*B, 0, 10)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_first_range_that_covers_a_block_names_its_peer() -> None:
    book = PeerBook(Clock())
    assert [book.find(HINT, i) for i in range(11)] == [B, B, A, A, A, B, B, B, B, B, None]
    assert book.find([], 0) is None


def test_a_peer_that_fails_is_avoided_twice_as_long_each_time() -> None:
    clock = Clock()
    book = PeerBook(clock)
    waited = []
    for _ in range(8):
        book.failed(A)
        book.failed(A)  # others of the same connection
        assert book.find(HINT, 2) == B
        assert book.num_avoided == 1
        began = clock.now
        while book.find(HINT, 2) != A:
            clock.now += 0.5
        waited.append(clock.now - began)
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60]
    assert book.counters.num_failures == 8
    book.delivered(A, 1000, 1.0)
    book.failed(A)
    clock.now += 1.0
    assert book.find(HINT, 2) == A


def test_what_still_arrives_from_a_peer_that_failed_does_not_excuse_it() -> None:
    clock = Clock()
    book = PeerBook(clock)
    book.failed(A)
    book.delivered(A, 1000, 1.0)
    clock.now += 1.0
    book.failed(A)
    clock.now += 1.5
    assert book.find(HINT, 2) == B


def test_a_slow_peer_is_passed_over_until_its_rate_is_forgotten() -> None:
    clock = Clock()
    book = PeerBook(clock)
    book.delivered(A, 1000, 1.0)
    assert book.find(HINT, 2, bytes_per_s=900.0) == A
    assert book.find(HINT, 2, bytes_per_s=1100.0) == B
    assert book.find(HINT, 2) == A
    clock.now += 31.0
    assert book.find(HINT, 2, bytes_per_s=1100.0) == A


def test_only_so_many_peers_are_remembered() -> None:
    clock = Clock()
    book = PeerBook(clock)
    book.failed(A)
    for i in range(MAX_RECORDS):
        book.delivered(Peer(WorkerId(str(i)), "h:3"), 1, 1.0)
    assert book.find(HINT, 2) == A
    assert len(book._records) == MAX_RECORDS
