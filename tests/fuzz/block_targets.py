"""Both ends of the connection on which workers fetch blocks of each other."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from tests.fuzz.mutate import mutate_bytes, mutate_value, random_bytes
from tests.fuzz.runner import Target
from tests.fuzz.stream_targets import SECRET, DeadTransport
from xllm.cache import peer_wire as wire
from xllm.cache.lender import LentBlock, Loan
from xllm.cache.peer_connection import PeerConnection
from xllm.cache.peer_fetch import BlockOutcome, BlockReceiver, Peer, PeerFetch
from xllm.cache.peer_server import PeerServer
from xllm.cache.peer_socket import PeerSocket
from xllm.cache.slab_format import checksum_of
from xllm.cache.tier import TierName
from xllm.protocol import BlockHash, WorkerId
from xllm.security.trust import ANYBODY

_BLOCK_BYTES = 64
_A, _B = WorkerId("a"), WorkerId("b")
_LAYOUT = wire.PeerLayout(b"r" * 16, "f", "float32", 16, _BLOCK_BYTES)
_PAYLOAD = np.arange(_BLOCK_BYTES, dtype=np.uint8)
_NAMES = [BlockHash(bytes([i]) * 16) for i in range(6)]


def _some_hello(rng: random.Random) -> bytes:
    nonce = b"n" * 32 if rng.random() < 0.4 else b""
    has_traces = rng.random() < 0.5
    hello = wire.Hello(wire.PEER_PROTOCOL_VERSION, _B, _A, _LAYOUT, nonce, has_traces)
    return _handshake(rng, hello)


def _some_answer(rng: random.Random) -> bytes:
    answer: msgspec.Struct = wire.Welcome(wire.PEER_PROTOCOL_VERSION, _A)
    if rng.random() < 0.2:
        answer = wire.TracedWelcome(wire.PEER_PROTOCOL_VERSION, _A)
    if rng.random() < 0.1:
        answer = wire.Goodbye("because")
    elif rng.random() < 0.1:
        answer = wire.Challenge(rng.randbytes(32))
    return _handshake(rng, answer)


def _handshake(rng: random.Random, message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    if rng.random() < 0.3:
        with contextlib.suppress(ValueError, RecursionError):  # msgpack cannot say it
            body = msgspec.msgpack.encode(mutate_value(rng, msgspec.msgpack.decode(body)))
    return len(body).to_bytes(4, "little") + body


def _stream(rng: random.Random, parts: Sequence[bytes]) -> bytes:
    if rng.random() < 0.05:
        return random_bytes(rng)
    data = b"".join(parts)
    return mutate_bytes(rng, data) if rng.random() < 0.5 else data


class _Lender:
    """Has every block, on the device or damaged."""

    max_blocks = 2

    def __init__(self) -> None:
        self.num_lent = 0
        self.num_loans = 0

    def lend(self, hashes: Sequence[BlockHash]) -> Loan:
        assert 0 < len(hashes) <= self.max_blocks
        assert all(len(name) == 16 for name in hashes)
        self.num_lent += 1
        self.num_loans += 1
        return Loan([self._block(name) for name in hashes], None)

    def _block(self, name: BlockHash) -> LentBlock | None:
        if name[0] & 1:
            return None
        return LentBlock(name, TierName.DEVICE, 0, _PAYLOAD, None)

    def end(self, loan: Loan) -> None:
        self.num_lent -= 1


class _Books:
    """Nobody else uses them."""

    def submit(self, work: Callable[[], None]) -> None:
        work()


Talk = tuple[bool, bytes]
"""Whether the serving end wants a secret, and what comes."""


class ServingEndTarget(Target):
    """What whoever connects to a worker's block port may send."""

    name = "block_server"

    def __init__(self) -> None:
        self._lender = _Lender()
        lender: Any = self._lender
        books: Any = _Books()
        self._servers = [
            PeerServer(_A, _LAYOUT, lender, books, trust=trust) for trust in (ANYBODY, SECRET)
        ]

    def make(self, rng: random.Random) -> Talk:
        parts = [_some_hello(rng)] if rng.random() < 0.95 else []
        if rng.random() < 0.3:
            parts.append(_handshake(rng, wire.Proof(rng.randbytes(32))))
        for _ in range(rng.randrange(3)):
            names = rng.choices(_NAMES, k=rng.randint(1, 5))
            trace = f"00-{rng.randbytes(16).hex()}-{rng.randbytes(8).hex()}-01"
            parts.append(wire.encode_fetch(rng.randrange(9), names, rng.choice(("", trace))))
        return rng.random() < 0.3, _stream(rng, parts)

    def feed(self, data: Talk) -> None:
        wants_secret, said = data
        server = self._servers[wants_secret]
        was_lent = self._lender.num_loans
        server._loop.run_until_complete(self._serve(server, said))
        assert self._lender.num_lent == 0
        assert not (wants_secret and self._lender.num_loans != was_lent), "nobody knows the secret"

    async def _serve(self, server: PeerServer, data: bytes) -> None:
        """`PeerServer._serve`, but for what it does with exceptions that it does not know."""
        theirs, ours = socket.socketpair()
        with theirs, ours:
            ours.setblocking(False)
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            connected = PeerSocket(server._loop, ours, stalled_s=1.0)
            with contextlib.suppress(OSError, wire.WireError, TimeoutError):
                if await server._shake_hands(connected):
                    while await server._serve_fetch(connected):
                        pass

    def allowed_bytes(self, data: Talk) -> int:
        return (256 << 10) + 200 * len(data[1])

    def close(self) -> None:
        for server in self._servers:
            server.close()


