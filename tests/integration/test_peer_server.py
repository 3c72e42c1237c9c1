"""The serving side alone, and what strangers on its port can do to it: nothing."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from xllm.cache.block_pool import BlockPool
from xllm.cache.host_tier import HostMemoryBlocks
from xllm.cache.lender import Lender
from xllm.cache.peer_server import PeerServer, ServeLimits
from xllm.cache.peer_wire import (
    BLOCK_HEADER_BYTES,
    LENGTH_BYTES,
    PEER_PROTOCOL_VERSION,
    Challenge,
    Goodbye,
    Hello,
    PeerLayout,
    Welcome,
    decode_answer,
    encode_fetch,
    encode_handshake,
    encode_miss,
    handshake_bytes,
)
from xllm.cache.shared_books import SharedBooks
from xllm.cache.slab_format import checksum_of
from xllm.cache.tier import TierName
from xllm.protocol import BlockHash, WorkerId
from xllm.security.trust import ANYBODY, Trust
from xllm.tracing import OFF, Tracer

BLOCK_BYTES = 1 << 20
NUM_BLOCKS = 64
LAYOUT = PeerLayout(b"r" * 16, "fingerprint", "float32", 16, BLOCK_BYTES)
A = WorkerId("a")


def name(i: int) -> BlockHash:
    return BlockHash(i.to_bytes(16, "big"))


class Server:
    """Blocks 0 .. 31 are there."""

    def __init__(self, limits: ServeLimits, trust: Trust = ANYBODY, tracer: Tracer = OFF) -> None:
        self.memory = np.zeros((NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        self.pool = BlockPool(NUM_BLOCKS)
        block_ids = self.pool.allocate(32)
        assert block_ids is not None
        for i, block_id in enumerate(block_ids):
            self.memory[block_id] = i
            self.pool.commit(block_id, name(i))
        self.pool.release(block_ids)
        self.books = SharedBooks()
        self.lender = Lender(self.pool, HostMemoryBlocks(self.memory), None, None)
        self.server = PeerServer(
            A, LAYOUT, self.lender, self.books, limits, trust=trust, tracer=tracer
        )
        listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = listening.getsockname()[1]
        self.server.start(listening)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def welcome(self) -> socket.socket:
        connected = self.connect()
        connected.sendall(encode_handshake(Hello(PEER_PROTOCOL_VERSION, WorkerId("b"), A, LAYOUT)))
        assert answer(connected) == Welcome(PEER_PROTOCOL_VERSION, A)
        return connected

    def num_lent(self) -> int:
        with self.books.hold():
            return len(self.lender.lent_block_ids)

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(ServeLimits(handshake_s=0.3, frame_s=0.3, stalled_s=0.3, max_connections=3))
    yield server
    server.server.close()
    assert server.num_lent() == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("peer-")]


def receive(connected: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        part = connected.recv(min(num_bytes - len(received), 1 << 20))
        assert part, "closed"
        received += part
    return received


def answer(connected: socket.socket) -> Welcome | Goodbye | Challenge:
    length = handshake_bytes(receive(connected, LENGTH_BYTES))
    return decode_answer(receive(connected, length))


def is_closed(connected: socket.socket) -> bool:
    try:
        return connected.recv(1) == b""
    except ConnectionError:
        return True


def check_served(connected: socket.socket, ids: list[int]) -> None:
    connected.sendall(encode_fetch(5, [name(i) for i in ids]))
    for index, i in enumerate(ids):
        header = receive(connected, BLOCK_HEADER_BYTES)
        if i >= 32:
            assert header == encode_miss(5, index)
            continue
        fetch_id, found_index, status, num_bytes, checksum = struct.unpack("<IIII16s", header)
        assert (fetch_id, found_index, status, num_bytes) == (5, index, 0, BLOCK_BYTES)
        payload = np.frombuffer(receive(connected, BLOCK_BYTES), dtype=np.uint8)
        assert checksum_of(payload) == checksum
        assert (payload == i).all()


def test_blocks_are_served_and_given_back(server: Server) -> None:
    with server.welcome() as connected, server.welcome() as other:
        for ids in ([3], [1, 40, 2], list(range(33))):
            check_served(connected, ids)
            check_served(other, ids)
        server.until(lambda: server.num_lent() == 0)
    with server.books.hold():
        assert server.lender.snapshot().served[TierName.DEVICE] == 2 * (1 + 2 + 32)
        assert server.lender.snapshot().num_missed == 2 * 2
    server.until(lambda: server.server.num_connections == 0)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x05",
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff",
        b"\x03\x00\x00\x00abc",
        b"GET / HTTP/1.1\r\n\r\n",
        encode_handshake(Hello(PEER_PROTOCOL_VERSION, WorkerId("b"), A, LAYOUT))[:-1],
    ],
)
def test_whoever_does_not_shake_hands_is_closed(server: Server, said: bytes) -> None:
    with server.connect() as connected:
        connected.sendall(said)
        assert is_closed(connected)
    with server.welcome() as connected:
        check_served(connected, [1])


def test_another_layout_is_refused_with_a_reason(server: Server) -> None:
    other = PeerLayout(b"r" * 16, "one weight more", "float32", 16, BLOCK_BYTES)
    with server.connect() as connected:
        hello = Hello(PEER_PROTOCOL_VERSION, WorkerId("b"), A, other)
        connected.sendall(encode_handshake(hello) + encode_fetch(0, [name(1)]))
        refusal = answer(connected)
        assert isinstance(refusal, Goodbye)
        assert "fingerprint" in refusal.reason
        assert is_closed(connected)


@pytest.mark.parametrize("frame", [b"\x00", struct.pack("<II", 0, 2) + bytes(31)])
def test_half_a_fetch_is_not_waited_for(server: Server, frame: bytes) -> None:
    with server.welcome() as connected:
        connected.sendall(frame)
        assert is_closed(connected)


@pytest.mark.parametrize("count", [0, 65, 0xFFFFFFFF])
def test_a_fetch_of_too_much_ends_the_connection_at_once(server: Server, count: int) -> None:
    with server.welcome() as connected:
        connected.sendall(struct.pack("<II", 0, count))
        assert is_closed(connected)


def test_pins_die_with_the_connection(server: Server) -> None:
    with server.welcome() as connected:
        connected.sendall(encode_fetch(0, [name(i) for i in range(32)]))
        server.until(lambda: server.num_lent() > 0)
        connected.recv(1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.until(lambda: server.num_lent() == 0)
    server.until(lambda: server.server.num_connections == 0)


def test_whoever_does_not_read_is_closed_and_bounds_nobody(server: Server) -> None:
    with server.welcome() as slow:
        for fetch_id in range(8):
            slow.sendall(encode_fetch(fetch_id, [name(i) for i in range(32)]))
        server.until(lambda: server.num_lent() > 0)
        assert server.num_lent() <= server.lender.max_blocks
        with server.welcome() as other:
            check_served(other, list(range(32)))
        server.until(lambda: server.server.num_connections == 0)
    server.until(lambda: server.num_lent() == 0)


def test_only_so_many_connections(server: Server) -> None:
    kept = [server.welcome() for _ in range(3)]
    with server.connect() as connected:
        assert answer(connected) == Goodbye("too many peers")
        assert is_closed(connected)
    for connection in kept:
        check_served(connection, [2])
        connection.close()
    server.until(lambda: server.server.num_connections == 0)
    with server.welcome() as connected:
        check_served(connected, [2])


def test_closing_ends_what_is_being_sent() -> None:
    server = Server(ServeLimits())
    with server.welcome() as connected:
        connected.sendall(encode_fetch(0, [name(i) for i in range(32)]))
        server.until(lambda: server.num_lent() > 0)
        server.server.close()
        assert server.num_lent() == 0
    server.server.close()
