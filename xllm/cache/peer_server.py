"""Serves this worker's blocks to peers, on a thread of its own and of low priority.

    accept ──> Hello, Welcome ──> Fetch: lend, read or hash what has to be, send, end ──> Fetch ..

A connection is one task: what it has pinned is given back when it ends, however it ends. Each fetch
is served in loans of a few MB, and `max_loans` of them are out at any time: they bound what is
pinned and read ahead, whoever asks for how much. Everybody else waits in their sockets.

The bytes leave with large `sendmsg` calls straight from the tiers' memory, without the
interpreter's lock. While the engine computes, serving takes only a small share of the cores
(`_Pace`), else as much as it can get.

Pins and lookups do not wait for a step of a long prompt to end: `shared_books.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from xllm.cache.block_hash import HASH_BYTES, split_hashes
from xllm.cache.lender import Lender, LentBlock, Loan
from xllm.cache.peer_socket import PeerSocket, TlsPeerSocket
from xllm.cache.peer_wire import (
    FETCH_HEADER_BYTES,
    LENGTH_BYTES,
    PEER_PROTOCOL_VERSION,
    Challenge,
    Goodbye,
    PeerLayout,
    TracedWelcome,
    Welcome,
    WireError,
    check_hello,
    check_proof_wanted,
    decode_fetch_header,
    decode_hello,
    decode_proof,
    encode_handshake,
    encode_hit,
    encode_miss,
    handshake_body,
    handshake_bytes,
)
from xllm.cache.shared_books import SharedBooks
from xllm.cache.slab import aligned_buffer
from xllm.cache.slab_format import Buffer, checksum_of
from xllm.cache.threads import lower_priority
from xllm.cache.tier import TierName
from xllm.errors import TierIOError
from xllm.protocol import BlockHash, WorkerId
from xllm.security.secret import new_nonce
from xllm.security.trust import ANYBODY, FIX, WRONG_PROOF, Trust
from xllm.tracing import NO_SPAN, OFF, Span, SpanKind, Tracer, unpack

logger = logging.getLogger(__name__)

BUSY_SHARE = 0.04
"""Of the machine's cores, that serving takes while the engine computes. The priority alone does not
bound what it costs: it also takes bandwidth and caches that a step would have."""

_PACE_CHECK_S = 0.01
"""Between two looks at whether the engine still computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLimits:
    max_connections: int = 256
    max_loans: int = 4
    """Out at a time, of `Lender.max_blocks` each."""
    handshake_s: float = 5.0
    idle_s: float = 180.0
    """Without a fetch; longer than the other side keeps a connection that it does not use."""
    frame_s: float = 5.0
    """From the first byte of a fetch to its last."""
    stalled_s: float = 5.0
    """Without a byte sent while some are to be."""