class _Link:
    """As a `_Link` of the client, without connecting again."""

    def __init__(self) -> None:
        self.num_completed = 0
        self.failures: list[str] = []

    def progressed(self) -> None:
        pass

    def completed(self, fetch: PeerFetch) -> None:
        self.num_completed += 1

    def fail(self, reason: str) -> None:
        self.failures.append(reason)


class FetchingEndTarget(Target):
    """What a peer may answer. Nothing is written outside of the blocks that wait for it."""

    name = "block_client"

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def make(self, rng: random.Random) -> bytes:
        parts = [_some_answer(rng)]
        for fetch_id in range(2):
            for index in range(3):
                if rng.random() < 0.2:
                    parts.append(wire.encode_miss(fetch_id, index))
                    continue
                checksum = checksum_of(_PAYLOAD) if rng.random() < 0.8 else bytes(16)
                header = wire.encode_hit(fetch_id, index, _BLOCK_BYTES, checksum)
                parts.append(header + _PAYLOAD.tobytes())
        if rng.random() < 0.3:
            del parts[rng.randrange(len(parts))]
        return _stream(rng, parts)

    def feed(self, data: bytes) -> None:
        async def run() -> None:
            self._feed(data)

        self._loop.run_until_complete(run())

    def _feed(self, data: bytes) -> None:
        memory = np.full(8 * _BLOCK_BYTES, 0xAA, dtype=np.uint8)
        receiver, link = BlockReceiver(_BLOCK_BYTES), _Link()
        fetches = []
        for first in (1, 4):
            fetch = PeerFetch(Peer(_A, "127.0.0.1:1"), _NAMES[:3], [0, 1, 2], 1e9)
            slots = range(first, first + 3)
            fetch.targets = [memory[i * _BLOCK_BYTES : (i + 1) * _BLOCK_BYTES] for i in slots]
            fetches.append(fetch)
        hello = wire.Hello(wire.PEER_PROTOCOL_VERSION, _B, _A, _LAYOUT)
        connection = PeerConnection(hello, receiver, link)
        connection.connection_made(DeadTransport())
        rest, is_asked = data, False
        while rest:
            if connection.shaken.done() and not is_asked and not connection.shaken.exception():
                is_asked = True
                for fetch in fetches:
                    receiver.expect(fetch)
            buffer = connection.get_buffer(-1)
            part = rest[: len(buffer)]
            buffer[: len(part)] = part
            rest = rest[len(part) :]
            connection.buffer_updated(len(part))
        connection.connection_lost(None)
        if connection.shaken.exception() is None:
            assert len(link.failures) == 1
        sound = [o for fetch in fetches for o in fetch.outcomes if o is BlockOutcome.SOUND]
        assert len(sound) <= 6
        assert link.num_completed <= 2
        assert (memory[:_BLOCK_BYTES] == 0xAA).all()
        assert (memory[7 * _BLOCK_BYTES :] == 0xAA).all()
        for fetch in fetches:
            for outcome, target in zip(fetch.outcomes, fetch.targets, strict=True):
                assert outcome is not BlockOutcome.SOUND or (target == _PAYLOAD).all()

    def allowed_bytes(self, data: bytes) -> int:
        return (256 << 10) + 200 * len(data)

    def close(self) -> None:
        self._loop.close()
