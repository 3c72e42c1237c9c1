"""Both ends of the token stream over real sockets, around an engine that only counts."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from counting_engine import CountingEngine, Submitted, make_info, make_request, submit, until

from xllm.errors import EngineFault, InvalidRequest, NoWorker, WorkerLost
from xllm.protocol import (
    PROTOCOL_VERSION,
    Epoch,
    FinishReason,
    MasterId,
    TokenDelta,
    TokenizerFiles,
    TokenLogprob,
    Watermark,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
)
from xllm.roles import frames
from xllm.roles.stream import StreamLimits
from xllm.roles.stream_client import StreamState, WorkerStream
from xllm.roles.stream_server import MasterConnection, StreamServer

LIMITS = StreamLimits(min_backoff_s=0.01, max_backoff_s=0.05, ping_s=0.02)
TOKENIZER = TokenizerFiles({"tokenizer.json": b"{}" * 400_000})


class Cluster:
    """One worker's server and the tasks of the masters that connect to it."""

    def __init__(self) -> None:
        self.engine = CountingEngine()
        self.server = StreamServer(WorkerId("w"), Epoch(7), self.engine, TOKENIZER, LIMITS)
        self.address = ""
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self, port: int = 0) -> None:
        listening = socket.create_server(("127.0.0.1", port))
        self.address = f"127.0.0.1:{listening.getsockname()[1]}"
        await self.server.start(listening)

    def info(self, **changes: object) -> WorkerInfo:
        return make_info(**{"address": self.address, **changes})

    async def connect(self, info: WorkerInfo | None = None, name: str = "a") -> WorkerStream:
        stream = self.stream(info, name)
        await until(lambda: stream.state is StreamState.UP)
        return stream

    def stream(
        self, info: WorkerInfo | None = None, name: str = "a", limits: StreamLimits = LIMITS
    ) -> WorkerStream:
        stream = WorkerStream(
            info or self.info(), MasterId(name), limits=limits, rng=random.Random(0)
        )
        self.tasks.append(asyncio.create_task(stream.run()))
        return stream

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.server.close()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    await cluster.start()
    yield cluster
    await cluster.stop()


async def tokens_of(opened: Submitted) -> list[int]:
    return [token for delta in [d async for d in opened] for token in delta.token_ids]


async def test_a_hundred_requests_share_one_connection(cluster: Cluster) -> None:
    stream = await cluster.connect()
    opened = [submit(stream, make_request(f"r{i}", 1 + i % 7)) for i in range(100)]
    await until(lambda: len(cluster.engine.running) == 100)
    step_frames = 0
    handle = stream.handle

    def count(message: frames.ToMaster) -> None:
        nonlocal step_frames
        step_frames += isinstance(message, frames.Step)
        handle(message)

    stream.handle = count  # type: ignore[method-assign]
    running = asyncio.create_task(cluster.engine.run())
    async with asyncio.timeout(5):
        received = await asyncio.gather(*(tokens_of(o) for o in opened))
    running.cancel()
    assert received == [list(range(1 + i % 7)) for i in range(100)]
    assert step_frames == 7, "one frame per engine step"
    assert len(cluster.server.connections) == 1
    assert cluster.server.num_requests == 0
    assert stream.num_requests == 0


async def test_samples_of_one_request(cluster: Cluster) -> None:
    stream = await cluster.connect()
    opened = submit(stream, make_request("r", 2, n=3, index=4))
    await until(lambda: bool(cluster.engine.running))
    cluster.engine.step()
    cluster.engine.step()
    deltas = [delta async for delta in opened]
    assert sorted((d.index, *d.token_ids) for d in deltas) == [
        (index, token) for index in (4, 5, 6) for token in (0, 1)
    ]


async def test_cancel_stops_the_request_on_the_worker(cluster: Cluster) -> None:
    stream = await cluster.connect()
    opened = submit(stream, make_request("r"))
    other = submit(stream, make_request("other", 1))
    await until(lambda: len(cluster.engine.running) == 2)
    opened.cancel()
    opened.cancel()
    await until(lambda: cluster.engine.cancelled == ["r"])
    cluster.engine.step()
    assert await tokens_of(opened) == []
    assert await tokens_of(other) == [0]
    opened.cancel()
    assert stream.num_requests == 0


async def test_a_refusal_is_raised_again_as_what_it_was(cluster: Cluster) -> None:
    stream = await cluster.connect()
    cluster.engine.refuse_with = InvalidRequest("too long", param="prompt")
    with pytest.raises(InvalidRequest, match="too long") as caught:
        await tokens_of(submit(stream, make_request("r")))
    assert caught.value.param == "prompt"
    assert stream.num_requests == cluster.server.num_requests == 0


async def test_an_error_in_the_middle_comes_after_the_tokens(cluster: Cluster) -> None:
    stream = await cluster.connect()
    opened = submit(stream, make_request("r"))
    await until(lambda: bool(cluster.engine.running))
    cluster.engine.step()
    cluster.engine.running[0].listener(EngineFault("broken"))
    assert (await anext(opened)).token_ids == [0]
    with pytest.raises(EngineFault, match="broken"):
        await anext(opened)


