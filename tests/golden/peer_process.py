"""A worker in a process of its own that serves blocks, and is killed in the middle of that.

Run as a module it answers one line of JSON for each line on its standard input: the greedy tokens
of the prompts in it, and where their blocks may be fetched from.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.peers import running
from xllm.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
ANSWER_TIMEOUT_S = 300.0


class PeerProcess:
    """The parent's view of it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.address = ""
        """Once something was computed."""

    async def compute(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy tokens of each. Raises: TimeoutError, or RuntimeError if it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        question = {"prompts": [list(prompt) for prompt in prompts], "max_tokens": max_tokens}
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), ANSWER_TIMEOUT_S)
        if not line:
            raise RuntimeError("the peer's process has ended; what it said is above")
        answer = json.loads(line)
        self.address = answer["address"]
        outputs: list[list[int]] = answer["outputs"]
        return outputs

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    async def wait(self) -> int:
        return await asyncio.wait_for(self._process.wait(), ANSWER_TIMEOUT_S)


@asynccontextmanager
async def peer_process(config: EngineConfig, folder: Path) -> AsyncIterator[PeerProcess]:
    """Named A, as `tests.peers.running` names it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.golden.peer_process", str(folder)),
        json.dumps(asdict(config)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        limit=1 << 24,
    )
    peer = PeerProcess(process)
    try:
        yield peer
    finally:
        if process.returncode is None:
            peer.kill()
            await process.wait()


@asynccontextmanager
async def killed_after(peer: PeerProcess, num_bytes: int) -> AsyncIterator[str]:
    """An address at which `peer` answers until so many bytes have come from it: then it is killed,
    and what the kernel still has of it is thrown away."""
    host, _, port = peer.address.rpartition(":")
    left = num_bytes
    connections: list[asyncio.Task[None]] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        task = asyncio.current_task()
        assert task is not None
        connections.append(task)
        try:
            theirs, ours = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        asking = asyncio.create_task(forward(reader, ours))
        try:
            while left and (data := await theirs.read(min(left, 1 << 16))):
                left -= len(data)
                writer.write(data)
                await writer.drain()
            if not left:
                peer.kill()
                await peer.wait()
        except ConnectionError:
            pass
        finally:
            asking.cancel()
            ours.close()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _answer_until_killed(folder: Path, config: EngineConfig) -> None:
    async with running(config, folder) as worker:
        while line := await asyncio.to_thread(sys.stdin.readline):
            question: dict[str, Any] = json.loads(line)
            outputs = [
                (await worker.generate(prompt, max_tokens=question["max_tokens"], timeout_s=300))[0]
                for prompt in question["prompts"]
            ]
            print(json.dumps({"address": worker.address, "outputs": outputs}), flush=True)


if __name__ == "__main__":
    asyncio.run(_answer_until_killed(Path(sys.argv[1]), EngineConfig(**json.loads(sys.argv[2]))))