class PeerServer:
    """`start` and `close` are for the owner's thread, everything else for the server's."""

    def __init__(
        self,
        worker_id: WorkerId,
        layout: PeerLayout,
        lender: Lender,
        books: SharedBooks,
        limits: ServeLimits | None = None,
        is_busy: Callable[[], bool] = lambda: False,
        trust: Trust = ANYBODY,
        tracer: Tracer = OFF,
    ) -> None:
        """`books`: the lender's. `is_busy`: whether the engine computes, so
        that serving has to be gentle; called on the server's thread."""
        self.worker_id = worker_id
        self.layout = layout
        self.limits = limits or ServeLimits()
        self.num_connections = 0
        self._trust = trust
        self._tracer = tracer
        self._tls = None if trust.tls is None else trust.tls.for_members()
        self._lender = lender
        self._books = books
        self._pace = _Pace(is_busy)
        self._thread: threading.Thread | None = None
        self._loop = asyncio.SelectorEventLoop()
        self._loans = asyncio.Semaphore(self.limits.max_loans)
        self._disk = ThreadPoolExecutor(1, "peer-disk", initializer=lower_priority)

    def start(self, listening: socket.socket) -> None:
        """Serves on a bound socket, which it owns from now on."""
        listening.setblocking(False)
        self._thread = threading.Thread(
            target=self._run, args=(listening,), name="peer-serve", daemon=True
        )
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends every connection and gives every pin back. Idempotent."""
        if self._thread is None:
            self._loop.close()
        elif self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(timeout_s)

    # ---- peer-serve thread ----

    def _run(self, listening: socket.socket) -> None:
        lower_priority()
        self._accepting = self._loop.create_task(self._accept(listening))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._accepting)
        except Exception:
            logger.exception("peer_server_stopped")
        finally:
            listening.close()
            self._disk.shutdown()
            self._loop.close()

    def _stop(self) -> None:
        self._accepting.cancel()

    async def _accept(self, listening: socket.socket) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    connected, _ = await self._loop.sock_accept(listening)
                except OSError as error:
                    # Out of file descriptors, most likely: it gets better when others end.
                    logger.warning("peer_not_accepted error=%r", str(error))
                    await asyncio.sleep(0.1)
                    continue
                tasks.create_task(self._serve(connected))

    async def _serve(self, accepted: socket.socket) -> None:
        """One connection, to its end."""
        self.num_connections += 1
        reason = "closed"
        with accepted, contextlib.ExitStack() as closing:
            try:
                connected = self._wrap(accepted, closing)
                async with asyncio.timeout(self.limits.handshake_s):
                    await connected.open()
                if self.num_connections > self.limits.max_connections:
                    await connected.send([encode_handshake(Goodbye("too many peers"))])
                elif await self._shake_hands(connected):
                    while await self._serve_fetch(connected):
                        pass
            except (OSError, WireError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
            except Exception:
                logger.exception("peer_connection_failed")  # one's end is not the others'
            finally:
                self.num_connections -= 1
                logger.debug("peer_disconnected reason=%r", reason)

    def _wrap(self, accepted: socket.socket, closing: contextlib.ExitStack) -> PeerSocket:
        if self._tls is None:
            return PeerSocket(self._loop, accepted, self.limits.stalled_s)
        connected = TlsPeerSocket(self._loop, accepted, self.limits.stalled_s, self._tls)
        closing.callback(connected.close)
        return connected

    async def _shake_hands(self, connected: PeerSocket) -> bool:
        key = self._trust.key
        async with asyncio.timeout(self.limits.handshake_s):
            said = await _receive_handshake(connected)
            hello = decode_hello(said)
            wants_traces = hello.has_traces and self._tracer.is_on
            kind = TracedWelcome if wants_traces else Welcome
            welcome = kind(PEER_PROTOCOL_VERSION, self.worker_id)
            refusal = check_proof_wanted(hello, wants=key is not None)
            if key is not None and not refusal:
                challenge = Challenge(new_nonce())
                await connected.send([encode_handshake(challenge)])
                answer = await _receive_handshake(connected)
                before = (said, handshake_body(challenge))
                if not key.check(decode_proof(answer).mac, "fetching", *before):
                    refusal = f"{WRONG_PROOF}: {FIX}"
                proof = key.prove("serving", *before, answer, handshake_body(welcome))
                welcome = kind(PEER_PROTOCOL_VERSION, self.worker_id, proof)
        if refusal:
            logger.error("peer_not_trusted worker_id=%r reason=%r", hello.caller, refusal)
        elif refusal := check_hello(hello, self.worker_id, self.layout):
            logger.warning("peer_refused worker_id=%r reason=%r", hello.caller, refusal)
        if refusal:
            await connected.send([encode_handshake(Goodbye(refusal))])
            return False
        await connected.send([encode_handshake(welcome)])
        logger.info("peer_connected worker_id=%r", hello.caller)
        return True

    async def _serve_fetch(self, connected: PeerSocket) -> bool:
        """False: the other side has closed the connection between two fetches."""
        async with asyncio.timeout(self.limits.idle_s):
            first = await connected.receive_some(1)
        if not first:
            return False
        async with asyncio.timeout(self.limits.frame_s):
            header = first + await connected.receive(FETCH_HEADER_BYTES - 1)
            fetch_id, count, num_trace_bytes = decode_fetch_header(header)
            trace = unpack(await connected.receive(num_trace_bytes)) if num_trace_bytes else ""
            hashes = split_hashes(await connected.receive(count * HASH_BYTES))
        span = NO_SPAN
        if trace:
            attributes = {"xllm.num_blocks": count}
            span = self._tracer.start(
                "serve blocks", trace, kind=SpanKind.SERVER, attributes=attributes
            )
        error = "the connection ended"
        try:
            await self._serve_loans(connected, fetch_id, hashes, span)
            error = ""
        finally:
            span.end(error=error)
        return True

    async def _serve_loans(
        self, connected: PeerSocket, fetch_id: int, hashes: Sequence[BlockHash], span: Span
    ) -> None:
        step = self._lender.max_blocks
        sent: Counter[TierName] = Counter()
        for start in range(0, len(hashes), step):
            async with self._loans:
                await self._pace.wait()
                some = hashes[start : start + step]
                sent.update(await self._serve_loan(connected, fetch_id, start, some))
        span.set({f"xllm.sent_blocks.{tier.value}": count for tier, count in sent.items()})

    async def _serve_loan(
        self, connected: PeerSocket, fetch_id: int, start: int, hashes: Sequence[BlockHash]
    ) -> Mapping[TierName, int]:
        """-> how many blocks were sent, by the tier that had them."""
        lent: asyncio.Future[Loan] = self._loop.create_future()

        def lend() -> None:
            loan = self._lender.lend(hashes)
            self._loop.call_soon_threadsafe(lent.set_result, loan)

        self._books.submit(lend)
        try:
            await _to_its_end(lent)
            loan = lent.result()
            if loan.attachment is not None:
                # To its end, whatever happens to the connection: it reads what is pinned.
                reading = self._loop.run_in_executor(self._disk, self._read, loan)
                await _to_its_end(reading)
            buffers: list[bytes | Buffer] = []
            for index, block in enumerate(loan.blocks, start):
                if block is None or block.payload is None or block.is_damaged:
                    buffers.append(encode_miss(fetch_id, index))
                    continue
                if block.checksum is None:
                    block.checksum = checksum_of(block.payload)
                num_bytes = self.layout.block_bytes
                buffers += (encode_hit(fetch_id, index, num_bytes, block.checksum), block.payload)
                loan.num_sent[block.tier] = loan.num_sent.get(block.tier, 0) + 1
            await connected.send(buffers)
            return dict(loan.num_sent)
        except BaseException:
            lent.result().num_sent.clear()
            raise
        finally:
            loan = lent.result()
            self._books.submit(lambda: self._lender.end(loan))

    def _read(self, loan: Loan) -> None:
        """On a thread for the disk: completes the loan's blocks that are there."""
        attachment = loan.attachment
        assert attachment is not None
        blocks: list[LentBlock] = [
            block for block in loan.blocks if block is not None and block.tier is TierName.DISK
        ]
        stride = attachment.slot_stride
        scratch = aligned_buffer(stride * len(blocks))
        targets = [scratch[at : at + stride] for at in range(0, scratch.nbytes, stride)]
        checksums = [block.checksum for block in blocks if block.checksum is not None]
        try:
            sound = attachment.read_blocks([block.slot for block in blocks], targets, checksums)
        except TierIOError as error:
            loan.error = error
            return
        for block, target, is_sound in zip(blocks, targets, sound, strict=True):
            block.payload = target[: self.layout.block_bytes]
            block.is_damaged = not is_sound


class _Pace:
    """Lets the thread's work begin so late that it takes its share of the cores, and no more."""

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._rest = 1.0 / min(1.0, BUSY_SHARE * (os.cpu_count() or 1)) - 1.0
        """Seconds to rest for each second of work."""
        self._counted_s = 0.0
        """CPU time of the thread that has been rested for."""
        self._resume_at = 0.0

    async def wait(self) -> None:
        now, used_s = time.monotonic(), time.thread_time()
        rest_s = (used_s - self._counted_s) * self._rest
        self._counted_s = used_s
        self._resume_at = max(self._resume_at, now) + rest_s
        while self._is_busy() and (left_s := self._resume_at - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left_s, _PACE_CHECK_S))
        self._resume_at = min(self._resume_at, time.monotonic())


async def _receive_handshake(connected: PeerSocket) -> bytes:
    """The body of one frame. Raises: WireError, OSError."""
    return await connected.receive(handshake_bytes(await connected.receive(LENGTH_BYTES)))


async def _to_its_end(work: asyncio.Future[Any]) -> None:
    """Waits even when it is cancelled, which comes through afterwards."""
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