async def test_a_master_that_goes_takes_its_requests_along(cluster: Cluster) -> None:
    staying, going = await cluster.connect(name="s"), await cluster.connect(name="g")
    submit(staying, make_request("staying"))
    opened = submit(going, make_request("going"))
    await until(lambda: len(cluster.engine.running) == 2)
    cluster.tasks[1].cancel()
    await until(lambda: cluster.engine.cancelled == ["going"])
    assert cluster.engine.running_ids == ["staying"]
    with pytest.raises(WorkerLost):
        await anext(opened)


async def test_a_lost_connection_ends_every_request_and_is_made_again(cluster: Cluster) -> None:
    stream = await cluster.connect()
    opened = [submit(stream, make_request(f"r{i}")) for i in range(3)]
    await until(lambda: len(cluster.engine.running) == 3)
    cluster.engine.step()
    assert [(await anext(o)).token_ids for o in opened] == [[0]] * 3
    session = stream.session
    for connection in list(cluster.server.connections):
        connection.abort("test")
    for o in opened:
        with pytest.raises(WorkerLost):
            await anext(o)
    assert len(cluster.engine.cancelled) == 3
    await until(lambda: stream.state is StreamState.UP)
    assert stream.session != session
    again = submit(stream, make_request("r0", 1, attempt=1))
    await until(lambda: bool(cluster.engine.running))
    cluster.engine.step()
    assert await tokens_of(again) == [0]


async def test_without_a_connection_nothing_is_accepted(cluster: Cluster) -> None:
    stream = WorkerStream(cluster.info(), MasterId("a"), limits=LIMITS)
    with pytest.raises(WorkerLost):
        submit(stream, make_request("r"))
    with pytest.raises(WorkerLost):
        await stream.fetch_tokenizer()


