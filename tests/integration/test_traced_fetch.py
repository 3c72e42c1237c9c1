"""Fetches between workers say which trace they belong to, where both sides know what that is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
from test_peer_server import BLOCK_BYTES, LAYOUT, A, Server, name
from test_peer_trust import B, Listener, trust

from xllm.cache.peer_connection import PeerConnection
from xllm.cache.peer_fetch import BlockOutcome, BlockReceiver, Peer, PeerFetch
from xllm.cache.peer_server import ServeLimits
from xllm.cache.peer_wire import (
    PEER_PROTOCOL_VERSION,
    Hello,
    PeerLayout,
    decode_hello,
    encode_fetch,
    handshake_body,
)
from xllm.protocol import WorkerId
from xllm.security.secret import new_nonce
from xllm.security.trust import ANYBODY, Trust
from xllm.tracing import OFF, Attribute, Span, SpanKind, Tracer

TRACE = f"00-{'a' * 32}-{'b' * 16}-01"


class OldHello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """As it was before there were traces."""

    protocol_version: int
    caller: WorkerId
    callee: WorkerId
    layout: PeerLayout
    nonce: bytes = b""


class FakeSpan:
    traceparent = ""

    def __init__(self, parent: str) -> None:
        self.parent = parent
        self.attributes: dict[str, Attribute] = {}
        self.errors: list[str] = []

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        self.attributes |= attributes

    def record(self, *_: object) -> None: ...

    def end(self, at: float | None = None, error: str = "") -> None:
        self.errors.append(error)


class FakeTracer:
    is_on = True

    def __init__(self) -> None:
        self.spans: list[FakeSpan] = []

    def start(
        self,
        name: str,
        parent: str = "",
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        at: float | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span:
        assert (name, kind) == ("serve blocks", SpanKind.SERVER)
        span = FakeSpan(parent)
        self.spans.append(span)
        return span

    def close(self, timeout_s: float = 1.0) -> None: ...


@contextmanager
def serving(own: Trust, tracer: Tracer) -> Iterator[Server]:
    limits = ServeLimits(handshake_s=5.0, frame_s=5.0, stalled_s=5.0)
    server = Server(limits, own, tracer)
    try:
        yield server
    finally:
        server.server.close()


async def fetch(port: int, own: Trust, hello: Hello | OldHello) -> bool:
    """Fetches blocks, the last of which nobody has; whether the server wanted the trace."""
    receiver, listener = BlockReceiver(BLOCK_BYTES), Listener()
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: PeerConnection(hello, receiver, listener, own.key),  # type: ignore[arg-type]
        *("127.0.0.1", port),
    )
    try:
        async with asyncio.timeout(30):
            await connection.shaken
            hashes = [name(i) for i in (1, 2, 99)]
            wanted = PeerFetch(Peer(A, ""), hashes, [0, 1, 2], 0.0)
            wanted.targets = list(np.empty((3, BLOCK_BYTES), dtype=np.uint8))
            trace = TRACE if connection.takes_traces else ""
            connection.write(encode_fetch(receiver.expect(wanted), hashes, trace))
            await listener.completed_fetch
        assert wanted.outcomes == [BlockOutcome.SOUND] * 2 + [BlockOutcome.ABSENT]
        return connection.takes_traces
    finally:
        connection.abort()


def fields(own: Trust) -> tuple[int, WorkerId, WorkerId, PeerLayout, bytes]:
    return (PEER_PROTOCOL_VERSION, B, A, LAYOUT, b"" if own.key is None else new_nonce())


@pytest.mark.parametrize("own", [ANYBODY, trust()], ids=["open", "secret"])
async def test_a_trace_goes_with_the_fetch(own: Trust) -> None:
    tracer = FakeTracer()
    with serving(own, tracer) as server:
        assert await fetch(server.port, own, Hello(*fields(own), True))
    (span,) = tracer.spans
    assert span.parent == TRACE
    assert span.attributes == {"xllm.sent_blocks.device": 2}
    assert span.errors == [""]


@pytest.mark.parametrize("own", [ANYBODY, trust()], ids=["open", "secret"])
async def test_whoever_does_not_know_of_traces_gets_blocks_all_the_same(own: Trust) -> None:
    tracer = FakeTracer()
    with serving(own, tracer) as server:
        assert not await fetch(server.port, own, OldHello(*fields(own)))
        assert not await fetch(server.port, own, Hello(*fields(own)))
    with serving(own, OFF) as server:
        assert not await fetch(server.port, own, Hello(*fields(own), True))
    assert tracer.spans == []


def test_an_older_worker_reads_a_hello_with_traces() -> None:
    hello = Hello(*fields(ANYBODY), True)
    assert msgspec.msgpack.decode(handshake_body(hello), type=OldHello).callee == A
    assert not decode_hello(msgspec.msgpack.encode(OldHello(*fields(ANYBODY)))).has_traces
