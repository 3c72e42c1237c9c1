"""The token stream: frames by themselves, and both ends of a connection that speak them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

import msgspec

from tests.fuzz.mutate import mutate_bytes, mutate_value, random_bytes
from tests.fuzz.runner import Target
from xllm.engine.limits import check_request
from xllm.protocol import (
    PROTOCOL_VERSION,
    Epoch,
    FetchRange,
    FinishReason,
    GenerateRequest,
    MasterId,
    ModelCard,
    SamplingParams,
    TokenDelta,
    TokenizerFiles,
    TokenLogprob,
    WorkerId,
    WorkerInfo,
)
from xllm.roles import frames
from xllm.roles.stream_client import WorkerStream
from xllm.roles.stream_connection import WorkerConnection
from xllm.roles.stream_server import MasterConnection, StreamServer
from xllm.security.secret import ClusterSecret
from xllm.security.trust import ANYBODY, Trust

VOCAB_SIZE = 1000
MAX_MODEL_LEN = 512
_WORKER, _MASTER, _EPOCH = WorkerId("w"), MasterId("m"), Epoch(7)
_FRAME_OVERHEAD_BYTES = 256 << 10
_BYTES_PER_BYTE = 200
"""A list of small msgpack arrays becomes Python objects of so much."""

Talk = tuple[bool, list[bytes]]
"""Whether the end that listens has a secret, and what comes in which pieces."""

SECRET = Trust.of(ClusterSecret("s" * 32), None, "fuzz")

_encoder = msgspec.msgpack.Encoder()


def some_request(rng: random.Random) -> GenerateRequest:
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]
    return GenerateRequest(
        request_id=rng.choice(("r0", "r1", "r2")),
        model_id="m",
        prompt_ids=prompt,
        sampling=SamplingParams(
            temperature=rng.random(),
            max_tokens=rng.randint(1, 20),
            logit_bias={7: 1.0},
            stop_token_ids=[3],
            logprobs=rng.choice((None, 0, 3)),
        ),
        attempt=rng.randrange(2),
        n=rng.randint(1, 3),
        index=rng.randrange(2),
        output_ids=[1, 2] if rng.random() < 0.3 else [],
        fetch=[FetchRange(WorkerId("p"), "127.0.0.1:1", 0, 3)] if rng.random() < 0.3 else [],
    )


def _some_delta(rng: random.Random) -> TokenDelta:
    ids = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 3))]
    return TokenDelta(
        request_id=rng.choice(("r0", "r1", "r2")),
        attempt=rng.randrange(2),
        index=rng.randrange(3),
        offset=rng.randrange(3),
        token_ids=ids,
        finish_reason=rng.choice((None, None, FinishReason.STOP, FinishReason.ABORT)),
        logprobs=[TokenLogprob(i, -0.5, [(i, -0.5)]) for i in ids] if rng.random() < 0.5 else None,
        cached_tokens_by_tier={"host": 3},
    )


def _hello(rng: random.Random) -> frames.ToWorker:
    nonce = b"n" * 32 if rng.random() < 0.4 else b""
    return frames.Hello(PROTOCOL_VERSION, _MASTER, _WORKER, _EPOCH, rng.randrange(99), nonce)


def _welcome(rng: random.Random) -> frames.ToMaster:
    proof = rng.randbytes(32) if rng.random() < 0.3 else b""
    return frames.Welcome(PROTOCOL_VERSION, _WORKER, _EPOCH, proof)


_TO_WORKER: tuple[Callable[[random.Random], frames.ToWorker], ...] = (
    _hello,
    *(lambda rng: frames.Submit(some_request(rng)),) * 3,
    lambda rng: frames.Cancel(rng.choice(("r0", "r1")), rng.randrange(2), rng.randrange(2)),
    lambda rng: frames.GetTokenizer(),
    lambda rng: frames.Ping(),
    lambda rng: frames.Proof(rng.randbytes(32)),
)
_TO_MASTER: tuple[Callable[[random.Random], frames.ToMaster], ...] = (
    _welcome,
    lambda rng: frames.Goodbye("because"),
    *(lambda rng: frames.Step([_some_delta(rng) for _ in range(rng.randint(0, 3))]),) * 3,
    lambda rng: frames.Refused("r0", 0, 0, rng.choice(("overloaded", "?")), "too much", None, 2),
    lambda rng: frames.TokenizerReply(TokenizerFiles({"tokenizer.json": b"{}"})),
    lambda rng: frames.Pong(12),
    lambda rng: frames.Draining(),
    lambda rng: frames.Challenge(rng.randbytes(32)),
)


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def _stream(
    rng: random.Random,
    first: Callable[[random.Random], Any],
    kinds: tuple[Callable[[random.Random], Any], ...],
) -> list[bytes]:
    """What one side might say, wrong in a few places, in the pieces in which it arrives."""
    if rng.random() < 0.05:
        data = random_bytes(rng)
    else:
        messages = [rng.choice(kinds)(rng) for _ in range(rng.randint(0, 3))]
        if rng.random() < 0.9:
            messages.insert(0, first(rng))
        bodies = [_encoder.encode(message) for message in messages]
        if bodies and rng.random() < 0.6:
            i = rng.randrange(len(bodies))
            with contextlib.suppress(ValueError, RecursionError):  # msgpack cannot say it
                bodies[i] = _encoder.encode(mutate_value(rng, msgspec.msgpack.decode(bodies[i])))
        data = b"".join(map(_frame, bodies))
        if rng.random() < 0.5:
            data = mutate_bytes(rng, data)
    cut = rng.randrange(len(data) + 1)
    return [data[:cut], data[cut:]] if rng.random() < 0.3 else [data]


def _allowed_bytes(pieces: list[bytes]) -> int:
    return _FRAME_OVERHEAD_BYTES + _BYTES_PER_BYTE * sum(map(len, pieces))


class FrameTarget(Target):
    """Splitter and decoders."""

    name = "frames"

    def make(self, rng: random.Random) -> list[bytes]:
        if rng.random() < 0.5:
            return _stream(rng, _hello, _TO_WORKER)
        return _stream(rng, _welcome, _TO_MASTER)

    def feed(self, data: list[bytes]) -> None:
        splitter = frames.FrameSplitter()
        with contextlib.suppress(frames.FrameError):
            for piece in data:
                for frame in splitter.feed(piece):
                    self._decode(frame)

    def _decode(self, frame: memoryview) -> None:
        with contextlib.suppress(frames.FrameError):
            assert isinstance(frames.decode_to_worker(frame), frames.ToWorker)
        with contextlib.suppress(frames.FrameError):
            assert isinstance(frames.decode_to_master(frame), frames.ToMaster)

    def allowed_bytes(self, data: list[bytes]) -> int:
        return _allowed_bytes(data)


class DeadTransport(asyncio.Transport):
    """Takes everything and sends nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_written = 0

    def write(self, data: object) -> None:
        self.num_written += len(data)  # type: ignore[arg-type]

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Running:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine

    def cancel(self) -> None:
        self._engine.running.discard(self)


