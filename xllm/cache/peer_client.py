"""Fetches blocks from peers: one persistent connection to each, on a thread of its own.

    engine thread                                   "peer-fetch" thread
    -------------                                   -------------------
    start ──────────────call_soon_threadsafe─────>  a link per peer: connect, shake hands, ask
    try_cancel ─────────a state under a lock─────>  skips what was cancelled
    Mover.take_ended <──────────one queue─────────  each fetch that has ended

Bytes go straight into the device's blocks where the host can address them, by way of a staging
buffer where it cannot. Up to `window_bytes` are asked of a peer at a time, so the connection never
idles between two fetches, and what waits behind them can still be taken back.

A fetch that was sent is not taken back: its blocks belong to this thread until it has ended. So it
has to end: a link that makes no progress for `stall_s`, or still owes a fetch at its `give_up_at`,
is closed, and all its fetches fail. Nothing is tried twice here; who is asked next is decided in
`peers.py`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

import uvloop

from xllm.cache.host_tier import DeviceBlocks
from xllm.cache.mover import Mover, Transfer
from xllm.cache.peer_connection import PeerConnection
from xllm.cache.peer_fetch import BlockOutcome, BlockReceiver, FetchState, Peer, PeerFetch
from xllm.cache.peer_wire import PEER_PROTOCOL_VERSION, Hello, PeerLayout, WireError, encode_fetch
from xllm.cache.slab import aligned_buffer
from xllm.errors import PeerUnavailable
from xllm.net import split_host_port
from xllm.protocol import WorkerId
from xllm.security.secret import new_nonce
from xllm.security.trust import ANYBODY, Trust
from xllm.tracing import OFF

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLimits:
    """How long the fetching side waits for the other, and how much it asks for at a time."""

    connect_s: float = 1.0
    """For the connection and the handshake together."""
    stall_s: float = 1.5
    """Without a byte while something is owed."""
    check_s: float = 0.1
    idle_s: float = 60.0
    """Without a fetch; then the connection is closed."""
    window_bytes: int = 32 << 20
    grace_s: float = 0.5
    """From the deadline of a load to the end of its connection."""


class PeerClient:
    """`start` and `try_cancel` are for the engine's thread."""

    def __init__(
        self,
        caller: WorkerId,
        layout: PeerLayout,
        device: DeviceBlocks,
        mover: Mover,
        limits: PeerLimits | None = None,
        trust: Trust = ANYBODY,
    ) -> None:
        self.trust = trust
        self.tracer = OFF
        """To be set before the first fetch."""
        self.caller = caller
        self.layout = layout
        self.device = device
        self.limits = limits or PeerLimits()
        self.lock = threading.Lock()
        """Of `PeerFetch.state`."""
        self._mover = mover
        self._links: dict[Peer, _Link] = {}
        """The thread's."""
        self._transfers: dict[PeerFetch, Transfer] = {}
        """Not ended, not cancelled; entries come and go under the lock."""
        self.loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="peer-fetch", daemon=True)
        self._is_closed = False

    def start(self, fetch: PeerFetch, transfer: Transfer) -> None:
        """Queues a fetch; `transfer` ends, elsewhere, when it has been answered or has failed."""
        assert not self._is_closed
        if not self.thread.is_alive():  # a worker that never fetches has no thread for it
            self.thread.start()
        with self.lock:
            self._transfers[fetch] = transfer
        self.loop.call_soon_threadsafe(self._add, fetch)

    def try_cancel(self, fetch: PeerFetch) -> bool:
        """Takes back a fetch that was not sent."""
        with self.lock:
            if fetch.state is not FetchState.QUEUED:
                return False
            fetch.state = FetchState.CANCELLED
            del self._transfers[fetch]
            return True

    def close(self, timeout_s: float) -> None:
        """Ends every connection, and every fetch with it. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop)
            self.thread.join(timeout_s)
        if not self.thread.is_alive():
            self.loop.close()

    # ---- peer-fetch thread ----

    def end(self, fetch: PeerFetch, error: PeerUnavailable | None = None) -> None:
        """All that will arrive of `fetch` is there, be it in part."""
        with self.lock:
            if fetch.state is FetchState.CANCELLED:
                return
            fetch.state = FetchState.ENDED
            transfer = self._transfers.pop(fetch)
        if self.device.view(fetch.block_ids[0]) is None:
            self._copy_in(fetch)
        is_whole = all(outcome is BlockOutcome.SOUND for outcome in fetch.outcomes)
        self._mover.end_elsewhere(transfer, error, wake=not is_whole)

    def forget(self, link: _Link) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]

    def _copy_in(self, fetch: PeerFetch) -> None:
        """From the staging buffer, if there was one, to the device."""
        wanted = [i for i, o in enumerate(fetch.outcomes) if o is BlockOutcome.SOUND]
        if not wanted:
            return
        try:
            self.device.copy_in(
                [fetch.block_ids[i] for i in wanted], [fetch.targets[i] for i in wanted]
            )
        except Exception:
            logger.exception("peer_copy_failed")
            fetch.outcomes = [BlockOutcome.ABSENT] * len(fetch.outcomes)

    def _add(self, fetch: PeerFetch) -> None:
        link = self._links.get(fetch.peer)
        if link is None:
            link = self._links[fetch.peer] = _Link(self, fetch.peer)
        link.add(fetch)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _stop(self) -> None:
        for link in list(self._links.values()):
            link.fail("the worker stops")
        self.loop.stop()


class _Link:
    """One peer: the fetches that it owes, and the connection, once it is there."""

    def __init__(self, client: PeerClient, peer: Peer) -> None:
        self.peer = peer
        self._client = client
        self._limits = client.limits
        self._receiver = BlockReceiver(client.layout.block_bytes)
        self._waiting: deque[PeerFetch] = deque()
        self._connection: PeerConnection | None = None
        """None until the handshake is over."""
        self._is_over = False
        self._progress_at = time.monotonic()
        self._connecting = client.loop.create_task(self._connect())
        self._timer = client.loop.call_later(self._limits.check_s, self._check)

    def add(self, fetch: PeerFetch) -> None:
        if not self._waiting and not self._receiver.fetches:
            self._progress_at = time.monotonic()
        self._waiting.append(fetch)
        self._pump()

    def fail(self, reason: str) -> None:
        """Ends the link, and whatever it owes with `PeerUnavailable`."""
        if self._is_over:
            return
        self._is_over = True
        self._client.forget(self)
        self._connecting.cancel()
        self._timer.cancel()
        if self._connection is not None:
            self._connection.abort()
        owed = [*self._receiver.fetches, *self._waiting]
        if owed:
            logger.warning(
                "peer_failed worker_id=%s address=%s fetches=%d reason=%r",
                *(self.peer.worker_id, self.peer.address, len(owed), reason),
            )
        error = PeerUnavailable(f"worker {self.peer.worker_id}: {reason}")
        for fetch in owed:
            self._client.end(fetch, error)

    # What the connection calls

    def progressed(self) -> None:
        self._progress_at = time.monotonic()

    def completed(self, fetch: PeerFetch) -> None:
        self._client.end(fetch)
        self._pump()

    async def _connect(self) -> None:
        client = self._client
        try:
            async with asyncio.timeout(self._limits.connect_s):
                host, port = split_host_port(self.peer.address)
                key, tls = client.trust.key, client.trust.tls
                hello = Hello(
                    *(PEER_PROTOCOL_VERSION, client.caller, self.peer.worker_id, client.layout),
                    b"" if key is None else new_nonce(),
                    client.tracer.is_on,
                )
                _, connection = await client.loop.create_connection(
                    lambda: PeerConnection(hello, self._receiver, self, key),
                    *(host, port),
                    ssl=None if tls is None else tls.to_member(),
                )
                try:
                    await connection.shaken
                except BaseException:
                    connection.abort()
                    raise
        except TimeoutError:
            self.fail("no connection in time")
        except (OSError, ValueError, WireError) as error:
            self.fail(str(error))
        else:
            self._connection = connection
            self._progress_at = time.monotonic()
            self._pump()

    def _pump(self) -> None:
        """Asks for what the window has room for."""
        while self._connection is not None and self._waiting and not self._is_over:
            asked = self._receiver.num_outstanding_bytes
            fetch = self._waiting[0]
            wanted = len(fetch.hashes) * self._client.layout.block_bytes
            if asked and asked + wanted > self._limits.window_bytes:
                return
            self._waiting.popleft()
            with self._client.lock:
                if fetch.state is FetchState.CANCELLED:
                    continue
                fetch.state = FetchState.SENT
            self._set_targets(fetch)
            fetch_id = self._receiver.expect(fetch)
            trace = fetch.trace if self._connection.takes_traces else ""
            self._connection.write(encode_fetch(fetch_id, fetch.hashes, trace))

    def _set_targets(self, fetch: PeerFetch) -> None:
        views = [self._client.device.view(block_id) for block_id in fetch.block_ids]
        fetch.targets = [view for view in views if view is not None]
        if len(fetch.targets) < len(views):
            block_bytes = self._client.layout.block_bytes
            staging = aligned_buffer(len(views) * block_bytes).reshape(len(views), block_bytes)
            fetch.targets = list(staging)

    def _check(self) -> None:
        """Ends a link that is stuck, or has not been used for long."""
        now = time.monotonic()
        owed = self._receiver.fetches
        if owed and now - self._progress_at > self._limits.stall_s:
            self.fail(f"silent for {now - self._progress_at:.1f} s")
        elif owed and now > owed[0].give_up_at:
            self.fail("too slow")
        elif not owed and now - self._progress_at > self._limits.idle_s:
            self.fail("idle")
        else:
            self._timer = self._client.loop.call_later(self._limits.check_s, self._check)