@pytest.mark.parametrize("change", [{"epoch": Epoch(8)}, {"worker_id": WorkerId("other")}])
async def test_a_stranger_at_the_address_gets_nothing(
    cluster: Cluster, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted: list[object] = []
    on_open = MasterConnection.on_open

    def count(connection: MasterConnection) -> None:
        accepted.append(connection)
        on_open(connection)

    monkeypatch.setattr(MasterConnection, "on_open", count)
    stream = cluster.stream(cluster.info(**change))
    states: set[StreamState] = set()
    stream.on_change = lambda: states.add(stream.state)
    await until(lambda: len(accepted) == 3)
    assert not states
    stream.expect(cluster.info())
    await until(lambda: stream.state is StreamState.UP)


async def test_a_new_epoch_keeps_the_connection(cluster: Cluster) -> None:
    stream = await cluster.connect()
    opened = submit(stream, make_request("r", 1))
    await until(lambda: bool(cluster.engine.running))
    cluster.server.change_epoch(Epoch(8))
    stream.expect(cluster.info(epoch=Epoch(8)))
    cluster.engine.step()
    assert await tokens_of(opened) == [0]
    assert stream.state is StreamState.UP


async def test_draining(cluster: Cluster) -> None:
    stream = await cluster.connect()
    running = submit(stream, make_request("running", 1))
    await until(lambda: bool(cluster.engine.running))
    draining = asyncio.create_task(cluster.server.drain(timeout_s=5))
    await asyncio.sleep(0)
    late = submit(stream, make_request("late"))
    with pytest.raises(NoWorker, match="draining"):
        await anext(late)
    assert stream.draining
    cluster.engine.step()
    assert await tokens_of(running) == [0]
    async with asyncio.timeout(1):
        await draining
    other = await cluster.connect(name="b")
    await until(lambda: other.draining)


async def test_the_tokenizer_comes_once_for_all_who_wait(cluster: Cluster) -> None:
    stream = await cluster.connect()
    first, second = await asyncio.gather(stream.fetch_tokenizer(), stream.fetch_tokenizer())
    assert first == TOKENIZER
    assert first is second


async def test_load_reports_are_completed_with_what_they_do_not_know(cluster: Cluster) -> None:
    stream = await cluster.connect()
    submit(stream, make_request("short", 1))
    submit(stream, make_request("long", 9))
    await until(lambda: len(cluster.engine.running) == 2)
    report = WorkerLoad(epoch=Epoch(7), watermarks=cluster.server.watermarks())
    assert report.watermarks == {"a": Watermark(stream.session, 2, 0)}
    assert stream.unreported(report) == 0
    submit(stream, make_request("new"))
    assert stream.unreported(report) == 1
    assert stream.unreported(None) == 3
    cluster.engine.step()
    await until(lambda: stream.num_ended == 1)
    assert stream.unreported(report) == 0
    of_another = WorkerLoad(epoch=Epoch(7), watermarks={"a": Watermark(stream.session + 1, 9, 9)})
    assert stream.unreported(of_another) == 2


async def test_silence_makes_suspect_and_then_lost(cluster: Cluster) -> None:
    limits = replace(LIMITS, suspect_s=0.1, lost_s=0.4)
    stream = cluster.stream(limits=limits)
    await until(lambda: stream.state is StreamState.UP)
    opened = submit(stream, make_request("r"))
    for connection in cluster.server.connections:
        connection.send = lambda message: None  # type: ignore[method-assign]
    await until(lambda: stream.state is StreamState.SUSPECT)
    assert stream.num_requests == 1
    with pytest.raises(WorkerLost, match="silent"):
        await anext(opened)


async def raw_master(cluster: Cluster) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A handshaken connection without our client."""
    host, port = cluster.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    hello = frames.Hello(PROTOCOL_VERSION, MasterId("raw"), WorkerId("w"), Epoch(7), 1)
    writer.write(encode(hello))
    await until(lambda: any(c.master_id == "raw" for c in cluster.server.connections))
    return reader, writer


def encode(message: frames.ToWorker) -> bytes:
    buffer = bytearray()
    frames.append_frame(buffer, message, frames.MAX_TO_WORKER_BYTES)
    return bytes(buffer)


async def test_a_master_that_does_not_read_is_cut_off_and_others_are_not(
    cluster: Cluster,
) -> None:
    cluster.server.limits = replace(LIMITS, unsent_bytes=100_000, max_unsent_bytes=1_000_000)
    stream = await cluster.connect()
    _, writer = await raw_master(cluster)
    writer.write(encode(frames.Submit(make_request("slow", 10_000_000))))
    other = submit(stream, make_request("other", 10_000_000))
    await until(lambda: len(cluster.engine.running) == 2)
    bulk = [TokenLogprob(0, 0.0, [(1, 1.0)] * 5000)]
    received = 0
    async with asyncio.timeout(10):
        while not cluster.engine.cancelled:
            cluster.engine.step(logprobs=bulk)
            received += len((await anext(other)).token_ids)
    assert cluster.engine.cancelled == ["slow"]
    cluster.engine.step()
    assert (await anext(other)).token_ids == [received]
    writer.close()


async def test_an_answer_that_fits_no_frame_ends_only_its_request(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MAX_TO_MASTER_BYTES", 2000)
    stream = await cluster.connect()
    large, small = submit(stream, make_request("large")), submit(stream, make_request("small", 1))
    await until(lambda: len(cluster.engine.running) == 2)
    for running in list(cluster.engine.running):
        bulk = (
            [TokenLogprob(0, 0.0, [(1, 1.0)] * 500)]
            if running.request.request_id == "large"
            else None
        )
        running.listener(
            TokenDelta(
                request_id=running.request.request_id,
                attempt=0,
                index=0,
                offset=0,
                token_ids=[0],
                logprobs=bulk,
                finish_reason=FinishReason.LENGTH,
            )
        )
    with pytest.raises(EngineFault, match="too large"):
        await anext(large)
    assert await tokens_of(small) == [0]
    assert stream.state is StreamState.UP


@pytest.mark.parametrize(
    "payload",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\xc1",
        encode(frames.Ping()),
        encode(frames.Hello(PROTOCOL_VERSION + 1, MasterId("m"), WorkerId("w"), Epoch(7), 1)),
    ],
    ids=["http", "huge", "garbage", "no_handshake", "version"],
)
async def test_whoever_does_not_shake_hands_is_disconnected(
    cluster: Cluster, payload: bytes
) -> None:
    host, port = cluster.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(payload)
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
    assert not cluster.server.connections
    writer.close()
    await cluster.connect()


async def test_whoever_says_nothing_is_disconnected(cluster: Cluster) -> None:
    cluster.server.limits = replace(LIMITS, connect_s=0.05)
    host, port = cluster.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
    writer.close()


async def test_too_many_connections(cluster: Cluster) -> None:
    cluster.server.limits = replace(LIMITS, max_connections=1)
    stream = await cluster.connect()
    host, port = cluster.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()
    assert stream.state is StreamState.UP


async def test_another_version_is_refused_by_name(cluster: Cluster) -> None:
    """An older worker beside newer masters, or the other way round: said once, and no harm done."""
    host, port = cluster.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        encode(frames.Hello(PROTOCOL_VERSION + 1, MasterId("m"), WorkerId("w"), Epoch(7), 1))
    )
    async with asyncio.timeout(5):
        answer = await reader.read()
    goodbye = frames.decode_to_master(memoryview(answer)[4:])
    assert isinstance(goodbye, frames.Goodbye)
    assert f"version {PROTOCOL_VERSION + 1} of the master" in goodbye.reason
    assert f"{PROTOCOL_VERSION} of the worker" in goodbye.reason
    writer.close()
    stream = await cluster.connect()
    assert stream.state is StreamState.UP


async def test_a_worker_of_another_version_is_not_used(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def be_newer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        welcome = frames.Welcome(PROTOCOL_VERSION + 1, WorkerId("w"), Epoch(7))
        buffer = bytearray()
        frames.append_frame(buffer, welcome, frames.MAX_TO_MASTER_BYTES)
        writer.write(buffer)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(be_newer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        stream = cluster.stream(cluster.info(address=f"127.0.0.1:{port}"))
        expected = f"version {PROTOCOL_VERSION + 1} of the worker is not {PROTOCOL_VERSION} of this"
        await until(lambda: expected in caplog.text)
        assert stream.state is StreamState.CONNECTING
