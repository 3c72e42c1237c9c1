"""What peers say to each other: whatever arrives is a message or a WireError."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.cache.block_hash import split_hashes
from xllm.cache.peer_fetch import BlockOutcome, BlockReceiver, Peer, PeerFetch
from xllm.cache.peer_wire import (
    BLOCK_HEADER_BYTES,
    FETCH_HEADER_BYTES,
    LENGTH_BYTES,
    MAX_FETCH_BLOCKS,
    MAX_HANDSHAKE_BYTES,
    PEER_PROTOCOL_VERSION,
    ExpectedBlocks,
    Goodbye,
    Hello,
    PeerLayout,
    TracedWelcome,
    Welcome,
    WireError,
    check_hello,
    decode_answer,
    decode_fetch_header,
    decode_hello,
    encode_fetch,
    encode_handshake,
    encode_hit,
    encode_miss,
    handshake_bytes,
)
from xllm.cache.slab_format import checksum_of
from xllm.protocol import BlockHash, WorkerId
from xllm.tracing import PACKED_BYTES, unpack

LAYOUT = PeerLayout(b"r" * 16, "fingerprint", "float32", 16, 64)
A = WorkerId("a")
HELLO = Hello(PEER_PROTOCOL_VERSION, WorkerId("b"), A, LAYOUT)


def test_handshakes_come_through() -> None:
    for message, decode in (
        (HELLO, decode_hello),
        (Welcome(1, A), decode_answer),
        (TracedWelcome(1, A), decode_answer),
        (Goodbye("no"), decode_answer),
    ):
        frame = encode_handshake(message)  # type: ignore[arg-type]
        assert handshake_bytes(frame[:LENGTH_BYTES]) == len(frame) - LENGTH_BYTES
        assert decode(frame[LENGTH_BYTES:]) == message  # type: ignore[operator]


@pytest.mark.parametrize("num_bytes", [0, MAX_HANDSHAKE_BYTES + 1, 0xFFFFFFFF])
def test_the_length_of_a_handshake_is_bounded(num_bytes: int) -> None:
    with pytest.raises(WireError):
        handshake_bytes(num_bytes.to_bytes(4, "little"))


@given(st.binary(max_size=200))
def test_garbage_is_no_handshake(body: bytes) -> None:
    for decode in (decode_hello, decode_answer):
        try:
            decode(body)
        except WireError:
            continue


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (HELLO, ""),
        (Hello(99, WorkerId("b"), A, LAYOUT), "same version"),
        (Hello(PEER_PROTOCOL_VERSION, WorkerId("b"), WorkerId("c"), LAYOUT), "this is worker a"),
    ]
    + [
        (
            Hello(PEER_PROTOCOL_VERSION, WorkerId("b"), A, PeerLayout(*other)),
            reason,
        )
        for other, reason in (
            ((b"x" * 16, "fingerprint", "float32", 16, 64), "root is 72727272"),
            ((b"r" * 16, "other", "float32", 16, 64), "fingerprint is fingerprint here, not other"),
            ((b"r" * 16, "fingerprint", "bfloat16", 16, 64), "kv_dtype"),
            ((b"r" * 16, "fingerprint", "float32", 32, 64), "block_size is 16"),
            ((b"r" * 16, "fingerprint", "float32", 16, 65), "block_bytes"),
        )
    ],
)
def test_whoever_differs_in_anything_is_refused(hello: Hello, reason: str) -> None:
    refusal = check_hello(hello, A, LAYOUT)
    assert (reason in refusal) if reason else not refusal


def test_fetches_come_through_and_are_bounded() -> None:
    names = [BlockHash(bytes([i]) * 16) for i in range(3)]
    frame = encode_fetch(7, names)
    assert decode_fetch_header(frame[:FETCH_HEADER_BYTES]) == (7, 3, 0)
    assert split_hashes(frame[FETCH_HEADER_BYTES:]) == names
    trace = f"00-{'ab' * 16}-{'cd' * 8}-01"
    traced = encode_fetch(7, names, trace)
    header = decode_fetch_header(traced[:FETCH_HEADER_BYTES])
    assert header == (7, 3, PACKED_BYTES)
    rest = traced[FETCH_HEADER_BYTES:]
    assert unpack(rest[:PACKED_BYTES]) == trace
    assert split_hashes(rest[PACKED_BYTES:]) == names
    for count in (0, MAX_FETCH_BLOCKS + 1, 0xFFFFFFFF):
        with pytest.raises(WireError):
            decode_fetch_header((7).to_bytes(4, "little") + count.to_bytes(4, "little"))


@pytest.mark.parametrize(
    "header",
    [
        encode_hit(8, 0, 64, bytes(16)),
        encode_hit(7, 1, 64, bytes(16)),
        encode_hit(7, 0, 63, bytes(16)),
        encode_hit(7, 0, 0xFFFFFFFF, bytes(16)),
        encode_miss(7, 1),
        b"\x07" + bytes(7) + b"\x02" + bytes(BLOCK_HEADER_BYTES - 9),
    ],
)
def test_a_header_that_was_not_expected_ends_the_connection(header: bytes) -> None:
    expected = ExpectedBlocks(7, 2, 64)
    with pytest.raises(WireError):
        expected.check(header)
    assert expected.next_index == 0


@dataclass
class Answers:
    """What a peer says to some fetches, and what should come of it."""

    stream: bytes = b""
    fetches: list[PeerFetch] = field(default_factory=list)
    outcomes: list[list[BlockOutcome]] = field(default_factory=list)
    blocks: list[list[bytes]] = field(default_factory=list)


@st.composite
def answers(draw: st.DrawFn) -> Answers:
    found = Answers()
    for fetch_id in range(draw(st.integers(1, 4))):
        outcomes = draw(st.lists(st.sampled_from(BlockOutcome), min_size=1, max_size=5))
        blocks = [draw(st.binary(min_size=64, max_size=64)) for _ in outcomes]
        count = len(outcomes)
        fetch = PeerFetch(Peer(A, "x:1"), [BlockHash(bytes(16))] * count, range(count), 0.0)
        fetch.targets = list(np.zeros((count, 64), dtype=np.uint8))
        for index, (outcome, block) in enumerate(zip(outcomes, blocks, strict=True)):
            checksum = checksum_of(np.frombuffer(block, dtype=np.uint8))
            if outcome is BlockOutcome.ABSENT:
                found.stream += encode_miss(fetch_id, index)
                continue
            if outcome is BlockOutcome.CORRUPT:
                checksum = bytes([checksum[0] ^ 1]) + checksum[1:]
            found.stream += encode_hit(fetch_id, index, 64, checksum) + block
        found.fetches.append(fetch)
        found.outcomes.append(outcomes)
        found.blocks.append(blocks)
    return found


@given(answers(), st.lists(st.integers(1, 100), min_size=1), st.integers(0, 2000))
def test_blocks_land_where_they_belong_however_they_are_cut(
    said: Answers, pieces: list[int], end: int
) -> None:
    receiver = BlockReceiver(64)
    for i, fetch in enumerate(said.fetches):
        assert receiver.expect(fetch) == i
    completed: list[PeerFetch] = []
    stream = memoryview(said.stream)
    is_cut = end < len(stream)
    stream = stream[:end]
    turn = 0
    while stream:
        buffer = receiver.buffer()
        num_bytes = min(len(buffer), pieces[turn % len(pieces)], len(stream))
        assert num_bytes > 0
        buffer[:num_bytes] = stream[:num_bytes]
        stream = stream[num_bytes:]
        turn += 1
        fetch = receiver.received(num_bytes)
        if fetch is not None:
            completed.append(fetch)
    assert completed == said.fetches[: len(completed)]
    assert receiver.fetches == said.fetches[len(completed) :]
    assert is_cut or not receiver.fetches
    for fetch, outcomes, blocks in zip(said.fetches, said.outcomes, said.blocks, strict=True):
        for outcome, found, block, target in zip(
            outcomes, fetch.outcomes, blocks, fetch.targets, strict=True
        ):
            assert found in (outcome, BlockOutcome.ABSENT)
            assert found is outcome or fetch not in completed
            if found is not BlockOutcome.ABSENT:
                assert bytes(target) == block


def test_what_was_not_asked_for_ends_the_connection() -> None:
    receiver = BlockReceiver(64)
    header = encode_miss(0, 0)
    receiver.buffer()[:] = header
    with pytest.raises(WireError, match="not asked for"):
        receiver.received(len(header))