class _Engine:
    """Checks a request as the real one does, and makes what it would make of it at once."""

    step_counter = 3

    def __init__(self) -> None:
        self.running: set[_Running] = set()
        self.num_submitted = 0

    def submit(self, request: GenerateRequest, listener: object) -> _Running:
        check_request(request, MAX_MODEL_LEN, VOCAB_SIZE)
        # What the engine's thread and the sampler take for granted.
        assert request.n >= 1
        assert all(0 <= token < VOCAB_SIZE for token in (*request.prompt_ids, *request.output_ids))
        sampling = request.sampling
        assert all(0 <= token < VOCAB_SIZE for token in sampling.logit_bias)
        assert 0 <= sampling.seed < 2**64
        assert -(2**31) <= sampling.top_k < 2**31
        assert 0 <= sampling.temperature < float("inf")
        assert (sampling.logprobs or 0) <= VOCAB_SIZE
        self.num_submitted += 1
        running = _Running(self)
        self.running.add(running)
        return running


class _Loop:
    """A loop for one connection at a time; its timers never fire."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def run(self, session: Callable[[], None]) -> None:
        async def run() -> None:
            session()

        self._loop.run_until_complete(run())

    def close(self) -> None:
        self._loop.close()


class WorkerEndTarget(Target):
    """A worker's connection: what a master, or whoever connects, may say to it.

    Where a secret is wanted, nothing of it is served: nobody here knows that.
    """

    name = "worker_stream"

    def __init__(self) -> None:
        self._loop = _Loop()

    def make(self, rng: random.Random) -> Talk:
        return rng.random() < 0.3, _stream(rng, _hello, _TO_WORKER)

    def feed(self, data: Talk) -> None:
        self._loop.run(lambda: self._feed(*data))

    def close(self) -> None:
        self._loop.close()

    def _feed(self, wants_secret: bool, data: list[bytes]) -> None:
        engine = _Engine()
        trust = SECRET if wants_secret else ANYBODY
        files = TokenizerFiles({"t": b"{}"})
        server = StreamServer(_WORKER, _EPOCH, engine, files, trust=trust)
        connection = MasterConnection(server)
        connection.connection_made(DeadTransport())
        for piece in data:
            connection.data_received(piece)
        server.watermarks()
        connection.connection_lost(None)
        assert not (wants_secret and engine.num_submitted)
        assert not server.connections
        assert not engine.running
        assert server.num_requests == 0

    def allowed_bytes(self, data: Talk) -> int:
        return _allowed_bytes(data[1])


class MasterEndTarget(Target):
    """A master's connection with requests on it: what a worker may say to it."""

    name = "master_stream"

    def __init__(self) -> None:
        self._loop = _Loop()
        self._info = WorkerInfo(
            worker_id=_WORKER,
            epoch=_EPOCH,
            address="127.0.0.1:1",
            operator_address="127.0.0.1:2",
            model=ModelCard(model_id="m", max_model_len=512, vocab_size=VOCAB_SIZE, created=0),
            fingerprint="f",
            block_size=32,
            kv_dtype="float32",
            device_blocks=1,
            block_bytes=1,
        )

    def make(self, rng: random.Random) -> Talk:
        return rng.random() < 0.3, _stream(rng, _welcome, _TO_MASTER)

    def feed(self, data: Talk) -> None:
        self._loop.run(lambda: self._feed(*data))

    def close(self) -> None:
        self._loop.close()

    def _feed(self, has_secret: bool, data: list[bytes]) -> None:
        trust = SECRET if has_secret else ANYBODY
        stream = WorkerStream(self._info, _MASTER, rng=random.Random(0), trust=trust)
        connection = WorkerConnection(stream)
        connection.connection_made(DeadTransport())
        num_ends = dict.fromkeys(("r0", "r1"), 0)
        shaken = False
        for piece in data:
            connection.data_received(piece)
            if connection.shaken.done() and not shaken and not connection.closed:
                shaken = True
                self._submit(stream, num_ends)
        connection.connection_lost(None)
        assert stream.num_requests == 0
        assert not (has_secret and shaken)
        if shaken:
            assert all(count >= 1 for count in num_ends.values()), num_ends

    def _submit(self, stream: WorkerStream, num_ends: dict[str, int]) -> None:
        for name in num_ends:
            request = GenerateRequest(
                request_id=name, model_id="m", prompt_ids=[1], sampling=SamplingParams()
            )

            def listen(news: object, name: str = name) -> None:
                ended = not isinstance(news, TokenDelta) or news.finish_reason is not None
                num_ends[name] += ended

            stream.submit(request, listen)

    def allowed_bytes(self, data: Talk) -> int:
        return _allowed_bytes(data[1])
