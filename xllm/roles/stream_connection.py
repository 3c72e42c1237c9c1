"""One connection of a master to a worker: handshake, pings, goodbye.

What is said on it after the handshake is its `WorkerStream`'s business; so is connecting again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from xllm.errors import NoWorker, RequestError, WorkerLost
from xllm.protocol import PROTOCOL_VERSION
from xllm.roles import frames
from xllm.roles.liveness import Health
from xllm.roles.stream import FrameProtocol
from xllm.security.secret import new_nonce
from xllm.security.trust import FIX, Claim

if TYPE_CHECKING:
    from xllm.roles.stream_client import WorkerStream

logger = logging.getLogger(__name__)


class WorkerConnection(FrameProtocol):
    """One connection to a worker; reports to its `WorkerStream` once the handshake is done."""

    def __init__(self, stream: WorkerStream) -> None:
        super().__init__(stream.limits, frames.MAX_TO_WORKER_BYTES)
        self.shaken: asyncio.Future[bool] = self.loop.create_future()
        """True after the handshake, False when the connection closed before."""
        self.close_reason = ""
        self._stream = stream
        self._session = stream.rng.getrandbits(31)
        self._closed = asyncio.Event()
        self._has_left = False
        """The worker has said goodbye."""
        self._ping_handle: asyncio.TimerHandle | None = None
        self._claim = Claim(stream.trust.key, "master", "worker")

    async def wait_closed(self) -> None:
        await self._closed.wait()

    def on_open(self) -> None:
        info = self._stream.info
        has_secret = self._stream.trust.key is not None
        hello = frames.Hello(
            PROTOCOL_VERSION,
            self._stream.master_id,
            info.worker_id,
            info.epoch,
            self._session,
            new_nonce() if has_secret else b"",
        )
        self._claim.begin(frames.encode(hello))
        self.send(hello)

    def on_closed(self, reason: str) -> None:
        if self._ping_handle is not None:
            self._ping_handle.cancel()
        self.close_reason = reason
        if not self.shaken.done():
            self.shaken.set_result(False)
        self._closed.set()
        worker_id = self._stream.worker_id
        error: RequestError = WorkerLost(f"worker {worker_id} was lost: {reason}")
        if self._has_left:
            error = NoWorker(f"worker {worker_id} has left: {reason}")
        self._stream.connection_lost(self, error)

    def on_frame(self, frame: memoryview) -> None:
        message = frames.decode_to_master(frame)
        match message:
            case frames.Welcome():
                self._be_welcome(message)
            case frames.Challenge() if not self.shaken.done():
                self._prove(bytes(frame))
            case frames.Goodbye(reason):
                self._has_left = True
                self.abort(f"the worker says: {reason}")
            case _ if self.shaken.done():
                self._stream.handle(message)
            case _:
                raise frames.FrameError("no handshake")

    def _prove(self, challenge: bytes) -> None:
        mac, refusal = self._claim.prove(challenge)
        if refusal:
            raise frames.FrameError(refusal)
        proof = frames.Proof(mac)
        self._claim.proven(frames.encode(proof))
        self.send(proof)

    def _check_proof(self, welcome: frames.Welcome) -> None:
        """Raises: FrameError unless the worker knows the secret too, or there is none."""
        unproven = frames.encode(msgspec.structs.replace(welcome, proof=b""))
        if reason := self._claim.check(welcome.proof, unproven):
            logger.error(
                "worker_not_trusted worker_id=%s reason='%s'", self._stream.worker_id, reason
            )
            raise frames.FrameError(f"{reason}: {FIX}")

    def _be_welcome(self, welcome: frames.Welcome) -> None:
        stream = self._stream
        expected = stream.info
        if welcome.worker_id != expected.worker_id:
            raise frames.FrameError(f"reached worker {welcome.worker_id}")
        if welcome.protocol_version != PROTOCOL_VERSION:
            raise frames.FrameError(
                f"protocol version {welcome.protocol_version} of the worker is not "
                f"{PROTOCOL_VERSION} of this master: run the same version of xllm on both"
            )
        if self.shaken.done():
            return
        self._check_proof(welcome)
        if welcome.epoch != expected.epoch:
            raise frames.FrameError(f"reached epoch {welcome.epoch}, not {expected.epoch}")
        self.accept_frames_of(frames.MAX_TO_MASTER_BYTES)
        self.shaken.set_result(True)
        self._ping_handle = self.loop.call_later(self.limits.ping_s, self._ping)
        stream.connection_up(self, self._session)

    def _ping(self) -> None:
        silence_s = self.silence.check(self.loop.time())
        if self._stream.judge(silence_s) is Health.LOST:
            self.abort(f"silent for {silence_s:.1f} s")
            return
        self.send(frames.Ping())
        self._ping_handle = self.loop.call_later(self.limits.ping_s, self._ping)
