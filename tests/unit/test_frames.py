"""Framing: any split of the bytes gives the same messages, any garbage a clean refusal."""

from __future__ import annotations

import contextlib
import itertools
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.protocol import (
    PROTOCOL_VERSION,
    Epoch,
    FinishReason,
    GenerateRequest,
    MasterId,
    SamplingParams,
    TokenDelta,
    TokenizerFiles,
    TokenLogprob,
    WorkerId,
)
from xllm.roles import frames

TO_WORKER: list[frames.ToWorker] = [
    frames.Hello(PROTOCOL_VERSION, MasterId("m"), WorkerId("w"), Epoch(2**63 - 1), 3),
    frames.Submit(
        GenerateRequest(
            request_id="r",
            model_id="tiny",
            prompt_ids=[1, 2, 3],
            sampling=SamplingParams(temperature=0.5, logit_bias={7: -1.0}),
            attempt=1,
            output_ids=[4],
        )
    ),
    frames.Cancel("r", 0, 0),
    frames.GetTokenizer(),
    frames.Ping(),
]
TO_MASTER: list[frames.ToMaster] = [
    frames.Welcome(PROTOCOL_VERSION, WorkerId("w"), Epoch(1)),
    frames.Goodbye("because"),
    frames.Step(
        [
            TokenDelta(
                request_id="r",
                attempt=0,
                index=1,
                offset=2,
                token_ids=[5, 6],
                finish_reason=FinishReason.STOP,
                logprobs=[TokenLogprob(5, -0.5, [(5, -0.5), (6, -1.5)])],
            )
        ]
    ),
    frames.Refused("r", 0, 1, "overloaded", "too much", None, 2),
    frames.TokenizerReply(TokenizerFiles({"tokenizer.json": b"\x00\xff{}"})),
    frames.Pong(12),
    frames.Draining(),
]


def encode(*messages: frames.ToWorker | frames.ToMaster) -> bytes:
    buffer = bytearray()
    for message in messages:
        frames.append_frame(buffer, message, frames.MAX_TO_MASTER_BYTES)
    return bytes(buffer)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(st.data())
def test_any_split_gives_the_same_messages(data: st.DataObject) -> None:
    messages = data.draw(st.lists(st.sampled_from(TO_WORKER), max_size=8))
    stream = encode(*messages)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    splitter = frames.FrameSplitter()
    received = [
        frames.decode_to_worker(frame)
        for piece in split(stream, cuts)
        for frame in splitter.feed(piece)
    ]
    assert received == messages


def test_one_byte_at_a_time() -> None:
    splitter = frames.FrameSplitter()
    received = [
        frames.decode_to_master(frame)
        for byte in encode(*TO_MASTER)
        for frame in splitter.feed(bytes([byte]))
    ]
    assert received == TO_MASTER


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_garbage_ends_in_messages_or_a_frame_error(pieces: list[bytes]) -> None:
    splitter = frames.FrameSplitter()
    with contextlib.suppress(frames.FrameError):
        for piece in pieces:
            for frame in splitter.feed(piece):
                frames.decode_to_worker(frame)


@given(st.binary(max_size=200))
def test_a_garbage_message_is_a_frame_error_or_a_message(frame: bytes) -> None:
    for decode, union in (
        (frames.decode_to_worker, frames.ToWorker),
        (frames.decode_to_master, frames.ToMaster),
    ):
        with contextlib.suppress(frames.FrameError):
            assert isinstance(decode(memoryview(frame)), union)


@given(st.sampled_from(TO_WORKER + TO_MASTER), st.data())
def test_a_truncated_message_is_a_frame_error(
    message: frames.ToWorker | frames.ToMaster, data: st.DataObject
) -> None:
    whole = msgspec.msgpack.encode(message)
    part = memoryview(whole)[: data.draw(st.integers(0, len(whole) - 1))]
    decode = frames.decode_to_worker if message in TO_WORKER else frames.decode_to_master
    with pytest.raises(frames.FrameError):
        decode(part)


def test_deep_nesting_is_a_frame_error() -> None:
    with pytest.raises(frames.FrameError):
        frames.decode_to_worker(memoryview(b"\x91" * 100_000))


def test_a_length_over_the_limit_is_refused_with_its_header() -> None:
    splitter = frames.FrameSplitter(max_bytes=100)
    header = struct.pack("<I", 101)
    assert list(splitter.feed(header[:3])) == []
    with pytest.raises(frames.FrameError, match="101"):
        list(splitter.feed(header[3:]))


def test_the_limit_may_be_raised_between_two_frames() -> None:
    splitter = frames.FrameSplitter(max_bytes=10)
    large = struct.pack("<I", 11) + b"x" * 11
    stream = splitter.feed(struct.pack("<I", 1) + b"y" + large)
    assert bytes(next(stream)) == b"y"
    splitter.max_bytes = 11
    assert bytes(next(stream)) == b"x" * 11


def test_a_message_over_the_limit_is_not_encoded() -> None:
    buffer = bytearray(encode(frames.Ping()))
    before = bytes(buffer)
    with pytest.raises(frames.FrameError, match="Goodbye"):
        frames.append_frame(buffer, frames.Goodbye("x" * 100), max_bytes=50)
    assert bytes(buffer) == before


def test_a_message_that_cannot_be_encoded_leaves_the_buffer() -> None:
    buffer = bytearray(b"kept")
    with pytest.raises(frames.FrameError, match="Goodbye"):
        frames.append_frame(buffer, frames.Goodbye("\ud800"), frames.MAX_TO_MASTER_BYTES)
    assert buffer == b"kept"


def test_a_later_version_may_append_fields() -> None:
    newer = msgspec.msgpack.encode([21, 7, "a field of tomorrow"])
    assert frames.decode_to_master(memoryview(newer)) == frames.Pong(7)
