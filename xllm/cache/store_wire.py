"""What a worker and its store agent say to each other, over socket pairs of one machine.

    worker                                     agent (`store_agent.py`)
    ------                                     ------------------------
    starts it with `AgentConfig`   ────────>   attaches to the store
                                   <────────   `Attached`, once, on the control channel
    `Request`, on one of the lanes ────────>   one call of the store's client
                                   <────────   `Reply`

A lane has one request under way at a time; lanes are independent of each other. Payloads do not
pass here: they are in memory that both have mapped, at the offsets that a request names. A message
is a length (u32, little-endian) and msgpack. The end of the control channel ends the agent.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import time
from typing import TypeVar

import msgspec

MAX_MESSAGE_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")

T = TypeVar("T")


class Op(enum.StrEnum):
    EXIST = "exist"
    GET = "get"
    PUT = "put"
    REMOVE = "remove"
    CLEAR = "clear"
    """`keys` has one prefix."""


class Request(msgspec.Struct, frozen=True, array_like=True):
    op: Op
    keys: list[str]
    offsets: list[int] = msgspec.field(default_factory=list)
    """Of GET and PUT: where in the shared memory each object is."""
    size: int = 0
    """Of each object."""


class Reply(msgspec.Struct, frozen=True, array_like=True):
    codes: list[int]
    """One per key, as the store's client gives them: negative is an error (`store_codes.py`).
    EXIST: 1 or 0. GET: bytes read. PUT and REMOVE: 0."""


class Attached(msgspec.Struct, frozen=True, array_like=True):
    error: str = ""
    """Empty: the agent is attached; otherwise why it is not."""


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The agent's only argument, as JSON. Descriptors are inherited."""

    memory_fd: int
    memory_bytes: int
    control_fd: int
    lane_fds: list[int]
    lane_niceness: list[int]
    """One per lane, of the thread that serves it."""
    protocol: str
    master_server_address: str
    metadata_server: str
    local_hostname: str
    segment_size: int
    replica_num: int


class ChannelClosed(ConnectionError):
    """The other side has gone."""


def send(channel: socket.socket, message: msgspec.Struct) -> None:
    """Raises: OSError."""
    data = msgspec.msgpack.encode(message)
    channel.sendall(_LENGTH.pack(len(data)) + data)


def receive(channel: socket.socket, kind: type[T], timeout_s: float | None = None) -> T:
    """The next message, which must be of `kind`.

    Raises: TimeoutError; ChannelClosed, also for what cannot be read; OSError.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    (num_bytes,) = _LENGTH.unpack(_receive_exactly(channel, _LENGTH.size, deadline))
    if num_bytes > MAX_MESSAGE_BYTES:
        raise ChannelClosed(f"a message of {num_bytes} bytes")
    try:
        return msgspec.msgpack.decode(_receive_exactly(channel, num_bytes, deadline), type=kind)
    except msgspec.DecodeError as error:
        raise ChannelClosed(f"not a {kind.__name__}: {error}") from error


def close_quietly(*channels: socket.socket) -> None:
    for channel in channels:
        with contextlib.suppress(OSError):
            channel.close()


def _receive_exactly(channel: socket.socket, num_bytes: int, deadline: float | None) -> bytearray:
    data = bytearray(num_bytes)
    filled = 0
    while filled < num_bytes:
        if deadline is not None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("no answer in time")
            channel.settimeout(left_s)
        else:
            channel.settimeout(None)
        received = channel.recv_into(memoryview(data)[filled:])
        if received == 0:
            raise ChannelClosed("the channel has ended")
        filled += received
    return data
