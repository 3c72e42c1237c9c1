"""A store agent as its worker sees it: a process with a few lanes, that can be killed.

An agent that does not answer in time is killed before `call` returns, so the part of the shared
memory that it was given is nobody's afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import msgspec

from xllm.cache import store_wire
from xllm.cache.store_wire import AgentConfig, Attached, Reply, Request
from xllm.errors import StoreUnavailable

logger = logging.getLogger(__name__)

KILL_TIMEOUT_S = 5.0

_QUIET = {"GLOG_minloglevel": "2", "MC_LOG_LEVEL": "ERROR"}
"""The native client reports every call otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    """Which store, and what this worker gives to it: the flags `--store_*`."""

    protocol: str
    master_server_address: str
    metadata_server: str
    local_hostname: str
    segment_size: int
    replica_num: int


class StoreAgent:
    """Started with the constructor; `kill` or `leave` ends it. Methods are for any thread."""

    def __init__(
        self,
        address: StoreAddress,
        memory_fd: int,
        memory_bytes: int,
        lane_niceness: Sequence[int],
    ) -> None:
        """`lane_niceness`: one per lane. Raises: StoreUnavailable if there is no process to be
        had."""
        pairs = [socket.socketpair() for _ in range(1 + len(lane_niceness))]
        (self._control, *self._lanes), theirs = zip(*pairs, strict=True)
        self._locks = [threading.Lock() for _ in self._lanes]
        config = AgentConfig(
            memory_fd=memory_fd,
            memory_bytes=memory_bytes,
            control_fd=theirs[0].fileno(),
            lane_fds=[lane.fileno() for lane in theirs[1:]],
            lane_niceness=list(lane_niceness),
            protocol=address.protocol,
            master_server_address=address.master_server_address,
            metadata_server=address.metadata_server,
            local_hostname=address.local_hostname,
            segment_size=address.segment_size,
            replica_num=address.replica_num,
        )
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "xllm.cache.store_agent", _as_json(config)],
                pass_fds=[memory_fd, config.control_fd, *config.lane_fds],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_QUIET | dict(os.environ),
            )
        except OSError as error:
            store_wire.close_quietly(self._control, *self._lanes)
            raise StoreUnavailable(f"the store agent could not be started: {error}") from error
        finally:
            store_wire.close_quietly(*theirs)
        self._last_lines: deque[str] = deque(maxlen=3)
        assert self._process.stderr is not None
        threading.Thread(
            target=self._listen, args=(self._process.stderr,), name="store-log", daemon=True
        ).start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def last_words(self) -> str:
        """What it said last, for a log."""
        status = self._process.poll()
        said = " | ".join(self._last_lines) or "nothing"
        return f"the store agent ended with status {status}, and said: {said}"

    def wait_attached(self, timeout_s: float) -> None:
        """Raises: StoreUnavailable with the reason why it is not, also after so long."""
        try:
            attached = store_wire.receive(self._control, Attached, timeout_s)
        except TimeoutError as error:
            raise StoreUnavailable(
                f"the store's client was not set up within {timeout_s:g} s"
            ) from error
        except OSError as error:
            self.kill()
            raise StoreUnavailable(self.last_words) from error
        if attached.error:
            raise StoreUnavailable(attached.error)

    def call(self, lane: int, request: Request, timeout_s: float) -> list[int]:
        """One code per key; the lane is waited for if it is in use.

        Raises: StoreUnavailable; the agent has ended then.
        """
        with self._locks[lane]:
            try:
                store_wire.send(self._lanes[lane], request)
                reply = store_wire.receive(self._lanes[lane], Reply, timeout_s)
            except TimeoutError as error:
                self.kill()
                raise StoreUnavailable(
                    f"the store did not answer {request.op} within {timeout_s:g} s"
                ) from error
            except (OSError, ValueError) as error:
                self.kill()
                raise StoreUnavailable(self.last_words) from error
        if len(reply.codes) != len(request.keys):
            self.kill()
            raise StoreUnavailable(
                f"the store answered {request.op} of {len(request.keys)} keys with "
                f"{len(reply.codes)} codes"
            )
        return reply.codes

    def kill(self) -> None:
        """Returns when it has ended; nothing writes to the shared memory then. Idempotent."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_TIMEOUT_S)

    def leave(self) -> None:
        """Lets it end by itself, and waits: it gives its segment back, which takes seconds."""
        store_wire.close_quietly(self._control, *self._lanes)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_TIMEOUT_S)

    def _listen(self, lines: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError), lines:
            for line in lines:
                text = line.decode(errors="replace").strip()
                self._last_lines.append(text)
                logger.debug("store_agent line=%r", text)


def _as_json(config: AgentConfig) -> str:
    return msgspec.json.encode(config).decode()
