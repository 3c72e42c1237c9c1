"""A wire between masters and one worker that can be cut, for one master or for all.

A cut wire delivers nothing and says nothing, like a network that drops packets: connections stay
open, and what was sent meanwhile arrives when the wire is whole again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from xllm.roles import frames

_CHUNK_BYTES = 1 << 16


class Proxy:
    """Listens at `listen` and forwards to `target`; both are (host, port)."""

    def __init__(self, listen: tuple[str, int], target: tuple[str, int]) -> None:
        self._listen = listen
        self._target = target
        self._server: asyncio.Server | None = None
        self._is_whole: dict[str, asyncio.Event] = {}
        self._links: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, *self._listen)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def cut(self, master_id: str) -> None:
        self._gate(master_id).clear()

    def mend(self, master_id: str) -> None:
        self._gate(master_id).set()

    def _gate(self, master_id: str) -> asyncio.Event:
        if master_id not in self._is_whole:
            self._is_whole[master_id] = asyncio.Event()
            self._is_whole[master_id].set()
        return self._is_whole[master_id]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        try:
            await self._link(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # Only `stop` cancels.
        finally:
            self._links.discard(task)
            writer.close()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One master's connection: its first frame says whose it is."""
        header = await reader.readexactly(4)
        hello_frame = await reader.readexactly(int.from_bytes(header, "little"))
        hello = frames.decode_to_worker(memoryview(hello_frame))
        assert isinstance(hello, frames.Hello)
        gate = self._gate(hello.master_id)
        await gate.wait()
        worker_reader, worker_writer = await asyncio.open_connection(*self._target)
        try:
            worker_writer.write(header + hello_frame)
            await _first_end(
                lambda: _pump(reader, worker_writer, gate),
                lambda: _pump(worker_reader, writer, gate),
            )
            await gate.wait()
        finally:
            worker_writer.close()


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event
) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK_BYTES):
            await gate.wait()
            writer.write(data)
            await writer.drain()


async def _first_end(*makers: Callable[[], Awaitable[None]]) -> None:
    tasks = [asyncio.ensure_future(make()) for make in makers]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
