"""The master's end of the token stream: one `WorkerStream` per worker, reconnected while it lives.

    CONNECTING ──handshake──> UP ──silence──> SUSPECT
        ^                      │ <──a frame──    │
        └──────── connection closed, or silent for too long

A request is one attempt on one worker. When the connection is lost, every request open on it ends
with `WorkerLost`, or with `NoWorker` if the worker said goodbye: whoever listens decides whether
another worker takes it over. Frames of an attempt that is not open here any more are dropped.

A worker is known by its id and epoch. Reaching another one at its address (a restart that etcd has
not told of yet, an address used again) ends the connection before anything is submitted.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import random
from collections.abc import Callable

from xllm.errors import REQUEST_ERRORS, EngineFault, RequestError, WorkerLost
from xllm.protocol import (
    GenerateRequest,
    MasterId,
    TokenDelta,
    TokenizerFiles,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
)
from xllm.roles import frames
from xllm.roles.admission import QueueMeter
from xllm.roles.delta_queue import Listener
from xllm.roles.liveness import Health, StepWatch, judge
from xllm.roles.stream import StreamLimits
from xllm.roles.stream_connection import WorkerConnection
from xllm.security.trust import ANYBODY, Trust

logger = logging.getLogger(__name__)

RequestKey = tuple[str, int, int]


class StreamState(enum.StrEnum):
    CONNECTING = "connecting"
    UP = "up"
    SUSPECT = "suspect"
    """Connected, but silent, or without progress."""


class WorkerStream:
    """A worker as this master reaches it. `run` keeps the connection; the rest is synchronous."""

    def __init__(
        self,
        info: WorkerInfo,
        master_id: MasterId,
        on_change: Callable[[], None] = lambda: None,
        limits: StreamLimits | None = None,
        rng: random.Random | None = None,
        on_lost: Callable[[], None] = lambda: None,
        trust: Trust = ANYBODY,
    ) -> None:
        self.trust = trust
        self.info = info
        self.state = StreamState.CONNECTING
        self.draining = False
        """The worker said that it takes no new requests."""
        self.step_counter = 0
        self.session = 0
        """Of the current connection; counts below are of it, too."""
        self.num_sent = 0
        self.num_ended = 0
        self.lost_at = -math.inf
        """When the last connection ended."""
        self.queue = QueueMeter()
        self.master_id = master_id
        self.on_change = on_change
        self.on_lost = on_lost
        self.limits = limits or StreamLimits()
        self.rng = rng or random.Random()
        self._connection: WorkerConnection | None = None
        self._open: dict[RequestKey, StreamRequest] = {}
        """By sample: a request is here once per sample that has not ended."""
        self._steps = StepWatch(0.0)
        self._tokenizer: asyncio.Future[TokenizerFiles] | None = None

    @property
    def worker_id(self) -> WorkerId:
        return self.info.worker_id

    @property
    def num_requests(self) -> int:
        return self.num_sent - self.num_ended

    def unreported(self, load: WorkerLoad | None) -> int:
        """How many of this master's requests run on the worker beyond those in its report."""
        received = ended = 0
        watermark = load.watermarks.get(self.master_id) if load is not None else None
        if watermark is not None and watermark.session == self.session:
            received, ended = watermark.received, watermark.ended
        return max(0, self.num_sent - received) - max(0, self.num_ended - ended)

    def unacknowledged(self, load: WorkerLoad) -> int:
        """How many of this master's requests the worker had not received when it reported."""
        watermark = load.watermarks.get(self.master_id)
        if watermark is None or watermark.session != self.session:
            return self.num_sent
        return max(0, self.num_sent - watermark.received)

    def submit(self, request: GenerateRequest, listener: Listener) -> StreamRequest:
        """Sends one attempt. (request_id, attempt, sample index) must not be open here.

        Raises: WorkerLost when there is no connection; EngineFault when it does not fit a frame.
        """
        if self._connection is not None:
            opened = StreamRequest(self, request, listener)
            assert not any(key in self._open for key in opened.open_keys)
            try:
                self._connection.send(frames.Submit(request))
            except frames.FrameError as error:
                raise EngineFault(str(error)) from error
        # A worker that does not read is given up when more is to be sent to it.
        if self._connection is None:
            raise WorkerLost(f"worker {self.worker_id} is not connected")
        self.num_sent += 1
        self.queue.add(opened.num_tokens, self._now())
        for key in opened.open_keys:
            self._open[key] = opened
        return opened

    async def fetch_tokenizer(self, timeout_s: float = 30.0) -> TokenizerFiles:
        """The tokenizer of the worker's model.

        Raises: WorkerLost when there is no connection, it is lost, or nothing comes in time.
        """
        if self._connection is None:
            raise WorkerLost(f"worker {self.worker_id} is not connected")
        if self._tokenizer is None:
            self._tokenizer = asyncio.get_running_loop().create_future()
            self._connection.send(frames.GetTokenizer())
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._tokenizer)
        except TimeoutError as error:
            raise WorkerLost(f"worker {self.worker_id} sent no tokenizer") from error

    def expect(self, info: WorkerInfo) -> None:
        """The worker registered anew. A connection that still works is kept: a process that was
        replaced has closed it."""
        moved = info.address != self.info.address
        self.info = info
        if moved and self._connection is not None:
            self._connection.abort("the worker has moved")

    async def run(self) -> None:
        """Connects, and connects again, until cancelled; then every open request is lost."""
        backoff_s = self.limits.min_backoff_s
        last_reason = ""
        while True:
            connection = WorkerConnection(self)
            try:
                if await self._connect(connection):
                    backoff_s = self.limits.min_backoff_s
                    last_reason = ""
                    await connection.wait_closed()
            finally:
                connection.abort("this master stops")
            if connection.close_reason != last_reason:
                last_reason = connection.close_reason
                logger.warning(
                    "worker_unreachable worker_id=%s address=%s reason=%r",
                    self.worker_id,
                    self.info.address,
                    last_reason,
                )
            await asyncio.sleep(backoff_s * self.rng.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, self.limits.max_backoff_s)

    async def _connect(self, connection: WorkerConnection) -> bool:
        """Whether there is a connection and its handshake is done."""
        host, _, port = self.info.address.rpartition(":")
        tls = None if self.trust.tls is None else self.trust.tls.to_member()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.limits.connect_s):
                await loop.create_connection(
                    lambda: connection, host.strip("[]"), int(port), ssl=tls
                )
            async with asyncio.timeout(self.limits.connect_s):
                return await connection.shaken
        except (OSError, TimeoutError, ValueError) as error:  # ValueError: a name that is none
            connection.abort("no handshake in time")
            connection.close_reason = str(error) or "no answer in time"
            return False

    # What the connection reports

    def connection_up(self, connection: WorkerConnection, session: int) -> None:
        self._connection = connection
        self.session = session
        self.num_sent = self.num_ended = 0
        self.draining = False
        self._steps = StepWatch(self._now())
        self._change_state(StreamState.UP)

    def connection_lost(self, connection: WorkerConnection, error: RequestError) -> None:
        if self._connection is not connection:
            return
        self._connection = None
        self.lost_at = self._now()
        lost = list(dict.fromkeys(self._open.values()))
        logger.warning(
            "worker_lost worker_id=%s num_requests=%d reason=%r",
            *(self.worker_id, len(lost), error.message),
        )
        for opened in lost:
            self._forget(opened)
        self.on_lost()
        self._change_state(StreamState.CONNECTING)
        for opened in lost:
            opened.listener(error)
        if self._tokenizer is not None and not self._tokenizer.done():
            self._tokenizer.set_exception(WorkerLost(error.message))
            self._tokenizer.exception()
        self._tokenizer = None

    def handle(self, message: frames.ToMaster) -> None:
        match message:
            case frames.Step(deltas):
                for delta in deltas:
                    self._take_delta(delta)
            case frames.Refused():
                self._take_refusal(message)
            case frames.Pong(step_counter):
                self.step_counter = step_counter
                self._steps.report(step_counter, is_busy=bool(self._open), now=self._now())
            case frames.TokenizerReply(files):
                if self._tokenizer is not None and not self._tokenizer.done():
                    self._tokenizer.set_result(files)
            case frames.Draining():
                self.draining = True
                self.on_change()
            case _:
                raise frames.FrameError(f"unexpected {type(message).__name__}")

    def judge(self, silence_s: float) -> Health:
        """To be called now and then while connected."""
        limits = self.limits
        health = judge(silence_s, suspect_s=limits.suspect_s, lost_s=limits.lost_s)
        is_stuck = self._steps.stalled_s(self._now()) > limits.stuck_s
        is_up = health is Health.ALIVE and not is_stuck
        state = StreamState.UP if is_up else StreamState.SUSPECT
        if state is not self.state:
            self._change_state(state)
        return health

    def _change_state(self, state: StreamState) -> None:
        if state is not self.state:
            logger.info("worker_stream worker_id=%s state=%s", self.worker_id, state.value)
            self.state = state
        self.on_change()

    # Requests

    def _take_delta(self, delta: TokenDelta) -> None:
        key = (delta.request_id, delta.attempt, delta.index)
        opened = self._open.get(key)
        if opened is None:
            return
        self._leave_queue(opened, has_begun=True)
        if delta.finish_reason is not None:
            del self._open[key]
            opened.open_keys.discard(key)
            if not opened.open_keys:
                self.num_ended += 1
        opened.listener(delta)

    def _take_refusal(self, refused: frames.Refused) -> None:
        opened = self._open.get((refused.request_id, refused.attempt, refused.index))
        if opened is None:
            return
        self._forget(opened)
        error_class = REQUEST_ERRORS.get(refused.label, EngineFault)
        opened.listener(
            error_class(refused.message, param=refused.param, retry_after_s=refused.retry_after_s)
        )

    def cancel(self, opened: StreamRequest) -> None:
        """Tells the worker, unless the request has ended."""
        if opened.open_keys:
            self._forget(opened)
            if self._connection is not None:
                request = opened.request
                self._connection.send(
                    frames.Cancel(request.request_id, request.attempt, request.index)
                )

    def _forget(self, opened: StreamRequest) -> None:
        for key in opened.open_keys:
            self._open.pop(key, None)
        opened.open_keys.clear()
        self.num_ended += 1
        self._leave_queue(opened, has_begun=False)

    def _leave_queue(self, opened: StreamRequest, *, has_begun: bool) -> None:
        if opened.is_queued:
            opened.is_queued = False
            self.queue.remove(opened.num_tokens, self._now(), has_begun=has_begun)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


class StreamRequest:
    """One attempt of a request on one worker. Its end is the last delta of each sample, or one
    error: what the worker refused it with, or that the worker is gone."""

    __slots__ = ("_stream", "is_queued", "listener", "open_keys", "request")

    def __init__(self, stream: WorkerStream, request: GenerateRequest, listener: Listener) -> None:
        self.request = request
        self.listener = listener
        self.is_queued = True
        """It has no token yet."""
        self.open_keys = {
            (request.request_id, request.attempt, index)
            for index in range(request.index, request.index + request.n)
        }
        """Samples that have not ended."""
        self._stream = stream

    @property
    def num_tokens(self) -> int:
        """To be computed before its first token."""
        return len(self.request.prompt_ids) + len(self.request.output_ids)

    def cancel(self) -> None:
        """Stops it; the listener is not called any more. Idempotent, also after the end."""
        self._stream.cancel(self)
