"""The worker's end of the token stream: masters connect here, submit requests and get tokens.

A request belongs to the connection it came on. When that closes, however it closes, all its
requests are cancelled, so no block is held for a master that is gone.

The engine reports every delta of a step within one pass of the event loop; they leave as one
frame per master.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Protocol

from xllm.errors import EngineFault, NoWorker, RequestError
from xllm.protocol import (
    PROTOCOL_VERSION,
    Epoch,
    GenerateRequest,
    MasterId,
    TokenDelta,
    TokenizerFiles,
    Watermark,
    WorkerId,
)
from xllm.roles import frames
from xllm.roles.delta_queue import Listener
from xllm.roles.stream import FrameProtocol, StreamLimits
from xllm.security.secret import NONCE_BYTES, new_nonce
from xllm.security.tls import HANDSHAKE_S
from xllm.security.trust import ANYBODY, FIX, NO_PROOF, NO_SECRET_HERE, WRONG_PROOF, Trust

logger = logging.getLogger(__name__)


class RunningRequest(Protocol):
    def cancel(self) -> None:
        """Stops all samples; the listener is not called any more. Idempotent."""
        ...


class RequestEngine(Protocol):
    """What the stream needs of an engine."""

    @property
    def step_counter(self) -> int: ...

    def submit(self, request: GenerateRequest, listener: Listener) -> RunningRequest:
        """Raises: InvalidRequest, Overloaded."""
        ...


class StreamServer:
    """Accepts masters for one worker."""

    def __init__(
        self,
        worker_id: WorkerId,
        epoch: Epoch,
        engine: RequestEngine,
        tokenizer: TokenizerFiles,
        limits: StreamLimits | None = None,
        trust: Trust = ANYBODY,
    ) -> None:
        self.trust = trust
        self.worker_id = worker_id
        self.epoch = epoch
        self.engine = engine
        self.tokenizer = tokenizer
        self.limits = limits or StreamLimits()
        self.draining = False
        self.connections: set[MasterConnection] = set()
        self._server: asyncio.Server | None = None
        self._idle: asyncio.Event | None = None

    async def start(self, listening: socket.socket) -> None:
        """Serves on a bound socket, which it owns from now on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: MasterConnection(self),
            sock=listening,
            backlog=self.limits.max_connections,
            ssl=None if self.trust.tls is None else self.trust.tls.for_members(),
            ssl_handshake_timeout=None if self.trust.tls is None else HANDSHAKE_S,
        )

    def close(self) -> None:
        """Says goodbye to every master; their requests here end as lost."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.leave("the worker stops")

    def refuse_new(self) -> None:
        """From now on: masters send what they have elsewhere."""
        if not self.draining:
            self.draining = True
            for connection in self.connections:
                connection.send(frames.Draining())

    async def drain(self, timeout_s: float) -> None:
        """Takes no new requests from now on; returns when none runs or the time is over."""
        self.refuse_new()
        self._idle = asyncio.Event()
        self.check_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    def check_idle(self) -> None:
        """To be called when a request has ended."""
        if self._idle is not None and self.num_requests == 0:
            self._idle.set()

    def change_epoch(self, epoch: Epoch) -> None:
        """The lease was lost and there is a new one: masters keep their connections."""
        self.epoch = epoch
        for connection in self.connections:
            connection.announce()

    def make_room(self, newcomer: MasterConnection) -> bool:
        """Whether there is room for one more. Whoever only holds a connection loses it first:
        masters say who they are within milliseconds."""
        if len(self.connections) <= self.limits.max_connections:
            return True
        strangers = [c for c in self.connections if c.master_id is None and c is not newcomer]
        if strangers:
            min(strangers, key=lambda c: c.opened_at).abort("others wait to say who they are")
        return bool(strangers)

    @property
    def num_requests(self) -> int:
        return sum(connection.num_requests for connection in self.connections)

    def watermarks(self) -> dict[str, Watermark]:
        """What a load report taken now already includes, by master."""
        return {
            connection.master_id: connection.watermark
            for connection in self.connections
            if connection.master_id is not None
        }


class _OpenRequest:
    """One `Submit` until all its samples have ended."""

    __slots__ = ("num_open_samples", "running")

    def __init__(self, num_samples: int) -> None:
        self.num_open_samples = num_samples
        self.running: RunningRequest | None = None


class MasterConnection(FrameProtocol):
    """One master's connection, from accept to close."""

    def __init__(self, server: StreamServer) -> None:
        super().__init__(server.limits, frames.MAX_TO_MASTER_BYTES)
        self.master_id: MasterId | None = None
        """None until the handshake."""
        self._server = server
        self._session = 0
        self._num_received = 0
        self._num_ended = 0
        self._open: dict[tuple[str, int, int], _OpenRequest] = {}
        self._step: list[TokenDelta] = []
        self.opened_at = 0.0
        self._asked: tuple[frames.Hello, bytes, bytes] | None = None
        """Who has yet to prove that it knows the secret: Hello, and it and Challenge as said."""
        self._check_handle: asyncio.TimerHandle | None = None

    @property
    def num_requests(self) -> int:
        return len(self._open)

    @property
    def watermark(self) -> Watermark:
        return Watermark(self._session, self._num_received, self._num_ended)

    def announce(self) -> None:
        if self.master_id is not None:
            server = self._server
            self.send(frames.Welcome(PROTOCOL_VERSION, server.worker_id, server.epoch))

    def leave(self, reason: str) -> None:
        self.send(frames.Goodbye(reason))
        self.close(reason)

    # FrameProtocol

    def on_open(self) -> None:
        self._server.connections.add(self)
        self.opened_at = self.loop.time()
        if not self._server.make_room(self):
            self.abort("too many connections")
            return
        self._check_handle = self.loop.call_later(self.limits.ping_s, self._check)

    def on_closed(self, reason: str) -> None:
        self._server.connections.discard(self)
        if self._check_handle is not None:
            self._check_handle.cancel()
        abandoned = list(self._open.values())
        self._open.clear()
        self._step.clear()
        for open_request in abandoned:
            if open_request.running is not None:
                open_request.running.cancel()
        self._server.check_idle()
        logger.info(
            "master_disconnected master_id=%s num_cancelled=%d reason=%r",
            self.master_id,
            len(abandoned),
            reason,
        )

    def on_frame(self, frame: memoryview) -> None:
        message = frames.decode_to_worker(frame)
        if self.master_id is None:
            if self._asked is None:
                self._meet(message, bytes(frame))
            else:
                self._check_proof(message, bytes(frame))
            return
        match message:
            case frames.Submit(request):
                self._submit(request)
            case frames.Cancel(request_id, attempt, index):
                self._cancel((request_id, attempt, index))
            case frames.Ping():
                self.send(frames.Pong(self._server.engine.step_counter))
            case frames.GetTokenizer():
                self._send_tokenizer()
            case frames.Hello() | frames.Proof():
                raise frames.FrameError("a second handshake")

    def _meet(self, message: frames.ToWorker, said: bytes) -> None:
        server = self._server
        if not isinstance(message, frames.Hello):
            raise frames.FrameError("no handshake")
        has_secret = server.trust.key is not None
        if message.protocol_version != PROTOCOL_VERSION:
            self.leave(
                f"protocol version {message.protocol_version} of the master is not "
                f"{PROTOCOL_VERSION} of the worker: run the same version of xllm on both"
            )
        elif message.worker_id != server.worker_id:
            self.leave(f"this is worker {server.worker_id}, not {message.worker_id}")
        elif has_secret != bool(message.nonce):
            self._distrust(message, NO_PROOF if has_secret else NO_SECRET_HERE)
        elif has_secret:
            challenge = frames.Challenge(new_nonce())
            self._asked = (message, said, frames.encode(challenge))
            self.send(challenge)
        else:
            self._accept(message)

    def _check_proof(self, message: frames.ToWorker, said: bytes) -> None:
        server, key = self._server, self._server.trust.key
        assert self._asked is not None
        assert key is not None
        hello, *before = self._asked
        if not isinstance(message, frames.Proof):
            raise frames.FrameError("no proof")
        if len(hello.nonce) != NONCE_BYTES or not key.check(message.mac, "master", *before):
            self._distrust(hello, WRONG_PROOF)
            return
        welcome = frames.Welcome(PROTOCOL_VERSION, server.worker_id, server.epoch)
        self._accept(hello, key.prove("worker", *before, said, frames.encode(welcome)))

    def _distrust(self, hello: frames.Hello, reason: str) -> None:
        logger.error("master_not_trusted master_id=%r reason='%s'", hello.master_id, reason)
        self.leave(f"{reason}: {FIX}")

    def _accept(self, hello: frames.Hello, proof: bytes = b"") -> None:
        """From now on the master is served."""
        server = self._server
        self.master_id = hello.master_id
        self._session = hello.session
        self._asked = None
        self.accept_frames_of(frames.MAX_TO_WORKER_BYTES)
        self.send(frames.Welcome(PROTOCOL_VERSION, server.worker_id, server.epoch, proof))
        if server.draining:
            self.send(frames.Draining())
        logger.info("master_connected master_id=%s", hello.master_id)

    def _check(self) -> None:
        """Ends a connection that never said who it is, or whose other side is silently gone."""
        now = self.loop.time()
        silence_s = self.silence.check(now)
        if self.master_id is None and now > self.opened_at + self.limits.connect_s:
            self.abort("no handshake in time")
        elif silence_s > self.limits.lost_s:
            self.abort(f"silent for {silence_s:.1f} s")
        else:
            self._check_handle = self.loop.call_later(self.limits.ping_s, self._check)

    # Requests

    def _submit(self, request: GenerateRequest) -> None:
        key = (request.request_id, request.attempt, request.index)
        self._num_received += 1
        if self._server.draining:
            self._num_ended += 1
            self._refuse(key, NoWorker("the worker is draining"))
            return
        if key in self._open:
            # Not an answer: it would end the one that runs.
            raise frames.FrameError(f"request {request.request_id} was submitted twice")
        open_request = self._open[key] = _OpenRequest(request.n)

        def listen(news: TokenDelta | RequestError) -> None:
            if self._open.get(key) is not open_request:
                return
            if isinstance(news, RequestError):
                self._cancel(key)
                self._refuse(key, news)
                return
            if not self._step:
                self.loop.call_soon(self._send_step)
            self._step.append(news)
            if news.finish_reason is not None:
                open_request.num_open_samples -= 1
                if open_request.num_open_samples == 0:
                    del self._open[key]
                    self._num_ended += 1
                    self._server.check_idle()

        try:
            open_request.running = self._server.engine.submit(request, listen)
        except RequestError as error:
            self._cancel(key)
            self._refuse(key, error)
        except Exception:
            # Let through, it would end the connection and with it all other requests.
            logger.exception("submit_failed request_id=%s", request.request_id)
            self._cancel(key)
            self._refuse(key, EngineFault("the worker could not begin the request"))

    def _cancel(self, key: tuple[str, int, int]) -> None:
        open_request = self._open.pop(key, None)
        if open_request is not None:
            self._num_ended += 1
            self._server.check_idle()
            if open_request.running is not None:
                open_request.running.cancel()

    def _refuse(self, key: tuple[str, int, int], error: RequestError) -> None:
        self._send_step()
        self.send(
            frames.Refused(*key, error.label, error.message, error.param, error.retry_after_s)
        )

    def _send_step(self) -> None:
        deltas, self._step = self._step, []
        if not deltas:
            return
        try:
            self.send(frames.Step(deltas))
        except frames.FrameError:
            for delta in deltas:
                self._send_delta(delta)

    def _send_delta(self, delta: TokenDelta) -> None:
        """For a step that does not fit one frame: log-probabilities of whole prompts."""
        try:
            self.send(frames.Step([delta]))
        except frames.FrameError as error:
            key = (delta.request_id, delta.attempt, delta.index)
            self._cancel(key)
            self._refuse(key, EngineFault(f"the answer is too large: {error}"))

    def _send_tokenizer(self) -> None:
        try:
            self.send(frames.TokenizerReply(self._server.tokenizer))
        except frames.FrameError as error:
            self.leave(f"{error}: start the master with --tokenizer_path")
