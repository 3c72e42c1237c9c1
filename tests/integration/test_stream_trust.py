"""Who may speak on the token stream: secrets, certificates, and what an attacker may try."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from counting_engine import CountingEngine, make_info, make_request, submit, until

from tests.certificates import make_tls
from xllm.protocol import PROTOCOL_VERSION, Epoch, MasterId, TokenizerFiles, WorkerId
from xllm.roles import frames
from xllm.roles.stream import StreamLimits
from xllm.roles.stream_client import StreamState, WorkerStream
from xllm.roles.stream_server import StreamServer
from xllm.security.secret import NONCE_BYTES, ClusterSecret, HandshakeKey
from xllm.security.tls import Tls
from xllm.security.trust import ANYBODY, Trust

LIMITS = StreamLimits(
    min_backoff_s=0.01, max_backoff_s=0.05, ping_s=0.02, connect_s=2.0, max_connections=4
)


def trust(secret: str = "s" * 32, tls: Tls | None = None, purpose: str = "stream") -> Trust:
    return Trust(HandshakeKey(ClusterSecret(secret), purpose), tls)


@asynccontextmanager
async def serving(worker_trust: Trust) -> AsyncIterator[tuple[StreamServer, int]]:
    server = StreamServer(
        *(WorkerId("w"), Epoch(7), CountingEngine(), TokenizerFiles({}), LIMITS),
        trust=worker_trust,
    )
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    await server.start(listening)
    try:
        yield server, port
    finally:
        server.close()


@asynccontextmanager
async def connecting(port: int, master_trust: Trust) -> AsyncIterator[WorkerStream]:
    stream = WorkerStream(
        make_info(address=f"127.0.0.1:{port}"),
        MasterId("m"),
        limits=LIMITS,
        rng=random.Random(0),
        trust=master_trust,
    )
    task = asyncio.create_task(stream.run())
    try:
        yield stream
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def answers(server: StreamServer, stream: WorkerStream) -> list[int]:
    """The tokens of one request."""
    await until(lambda: stream.state is StreamState.UP)
    opened = submit(stream, make_request("r", 3))
    engine = server.engine
    assert isinstance(engine, CountingEngine)
    await until(lambda: len(engine.running) == 1)
    for _ in range(3):
        engine.step()
    return [token for delta in [d async for d in opened] for token in delta.token_ids]


async def test_who_knows_the_secret_is_served() -> None:
    async with serving(trust()) as (server, port), connecting(port, trust()) as stream:
        assert await answers(server, stream) == [0, 1, 2]


@pytest.mark.parametrize(
    ("worker", "master", "said_by_worker", "seen_by_master"),
    [
        (trust(), trust("t" * 32), "wrong proof", "wrong proof"),
        (trust(), ANYBODY, "no proof of the cluster's secret", "no proof"),
        (ANYBODY, trust(), "none is given here", "none is given here"),
        (trust(), trust(purpose="blocks"), "wrong proof", "wrong proof"),
    ],
    ids=["another secret", "a master without", "a worker without", "for something else"],
)
async def test_who_does_not_is_not(
    worker: Trust,
    master: Trust,
    said_by_worker: str,
    seen_by_master: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(worker) as (server, port), connecting(port, master) as stream:
        await until(lambda: "worker_unreachable" in caplog.text)
        assert stream.state is StreamState.CONNECTING
        assert all(connection.master_id is None for connection in server.connections)
    refusals = [r.message for r in caplog.records if "master_not_trusted" in r.message]
    assert said_by_worker in refusals[0]
    unreachable = [r.message for r in caplog.records if "worker_unreachable" in r.message]
    assert seen_by_master in unreachable[0]
    assert "--cluster_secret_file" in unreachable[0]


async def say(
    port: int, *messages: frames.ToWorker | bytes, tls: ssl.SSLContext | None = None
) -> tuple[list[bytes], bool]:
    """What a worker answers to a master that says this, each after an answer, and if it then
    closes."""
    received: list[bytes] = []
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    except (ssl.SSLError, ConnectionError):
        return received, True
    try:
        async with asyncio.timeout(5):
            for message in messages:
                body = message if isinstance(message, bytes) else frames.encode(message)
                writer.write(len(body).to_bytes(4, "little") + body)
                header = await reader.readexactly(4)
                received.append(await reader.readexactly(int.from_bytes(header, "little")))
            writer.write(b"\x01\x00\x00\x00\x00")
            return received, await reader.read() == b""
    except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
        return received, True
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


def hello(nonce: bytes = b"n" * NONCE_BYTES) -> frames.Hello:
    return frames.Hello(PROTOCOL_VERSION, MasterId("m"), WorkerId("w"), Epoch(7), 1, nonce)


@asynccontextmanager
async def recording(port: int) -> AsyncIterator[tuple[int, list[bytes], list[bytes]]]:
    """Somebody on the path who writes everything down."""
    up: list[bytes] = []
    down: list[bytes] = []

    async def copy(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, into: list[bytes]
    ) -> None:
        while data := await reader.read(1 << 16):
            into.append(data)
            writer.write(data)
        raise ConnectionResetError

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(copy(reader, to_writer, up))
                tasks.create_task(copy(to_reader, writer, down))
        except* ConnectionError:
            pass
        finally:
            writer.transport.abort()
            to_writer.transport.abort()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], up, down


async def test_a_recorded_handshake_opens_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(trust()) as (server, port):
        async with recording(port) as (path, up, _), connecting(path, trust()) as stream:
            assert await answers(server, stream) == [0, 1, 2]
            recorded = b"".join(up)
        bodies = []
        while len(recorded) >= 4 and len(bodies) < 2:
            size = int.from_bytes(recorded[:4], "little")
            bodies.append(recorded[4 : 4 + size])
            recorded = recorded[4 + size :]
        assert isinstance(frames.decode_to_worker(memoryview(bodies[1])), frames.Proof)
        received, closed = await say(port, *bodies)
        assert closed
        assert isinstance(frames.decode_to_master(memoryview(received[0])), frames.Challenge)
        goodbye = frames.decode_to_master(memoryview(received[1]))
        assert isinstance(goodbye, frames.Goodbye)
        assert "wrong proof" in goodbye.reason


async def test_a_worker_cannot_be_played_from_a_record(caplog: pytest.LogCaptureFixture) -> None:
    """The master's own nonce is new, so what a worker said to it before proves nothing."""
    async with (
        serving(trust()) as (server, port),
        recording(port) as (path, _, down),
        connecting(path, trust()) as stream,
    ):
        assert await answers(server, stream) == [0, 1, 2]
    record = b"".join(down)

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(record)
            await reader.read()
        finally:
            writer.transport.abort()

    impostor = await asyncio.start_server(play, "127.0.0.1", 0)
    async with impostor:
        port = impostor.sockets[0].getsockname()[1]
        async with connecting(port, trust()) as stream:
            await until(lambda: "worker_not_trusted" in caplog.text)
            assert stream.state is StreamState.CONNECTING


