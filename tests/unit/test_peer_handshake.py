"""A refusal between workers fits a frame, whatever is refused."""

from __future__ import annotations

import pytest

from xllm.cache.peer_wire import (
    MAX_HANDSHAKE_BYTES,
    PEER_PROTOCOL_VERSION,
    Goodbye,
    Hello,
    PeerLayout,
    check_hello,
    encode_handshake,
)
from xllm.protocol import WorkerId

LAYOUT = PeerLayout(b"r" * 16, "f", "float32", 16, 64)
LONG = "x" * (MAX_HANDSHAKE_BYTES - 60)


@pytest.mark.parametrize(
    "hello",
    [
        Hello(PEER_PROTOCOL_VERSION, WorkerId("b"), WorkerId(LONG), LAYOUT),
        Hello(
            *(PEER_PROTOCOL_VERSION, WorkerId("b"), WorkerId("a")),
            PeerLayout(b"r" * 16, LONG, "float32", 16, 64),
        ),
    ],
)
def test_a_refusal_of_something_long_is_short(hello: Hello) -> None:
    reason = check_hello(hello, WorkerId("a"), LAYOUT)
    assert reason
    assert len(encode_handshake(Goodbye(reason))) < MAX_HANDSHAKE_BYTES


def test_another_protocol_version_is_refused_by_name() -> None:
    hello = Hello(PEER_PROTOCOL_VERSION + 1, WorkerId("b"), WorkerId("a"), LAYOUT)
    reason = check_hello(hello, WorkerId("a"), LAYOUT)
    assert f"{PEER_PROTOCOL_VERSION + 1} is not {PEER_PROTOCOL_VERSION}" in reason
