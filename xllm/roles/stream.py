"""One end of the token stream: frames over one TCP connection, bounded in both directions.

`stream_server.py` is the worker's end, `stream_client.py` the master's; what they say is in
`frames.py`. Between one master and one worker there is one connection, and all their requests
share it.

Frames are handled synchronously where they arrive, so there is no queue to bound on the receiving
side. On the sending side everything said within one pass of the event loop leaves in one write,
and a peer that stops reading is given up: its unsent bytes may stay over `unsent_bytes` for
`stalled_s`, and never exceed `max_unsent_bytes` plus one frame. Nobody waits for a slow peer: a
worker's other masters must not feel it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from typing import cast

from xllm.roles import frames
from xllm.roles.liveness import Silence


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """How long each side waits for the other, and how much it keeps for it."""

    connect_s: float = 5.0
    """For the connection, and again for the handshake."""
    min_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    ping_s: float = 0.5
    suspect_s: float = 1.5
    """Silence after which a worker gets new requests only if all are suspect."""
    stuck_s: float = 5.0
    """The same for a worker that answers, but runs requests without making a step."""
    lost_s: float = 3.0
    """Silence after which the other side is gone, though its connection is open."""
    unsent_bytes: int = 4 << 20
    stalled_s: float = 5.0
    max_unsent_bytes: int = 64 << 20
    max_connections: int = 256
    """Masters that one worker serves, those that have not said who they are included."""


class FrameProtocol(asyncio.Protocol):
    """Frames in through `on_frame`, out through `send`; ends with exactly one `on_closed`."""

    def __init__(self, limits: StreamLimits, max_send_bytes: int) -> None:
        self.limits = limits
        self.loop = asyncio.get_running_loop()
        self.silence = Silence(limits.ping_s, self.loop.time())
        self.closed = False
        self._max_send_bytes = max_send_bytes
        self._splitter = frames.FrameSplitter()
        self._transport: asyncio.Transport | None = None
        self._outgoing = bytearray()
        self._flush_handle: asyncio.Handle | None = None
        self._stalled_since: float | None = None

    def on_open(self) -> None:
        """The connection is there."""

    def on_frame(self, frame: memoryview) -> None:
        """One message; valid during the call. May raise FrameError to end the connection."""
        raise NotImplementedError

    def on_closed(self, reason: str) -> None:
        """Nothing arrives any more and nothing said will be sent."""

    def accept_frames_of(self, max_bytes: int) -> None:
        """Ends the handshake's limit on what arrives."""
        self._splitter.max_bytes = max_bytes

    def send(self, message: frames.ToWorker | frames.ToMaster) -> None:
        """Says `message` soon, in order; a closed connection swallows it.

        Raises: FrameError when it is too large to be said; the connection stays usable.
        """
        if self.closed or self._transport is None:
            return
        if self._stalled():
            self.abort("the other side does not read")
            return
        frames.append_frame(self._outgoing, message, self._max_send_bytes)
        if self._flush_handle is None:
            self._flush_handle = self.loop.call_soon(self._flush)

    def close(self, reason: str) -> None:
        """Sends what was said, then closes; hears nothing any more."""
        if self.closed or self._transport is None:
            return
        self._flush()
        self._transport.close()
        # A peer that does not read would keep a closing transport for ever.
        self.loop.call_later(self.limits.stalled_s, self._transport.abort)
        self._finish(reason)

    def abort(self, reason: str) -> None:
        """Closes at once; what was not sent is dropped."""
        if self.closed or self._transport is None:
            return
        self._transport.abort()
        self._finish(reason)

    def _stalled(self) -> bool:
        if self._stalled_since is None or self._transport is None:
            return len(self._outgoing) > self.limits.max_unsent_bytes
        if self.loop.time() - self._stalled_since > self.limits.stalled_s:
            return True
        unsent = self._transport.get_write_buffer_size() + len(self._outgoing)
        return unsent > self.limits.max_unsent_bytes

    def _flush(self) -> None:
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        if self._outgoing and self._transport is not None and not self.closed:
            # The transport may keep the buffer until it is sent: it gets this one for good.
            data, self._outgoing = self._outgoing, bytearray()
            self._transport.write(data)

    def _finish(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        self._outgoing.clear()
        if self._flush_handle is not None:
            self._flush_handle.cancel()
        self.on_closed(reason)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self.limits.unsent_bytes)
        connected_socket = transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            connected_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.silence = Silence(self.limits.ping_s, self.loop.time())
        self.on_open()

    def data_received(self, data: bytes) -> None:
        self.silence.heard(self.loop.time())
        try:
            for frame in self._splitter.feed(data):
                if self.closed:
                    return
                self.on_frame(frame)
        except frames.FrameError as error:
            self.abort(str(error))

    def pause_writing(self) -> None:
        self._stalled_since = self.loop.time()

    def resume_writing(self) -> None:
        self._stalled_since = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(str(exc) if exc is not None else "the other side closed the connection")
