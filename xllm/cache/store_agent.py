"""A process of its own for the client of Mooncake Store: started by a worker, one for each.

Why not in the worker: measured with version 0.3.13, the client's `setup` keeps the interpreter's
lock for 90 s when the store's master does not answer, and `close` for seconds; every other call can
hang for as long as the master does, and a call that hangs can neither be interrupted nor be trusted
to have ended. A process can be killed; when it is gone, nothing writes to the shared memory any
more. So a native fault, too, costs a worker its store for a while and nothing else.

    main thread     attaches, says so, then waits for the worker to go away
    lane threads    receive a request, make one call, reply

Nothing here knows blocks, checksums or policies.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import sys
import threading
from typing import Any

import msgspec

from xllm.cache.store_wire import AgentConfig, Attached, Op, Reply, Request, receive, send
from xllm.cache.threads import lower_priority

LOCAL_BUFFER_BYTES = 16 << 20
"""Of the client's own, which calls with registered buffers do not use."""
CONNECT_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 5

_PR_SET_PDEATHSIG = 1
_INTERNAL_ERROR = -1


def main() -> None:
    config = msgspec.json.decode(sys.argv[1], type=AgentConfig)
    # Also while `setup` does not let any other thread run.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Of a terminal or a service manager, to the whole group: the worker says when it is over.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=config.control_fd)
    lanes = [socket.socket(fileno=fd) for fd in config.lane_fds]
    for channel in (control, *lanes):
        channel.setblocking(True)
    try:
        store = _Store(config)
    except Exception as error:
        send(control, Attached(f"{type(error).__name__}: {error}"))
        os._exit(1)
    for lane, niceness in zip(lanes, config.lane_niceness, strict=True):
        threading.Thread(target=_serve, args=(store, lane, niceness), daemon=True).start()
    send(control, Attached())
    with contextlib.suppress(OSError):
        while control.recv(1):
            pass
    store.leave()


def _serve(store: _Store, lane: socket.socket, niceness: int) -> None:
    lower_priority(niceness)
    with contextlib.suppress(OSError):
        while True:
            request = receive(lane, Request)
            try:
                codes = store.call(request)
            except Exception as error:
                print(f"{request.op} failed: {error!r}", file=sys.stderr, flush=True)
                codes = [_INTERNAL_ERROR] * len(request.keys)
            send(lane, Reply(codes))


class _Store:
    """The native client, attached."""

    def __init__(self, config: AgentConfig) -> None:
        """Raises: whatever is the reason why not."""
        _check_reachable(config.master_server_address)
        # Not before: it takes a moment, and needs Debian's libibverbs1.
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig

        self._has_segment = config.segment_size > 0
        self._memory = mmap.mmap(config.memory_fd, config.memory_bytes)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._replicas = ReplicateConfig()
        self._replicas.replica_num = config.replica_num
        self._client: Any = MooncakeDistributedStore()
        code = self._client.setup(
            config.local_hostname,
            config.metadata_server,
            config.segment_size,
            LOCAL_BUFFER_BYTES,
            config.protocol,
            "",
            config.master_server_address,
        )
        if code != 0:
            raise ConnectionError(f"the store's client could not be set up: {code}")
        code = self._client.register_buffer(self._base, config.memory_bytes)
        if code != 0:
            raise ConnectionError(f"the store's client did not take the shared memory: {code}")

    def call(self, request: Request) -> list[int]:
        keys = request.keys
        match request.op:
            case Op.EXIST:
                return list(self._client.batch_is_exist(keys))
            case Op.GET:
                return list(self._client.batch_get_into(keys, *self._buffers(request)))
            case Op.PUT:
                return list(
                    self._client.batch_put_from(keys, *self._buffers(request), self._replicas)
                )
            case Op.REMOVE:
                return list(self._client.batch_remove(keys, True))
            case Op.CLEAR:
                return [int(self._client.remove_by_regex(f"^{keys[0]}.*", True))]

    def leave(self) -> None:
        """Tells the store's master that this segment goes; ends the process."""
        if self._has_segment:
            # It outlives its worker for as long as that takes.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
            signal.alarm(CLOSE_TIMEOUT_S)
            self._client.close()
        os._exit(0)

    def _buffers(self, request: Request) -> tuple[list[int], list[int]]:
        pointers = [self._base + offset for offset in request.offsets]
        return pointers, [request.size] * len(pointers)


def _check_reachable(address: str) -> None:
    """Because `setup` would try for a minute and a half. Raises: OSError."""
    if "://" in address:  # names of a high-availability setup
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"no mooncake_master at {address}: {error}") from error


if __name__ == "__main__":
    main()
