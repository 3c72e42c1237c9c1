"""What travels on the token stream between a master and a worker, and how it is cut into frames.

    frame     u32 LE number of bytes that follow, then one msgpack message
    message   [tag, field, ...]; fields are only ever appended, so versions can be told apart

The master connects and speaks first:

    master                                worker
      Hello(version, ids, epoch)  ──────>
    [                             <──────   Challenge(nonce)
      Proof(mac)                  ──────>                                                    ]
                                  <──────   Welcome(version, id, epoch), or Goodbye(reason)
      Submit, Cancel, Ping, ...   ──────>
                                  <──────   Step, Refused, Pong, ...

Challenge and Proof only where there is a cluster secret: `security/secret.py` says what is proven.
Until the handshake is over a frame may have `MAX_HANDSHAKE_BYTES`: whoever is not known yet cannot
make this process hold more than that. After it, the limits are those of the longest request and
of the largest tokenizer.

A frame's length is checked before anything is kept for it. Nothing here does I/O: a splitter is
fed bytes, as they come, and any byte sequence ends in messages or in a `FrameError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import msgspec

from xllm.errors import XllmError
from xllm.protocol import (
    Epoch,
    GenerateRequest,
    MasterId,
    TokenDelta,
    TokenizerFiles,
    WorkerId,
)

MAX_HANDSHAKE_BYTES = 4096
MAX_TO_WORKER_BYTES = 16 << 20
"""A prompt of 131,072 tokens takes 0.7 MB."""
MAX_TO_MASTER_BYTES = 64 << 20
"""Log-probabilities of a whole long prompt; a tokenizer."""

_HEADER: Final = struct.Struct("<I")


class FrameError(XllmError):
    """The other side does not speak this protocol: the connection is of no more use.

    Never leaves the modules of the stream.
    """

    label = "frame"


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """First frame of a connection: who is calling, and whom it expects to reach."""

    protocol_version: int
    master_id: MasterId
    worker_id: WorkerId
    epoch: Epoch
    session: int
    """Names this connection among the master's to this worker: see `protocol.Watermark`."""
    nonce: bytes = b""
    """New for each connection, from a master that has a secret and wants it proven; else empty."""


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=1):
    request: GenerateRequest


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Ends all samples of the `Submit` with these fields; an unknown one has ended: no error."""

    request_id: str
    attempt: int
    index: int


class GetTokenizer(msgspec.Struct, frozen=True, array_like=True, tag=3):
    pass


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=4):
    pass


class Proof(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Answer to `Challenge`: the master knows the secret."""

    mac: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=16):
    """Answer to `Hello`; sent again when the worker's epoch changes under a live connection."""

    protocol_version: int
    worker_id: WorkerId
    epoch: Epoch
    proof: bytes = b""
    """In the first one, if the secret was asked for: the worker knows it, too."""


class Goodbye(msgspec.Struct, frozen=True, array_like=True, tag=17):
    """Last frame before the worker closes: why."""

    reason: str


class Step(msgspec.Struct, frozen=True, array_like=True, tag=18):
    """All that one engine step added to this master's requests."""

    deltas: list[TokenDelta]


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=19):
    """The `Submit` with these fields ended with an error, all its samples.

    `label` names the error's class in `errors.REQUEST_ERRORS`.
    """

    request_id: str
    attempt: int
    index: int
    label: str
    message: str
    param: str | None = None
    retry_after_s: int | None = None


class TokenizerReply(msgspec.Struct, frozen=True, array_like=True, tag=20):
    tokenizer: TokenizerFiles


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=21):
    """Answer to `Ping`. A counter that stands still while requests run shows a stuck engine."""

    step_counter: int


class Draining(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """The worker takes no new requests from now on; running ones go on."""


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag=23):
    """The worker wants the secret proven."""

    nonce: bytes


ToWorker = Hello | Submit | Cancel | GetTokenizer | Ping | Proof
ToMaster = Welcome | Goodbye | Step | Refused | TokenizerReply | Pong | Draining | Challenge

_encoder: Final = msgspec.msgpack.Encoder()
_to_worker: Final[msgspec.msgpack.Decoder[ToWorker]] = msgspec.msgpack.Decoder(ToWorker)
_to_master: Final[msgspec.msgpack.Decoder[ToMaster]] = msgspec.msgpack.Decoder(ToMaster)


def encode(message: ToWorker | ToMaster) -> bytes:
    """What `append_frame` puts behind the length: what is proven in the handshake."""
    return _encoder.encode(message)


def append_frame(buffer: bytearray, message: ToWorker | ToMaster, max_bytes: int) -> None:
    """Encodes `message` at the end of `buffer`, which stays as it was if the frame is too large.

    Raises: FrameError, for a message that cannot be said or that the other side would refuse.
    """
    start = len(buffer)
    buffer.extend(b"\0" * _HEADER.size)
    try:
        _encoder.encode_into(message, buffer, start + _HEADER.size)
    except (OverflowError, UnicodeEncodeError) as error:
        del buffer[start:]
        raise FrameError(f"a {type(message).__name__} cannot be encoded: {error}") from error
    num_bytes = len(buffer) - start - _HEADER.size
    if num_bytes > max_bytes:
        del buffer[start:]
        kind = type(message).__name__
        raise FrameError(f"a {kind} of {num_bytes} bytes is over the limit of {max_bytes}")
    _HEADER.pack_into(buffer, start, num_bytes)


def decode_to_worker(frame: memoryview) -> ToWorker:
    """Raises: FrameError."""
    try:
        return _to_worker.decode(frame)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"not a message to a worker: {error}") from error


def decode_to_master(frame: memoryview) -> ToMaster:
    """Raises: FrameError."""
    try:
        return _to_master.decode(frame)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"not a message to a master: {error}") from error


class FrameSplitter:
    """Cuts a byte stream, in whatever pieces it arrives, into frames.

    Holds at most one incomplete frame, and of that only the bytes that have arrived.
    """

    __slots__ = ("_needed", "_rest", "max_bytes")

    def __init__(self, max_bytes: int = MAX_HANDSHAKE_BYTES) -> None:
        self.max_bytes = max_bytes
        """May be changed between two frames; the next header is held to it."""
        self._rest = bytearray()
        self._needed = _HEADER.size
        """Bytes `_rest` must have before it is worth a look."""

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """Yields the messages that `data` completes; each is valid until the next one is asked for.

        The iterator has to be exhausted before the next `feed`, or the splitter given up.

        Raises: FrameError when a length is over the limit.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data = bytes(self._rest)
            self._rest = bytearray()
        view = memoryview(data)
        start = 0
        self._needed = _HEADER.size
        while len(view) - start >= _HEADER.size:
            (num_bytes,) = _HEADER.unpack_from(view, start)
            if num_bytes > self.max_bytes:
                raise FrameError(f"a frame of {num_bytes} bytes is over {self.max_bytes}")
            end = start + _HEADER.size + num_bytes
            if end > len(view):
                self._needed = end - start
                break
            yield view[start + _HEADER.size : end]
            start = end
        self._rest += view[start:]
