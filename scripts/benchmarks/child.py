"""A process that answers one line of JSON for each line that it is asked."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ANSWER_TIMEOUT_S = 300.0
END_TIMEOUT_S = 10.0
ROOT = Path(__file__).resolve().parent.parent.parent


class Child:
    """Reads questions from its standard input until that is closed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def read(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Raises: TimeoutError, RuntimeError if the process has ended."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process ended; what it said is above")
        return json.loads(line)

    async def ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        return await self.read()


@asynccontextmanager
async def running(
    *command: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Child]:
    """The process, which finds this project's modules, until the end of the block."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"} | (environment or {}),
    )
    try:
        yield Child(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