@pytest.mark.parametrize(
    "play",
    [
        lambda: (hello(b""),),
        lambda: (hello(b"short"), frames.Proof(b"x" * 32)),
        lambda: (hello(), frames.Proof(b"")),
        lambda: (hello(), frames.Proof(b"x" * 32)),
        lambda: (hello(), frames.Ping()),
        lambda: (hello(), hello()),
        lambda: (frames.Proof(b"x" * 32),),
        lambda: (frames.GetTokenizer(),),
        lambda: (b"x" * 4097,),
    ],
)
async def test_nothing_else_opens_it(
    play: Callable[[], tuple[frames.ToWorker | bytes, ...]],
) -> None:
    async with serving(trust()) as (server, port):
        received, closed = await say(port, *play())
        assert closed
        kinds = [type(frames.decode_to_master(memoryview(body))) for body in received]
        assert frames.Welcome not in kinds
        # A stranger gets nothing that the secret went into: it could be guessed from that.
        assert set(kinds) <= {frames.Challenge, frames.Goodbye}
        assert not server.num_requests


async def test_a_workers_own_proof_said_back_to_it_proves_nothing() -> None:
    key = HandshakeKey(ClusterSecret("s" * 32), "stream")
    said = (b"hello", b"challenge")
    assert key.check(key.prove("worker", *said), "worker", *said)
    assert not key.check(key.prove("worker", *said), "master", *said)
    assert not key.check(key.prove("master", b"hellochallenge", b""), "master", *said)


async def test_those_who_only_hold_connections_keep_no_master_out() -> None:
    async with serving(trust()) as (server, port):
        holders = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        await until(lambda: len(server.connections) == 4)
        async with connecting(port, trust()) as stream:
            assert await answers(server, stream) == [0, 1, 2]
            assert len(server.connections) == 4
        for _, writer in holders:
            writer.transport.abort()


async def test_over_tls(tmp_path: Path) -> None:
    tls = make_tls(tmp_path)
    both = trust(tls=tls)
    async with serving(both) as (server, port), connecting(port, both) as stream:
        assert await answers(server, stream) == [0, 1, 2]
        [connection] = server.connections
        assert connection._transport is not None
        assert connection._transport.get_extra_info("cipher")[1] == "TLSv1.3"


async def test_nothing_readable_is_on_the_wire(tmp_path: Path) -> None:
    tls = make_tls(tmp_path)
    async with serving(trust(tls=tls)) as (server, port), recording(port) as (path, up, down):
        async with connecting(path, trust(tls=tls)) as stream:
            assert await answers(server, stream) == [0, 1, 2]
        assert b"".join(up + down)
        assert b"\x93\x01\x02\x03" not in b"".join(up), "the prompt's ids"


@pytest.mark.parametrize("kind", ["plain", "foreign", "no certificate", "old TLS"])
async def test_without_a_right_certificate_no_frame_arrives(tmp_path: Path, kind: str) -> None:
    async with serving(Trust(tls=make_tls(tmp_path))) as (server, port):
        if kind == "plain":
            assert await say(port, hello()) == ([], True)
        elif kind == "foreign":
            async with connecting(port, Trust(tls=make_tls(tmp_path / "b", "theirs"))) as stream:
                await asyncio.sleep(0.2)
                assert stream.state is StreamState.CONNECTING
        else:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            if kind == "old TLS":
                context.maximum_version = ssl.TLSVersion.TLSv1_2
            assert await say(port, hello(b""), tls=context) == ([], True)
        assert not any(connection.master_id for connection in server.connections)


async def test_a_master_with_certificates_speaks_to_no_worker_without(tmp_path: Path) -> None:
    async with serving(ANYBODY) as (server, port):
        async with connecting(port, Trust(tls=make_tls(tmp_path))) as stream:
            await asyncio.sleep(0.2)
            assert stream.state is StreamState.CONNECTING
        assert not any(connection.master_id for connection in server.connections)
