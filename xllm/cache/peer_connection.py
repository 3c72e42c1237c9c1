"""The fetching end of one connection: a handshake, then blocks into the buffers that wait."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Protocol, cast

import msgspec

from xllm.cache.peer_fetch import BlockReceiver, PeerFetch
from xllm.cache.peer_wire import (
    LENGTH_BYTES,
    PEER_PROTOCOL_VERSION,
    Challenge,
    Goodbye,
    Hello,
    Proof,
    TracedWelcome,
    Welcome,
    WireError,
    decode_answer,
    encode_handshake,
    handshake_body,
    handshake_bytes,
)
from xllm.security.secret import HandshakeKey
from xllm.security.trust import FIX, Claim


class PeerListener(Protocol):
    """Who has opened the connection."""

    def progressed(self) -> None:
        """Something has arrived."""
        ...

    def completed(self, fetch: PeerFetch) -> None: ...

    def fail(self, reason: str) -> None:
        """The connection has ended after its handshake."""
        ...


class PeerConnection(asyncio.BufferedProtocol):
    """Reads into where the bytes belong: there is no buffer in between."""

    def __init__(
        self,
        hello: Hello,
        receiver: BlockReceiver,
        listener: PeerListener,
        key: HandshakeKey | None = None,
    ) -> None:
        """`key`: what both sides have to prove; `hello` has a nonce then."""
        self._claim = Claim(key, "fetching", "serving")
        self._claim.begin(handshake_body(hello))
        self.shaken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done after the handshake, with WireError or OSError if it failed."""
        self.takes_traces = False
        """The peer wants to know which traces fetches belong to."""
        self._hello = hello
        self._receiver = receiver
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._is_over = False
        self._handshake = memoryview(bytearray(LENGTH_BYTES))
        self._filled = 0
        self._has_length = False

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._is_over:
            self._transport.write(data)

    def abort(self) -> None:
        """Nothing is written to any buffer after this."""
        self._is_over = True
        if self._transport is not None:
            self._transport.abort()

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        with contextlib.suppress(OSError, AttributeError):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.write(encode_handshake(self._hello))

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._is_over:
            return memoryview(bytearray(1))
        if not self.shaken.done():
            return self._handshake[self._filled :]
        return self._receiver.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_over:
            return
        try:
            if self.shaken.done():
                self._listener.progressed()
                fetch = self._receiver.received(nbytes)
                if fetch is not None:
                    self._listener.completed(fetch)
            else:
                self._shake(nbytes)
        except WireError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_over:
            self._end(exc or WireError("the peer closed the connection"))

    def _shake(self, num_bytes: int) -> None:
        self._filled += num_bytes
        if self._filled < len(self._handshake):
            return
        self._filled = 0
        if not self._has_length:
            self._has_length = True
            self._handshake = memoryview(bytearray(handshake_bytes(self._handshake)))
            return
        said = bytes(self._handshake)
        answer = decode_answer(said)
        if isinstance(answer, Challenge):
            self._prove(said)
            return
        if isinstance(answer, Goodbye):
            raise WireError(f"it says: {answer.reason}")
        if answer.protocol_version != PEER_PROTOCOL_VERSION or answer.callee != self._hello.callee:
            raise WireError(f"reached worker {answer.callee}, protocol {answer.protocol_version}")
        self._check_proof(answer)
        self.takes_traces = isinstance(answer, TracedWelcome)
        self.shaken.set_result(None)

    def _prove(self, challenge: bytes) -> None:
        mac, refusal = self._claim.prove(challenge)
        if refusal:
            raise WireError(refusal)
        proof = Proof(mac)
        self._claim.proven(handshake_body(proof))
        self.write(encode_handshake(proof))
        self._handshake = memoryview(bytearray(LENGTH_BYTES))
        self._has_length = False

    def _check_proof(self, welcome: Welcome | TracedWelcome) -> None:
        """Raises: WireError unless the peer knows the secret too, or there is none."""
        unproven = handshake_body(msgspec.structs.replace(welcome, proof=b""))
        if refusal := self._claim.check(welcome.proof, unproven):
            raise WireError(f"{refusal}: {FIX}")

    def _end(self, error: Exception) -> None:
        self.abort()
        if self.shaken.done():
            self._listener.fail(str(error))
        else:
            self.shaken.set_exception(error)
