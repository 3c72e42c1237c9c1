"""Who may fetch blocks: secrets, certificates, and what an attacker may try."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_peer_server import (
    BLOCK_BYTES,
    LAYOUT,
    A,
    Server,
    answer,
    is_closed,
    name,
)

from tests.certificates import certificate, make_tls
from xllm.cache.peer_connection import PeerConnection
from xllm.cache.peer_fetch import BlockOutcome, BlockReceiver, Peer, PeerFetch
from xllm.cache.peer_server import ServeLimits
from xllm.cache.peer_wire import (
    PEER_PROTOCOL_VERSION,
    Challenge,
    Goodbye,
    Hello,
    Proof,
    Welcome,
    WireError,
    encode_fetch,
    encode_handshake,
    handshake_body,
)
from xllm.protocol import WorkerId
from xllm.security.secret import NONCE_BYTES, ClusterSecret, HandshakeKey, new_nonce
from xllm.security.tls import Tls
from xllm.security.trust import ANYBODY, Trust

B = WorkerId("b")


def trust(secret: str = "s" * 32, tls: Tls | None = None, purpose: str = "blocks") -> Trust:
    return Trust(HandshakeKey(ClusterSecret(secret), purpose), tls)


@contextmanager
def serving(server_trust: Trust) -> Iterator[Server]:
    server = Server(ServeLimits(handshake_s=1.0, frame_s=1.0, stalled_s=1.0), server_trust)
    try:
        yield server
    finally:
        server.server.close()


class Listener:
    """Of one connection."""

    def __init__(self) -> None:
        self.completed_fetch: asyncio.Future[PeerFetch] = asyncio.get_running_loop().create_future()

    def progressed(self) -> None: ...

    def completed(self, fetch: PeerFetch) -> None:
        self.completed_fetch.set_result(fetch)

    def fail(self, reason: str) -> None:
        if not self.completed_fetch.done():
            self.completed_fetch.set_exception(WireError(reason))
            self.completed_fetch.exception()


async def fetch(port: int, own: Trust, num_blocks: int = 8) -> list[int]:
    """What the blocks are filled with. Raises: WireError, OSError."""
    receiver, listener = BlockReceiver(BLOCK_BYTES), Listener()
    nonce = b"" if own.key is None else new_nonce()
    hello = Hello(PEER_PROTOCOL_VERSION, B, A, LAYOUT, nonce)
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: PeerConnection(hello, receiver, listener, own.key),
        *("127.0.0.1", port),
        ssl=None if own.tls is None else own.tls.to_member(),
    )
    try:
        async with asyncio.timeout(5):
            await connection.shaken
            hashes = [name(i) for i in range(num_blocks)]
            wanted = PeerFetch(Peer(A, ""), hashes, list(range(num_blocks)), 0.0)
            memory = np.empty((num_blocks, BLOCK_BYTES), dtype=np.uint8)
            wanted.targets = list(memory)
            connection.write(encode_fetch(receiver.expect(wanted), hashes))
            await listener.completed_fetch
            assert wanted.outcomes == [BlockOutcome.SOUND] * num_blocks
            return [int(block[0]) for block in memory]
    finally:
        connection.abort()


@pytest.mark.parametrize("with_tls", [False, True])
async def test_a_member_gets_the_blocks(tmp_path: Path, with_tls: bool) -> None:
    both = trust(tls=make_tls(tmp_path) if with_tls else None)
    with serving(both) as server:
        assert await fetch(server.port, both) == list(range(8))
        assert await fetch(server.port, both, 1) == [0]


@pytest.mark.parametrize(
    ("serves", "fetches", "reason"),
    [
        (trust(), trust("t" * 32), "wrong proof"),
        (trust(), trust(purpose="stream"), "wrong proof"),
        (trust(), ANYBODY, "no proof"),
        (ANYBODY, trust(), "none is given here"),
    ],
    ids=["another secret", "for something else", "a caller without", "a server without"],
)
async def test_others_get_none(serves: Trust, fetches: Trust, reason: str) -> None:
    with serving(serves) as server:
        with pytest.raises(WireError, match=reason):
            await fetch(server.port, fetches)
        assert server.lender.snapshot().num_missed == 0
        assert not sum(server.lender.snapshot().served.values())


def say(port: int, *messages: Hello | Proof) -> list[Welcome | Goodbye | Challenge]:
    """What the server answers, until it closes."""
    answers = []
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connected:
        for message in messages:
            connected.sendall(encode_handshake(message))
            answers.append(answer(connected))
        if not isinstance(answers[-1], Challenge):
            assert is_closed(connected)
    return answers


def test_a_recorded_handshake_opens_nothing() -> None:
    own = trust()
    assert own.key is not None
    hello = Hello(PEER_PROTOCOL_VERSION, B, A, LAYOUT, new_nonce())
    with serving(own) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connected:
            connected.sendall(encode_handshake(hello))
            challenge = answer(connected)
            said = (handshake_body(hello), handshake_body(challenge))
            proof = Proof(own.key.prove("fetching", *said))
            connected.sendall(encode_handshake(proof))
            assert isinstance(answer(connected), Welcome)
        again, refusal = say(server.port, hello, proof)
        assert isinstance(again, Challenge)
        assert again != challenge
        assert isinstance(refusal, Goodbye)
        assert "wrong proof" in refusal.reason


def test_a_stranger_learns_nothing_of_the_model() -> None:
    with serving(trust()) as server:
        other = Hello(
            PEER_PROTOCOL_VERSION, B, WorkerId("x"), LAYOUT.__class__(b"x" * 16, "", "", 1, 1)
        )
        for nonce in (b"", b"n", b"n" * NONCE_BYTES):
            hello = Hello(other.protocol_version, B, other.callee, other.layout, nonce)
            *_, last = say(server.port, hello, *([Proof(b"x" * 32)] if len(nonce) > 1 else []))
            assert isinstance(last, Goodbye)
            assert "proof" in last.reason
            assert "fingerprint" not in last.reason


@pytest.mark.parametrize("asks", [False, True])
async def test_a_server_that_cannot_prove_itself_is_not_believed(asks: bool) -> None:
    """It says Welcome at once, or after a challenge, but cannot know the proof."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(4096)
            if asks:
                writer.write(encode_handshake(Challenge(new_nonce())))
                await reader.read(4096)
            writer.write(encode_handshake(Welcome(PEER_PROTOCOL_VERSION, A, b"x" * 32)))
            await reader.read()
        finally:
            writer.transport.abort()

    impostor = await asyncio.start_server(play, "127.0.0.1", 0)
    async with impostor:
        with pytest.raises(WireError, match="proof of the cluster's secret"):
            await fetch(impostor.sockets[0].getsockname()[1], trust())


