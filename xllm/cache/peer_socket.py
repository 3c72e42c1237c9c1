"""One accepted connection of the block server, plain or with TLS: exact reads, whole writes.

Plain ones send with large `sendmsg` calls straight from the tiers' memory. OpenSSL takes no list of
buffers and copies what it encrypts, in records of 16 KiB; it also works without the interpreter's
lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import TypeVar

from xllm.cache.peer_wire import WireError
from xllm.cache.slab_format import Buffer

_MAX_IOV = 512
_TLS_SEND_BYTES = 1 << 18

_T = TypeVar("_T")


class PeerSocket:
    """`connected` is closed by whoever has accepted it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connected: socket.socket, stalled_s: float
    ) -> None:
        """`stalled_s`: without a byte sent while some are to be."""
        self._loop = loop
        self._socket = connected
        self._stalled_s = stalled_s
        connected.setblocking(False)
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def open(self) -> None:
        """To be awaited first. Raises: OSError."""

    async def receive_some(self, max_bytes: int) -> bytes:
        """At least one byte; none: the other side has closed. Raises: OSError."""
        return await self._loop.sock_recv(self._socket, max_bytes)

    async def receive(self, num_bytes: int) -> bytes:
        """Exactly so many. Raises: WireError if the other side closes before, OSError."""
        received = b""
        while len(received) < num_bytes:
            part = await self.receive_some(num_bytes - len(received))
            if not part:
                raise WireError("closed in the middle of a message")
            received += part
        return received

    async def send(self, buffers: Sequence[bytes | Buffer]) -> None:
        """All of it. Raises: TimeoutError if the other side does not read, OSError."""
        views = [
            memoryview(buffer) if isinstance(buffer, bytes) else buffer.data for buffer in buffers
        ]
        first = 0
        while first < len(views):
            try:
                num_sent = self._socket.sendmsg(views[first : first + _MAX_IOV])
            except (BlockingIOError, InterruptedError):
                await self._until(writable=True)
                continue
            while first < len(views) and num_sent >= views[first].nbytes:
                num_sent -= views[first].nbytes
                first += 1
            if num_sent:
                views[first] = views[first][num_sent:]
                # Others' turn, and the kernel's: it takes more when the other side has read.
                await self._until(writable=True)

    async def _until(self, *, writable: bool) -> None:
        """Raises: TimeoutError, if that is to be waited for with a limit: for writing."""
        ready = self._loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        add, remove = (
            (self._loop.add_writer, self._loop.remove_writer)
            if writable
            else (self._loop.add_reader, self._loop.remove_reader)
        )
        add(self._socket, wake)
        try:
            async with asyncio.timeout(self._stalled_s if writable else None):
                await ready
        finally:
            remove(self._socket)


class TlsPeerSocket(PeerSocket):
    """Takes the socket over, and closes it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connected: socket.socket,
        stalled_s: float,
        context: ssl.SSLContext,
    ) -> None:
        super().__init__(loop, connected, stalled_s)
        self._tls = context.wrap_socket(connected, server_side=True, do_handshake_on_connect=False)
        self._socket = self._tls

    async def open(self) -> None:
        await self._retry(self._tls.do_handshake)

    async def receive_some(self, max_bytes: int) -> bytes:
        try:
            return await self._retry(lambda: self._tls.recv(max_bytes))
        except ssl.SSLZeroReturnError:
            return b""

    async def send(self, buffers: Sequence[bytes | Buffer]) -> None:
        for buffer in buffers:
            view = memoryview(buffer) if isinstance(buffer, bytes) else buffer.data
            while view.nbytes:
                part = view[:_TLS_SEND_BYTES]
                num_sent = await self._retry(lambda part=part: self._tls.send(part))  # type: ignore[misc]
                view = view[num_sent:]

    def close(self) -> None:
        self._tls.close()

    async def _retry(self, attempt: Callable[[], _T]) -> _T:
        while True:
            try:
                return attempt()
            except ssl.SSLWantReadError:
                await self._until(writable=False)
            except ssl.SSLWantWriteError:
                await self._until(writable=True)