def is_answered_without_certificate(port: int) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    hello = Hello(PEER_PROTOCOL_VERSION, B, A, LAYOUT, new_nonce())
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
            context.wrap_socket(plain) as connected,
        ):
            connected.sendall(encode_handshake(hello))
            return connected.recv(1) != b""
    except (ssl.SSLError, ConnectionError):
        return False


@pytest.mark.parametrize("kind", ["plain", "foreign", "no certificate"])
async def test_without_a_right_certificate_nothing_is_served(tmp_path: Path, kind: str) -> None:
    with serving(trust(tls=make_tls(tmp_path))) as server:
        if kind == "no certificate":
            assert not await asyncio.to_thread(is_answered_without_certificate, server.port)
            return
        theirs = None if kind == "plain" else make_tls(tmp_path / "theirs", "theirs")
        with pytest.raises((OSError, WireError, TimeoutError)):
            await fetch(server.port, trust(tls=theirs))


def test_certificates_are_read_again(tmp_path: Path) -> None:
    tls = make_tls(tmp_path)
    context = tls.for_clients()

    def shown() -> bytes:
        """The certificate that a client sees."""
        here, there = socket.socketpair()
        client = ssl.create_default_context()
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        with here, there:
            serve = threading.Thread(
                target=lambda: context.wrap_socket(there, server_side=True).close()
            )
            serve.start()
            with client.wrap_socket(here) as connected:
                found = connected.getpeercert(binary_form=True)
            serve.join()
        assert found is not None
        return found

    def written(name: str) -> bytes:
        return ssl.PEM_cert_to_DER_cert(certificate(name).cert_chain_pems[0].bytes().decode())

    assert shown() == written("ours")
    (tmp_path / "cert.pem").write_bytes(certificate("theirs").cert_chain_pems[0].bytes())
    certificate("theirs").private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    tls.reload()
    assert shown() == written("theirs")
