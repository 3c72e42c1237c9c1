"""What workers say to each other when one fetches blocks of another. Pure.

The fetching side connects and speaks first. The handshake is two frames, u32 LE length and one
msgpack message each:

    fetching                                  serving
      Hello(version, ids, layout)  ──────>
    [                              <──────    Challenge(nonce)
      Proof(mac)                   ──────>                                                  ]
                                   <──────    Welcome(version, id), or Goodbye(reason)

Challenge and Proof only where there is a cluster secret: `security/secret.py` says what is proven.
From then on everything has a fixed form, little-endian, and is answered in the order asked:

    Fetch     u32 fetch id, u32 number of hashes, then 16 bytes for each
              with 2^31 added to the number: first 25 bytes of a trace context
    block     u32 fetch id, u32 index in the fetch, u32 status, u32 payload length,
              16 bytes checksum, then the payload

Trace contexts are only for a serving side that has asked for them, in its answer to a Hello that
offers them (TracedWelcome instead of Welcome), so that either side may be of an older version.

A block's payload is `block_bytes` long, or empty where the block could not be had. Layouts that
differ in anything never get past the handshake: a block's name already covers model, dtype and
block size, and the handshake checks them once more.

Whatever arrives is checked before anything is kept or allocated for it, and anything unexpected is
a `WireError`, which ends the connection. Nothing here does I/O.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import msgspec

from xllm.errors import PeerUnavailable
from xllm.protocol import BlockHash, WorkerId
from xllm.security.secret import NONCE_BYTES
from xllm.security.trust import FIX, NO_PROOF, NO_SECRET_HERE
from xllm.tracing import PACKED_BYTES, pack

PEER_PROTOCOL_VERSION = 1

MAX_HANDSHAKE_BYTES = 4096
MAX_REASON_CHARS = 200
"""What a refusal repeats of what it refuses."""
MAX_FETCH_BLOCKS = 64
"""Of one Fetch: bounds what the serving side reads for it, and what is lost if it is not answered
in time."""

_T = TypeVar("_T")

_LENGTH: Final = struct.Struct("<I")
_FETCH: Final = struct.Struct("<II")
_BLOCK: Final = struct.Struct("<IIII16s")

_IS_TRACED: Final = 1 << 31

LENGTH_BYTES = _LENGTH.size
FETCH_HEADER_BYTES = _FETCH.size
BLOCK_HEADER_BYTES = _BLOCK.size


class WireError(PeerUnavailable):
    """The other side does not speak this protocol, or is not who it should be."""


class PeerLayout(msgspec.Struct, frozen=True, array_like=True):
    """What both sides must have in common for a block to mean the same."""

    root: bytes
    """`CacheRoot.hash("")`: covers all of the following but `block_bytes`."""
    fingerprint: str
    kv_dtype: str
    block_size: int
    block_bytes: int

    def difference(self, other: PeerLayout) -> str:
        """Why blocks of `other` are of no use here; empty if they are."""
        for field in self.__struct_fields__:
            own, others = getattr(self, field), getattr(other, field)
            if own != others:
                return f"{field} is {_shown(own)} here, not {_shown(others)}"
        return ""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Who is calling, and whom it expects to reach."""

    protocol_version: int
    caller: WorkerId
    """For the log."""
    callee: WorkerId
    layout: PeerLayout
    nonce: bytes = b""
    """New for each connection, from a caller that has a secret and wants it proven; else empty."""
    has_traces: bool = False
    """Fetches may belong to traces, if the serving side wants to know."""


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=1):
    protocol_version: int
    callee: WorkerId
    proof: bytes = b""
    """The serving side knows the secret, if that was asked for."""


class TracedWelcome(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Welcome; and fetches may carry their trace context."""

    protocol_version: int
    callee: WorkerId
    proof: bytes = b""


class Goodbye(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The serving side will not serve: why. Nothing follows."""

    reason: str


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The serving side wants the secret proven."""

    nonce: bytes


class Proof(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Answer to `Challenge`."""

    mac: bytes


_encoder: Final = msgspec.msgpack.Encoder()
_hello: Final = msgspec.msgpack.Decoder(Hello)
_proof: Final = msgspec.msgpack.Decoder(Proof)
Answer = Welcome | TracedWelcome | Goodbye | Challenge
_answer: Final[msgspec.msgpack.Decoder[Answer]] = msgspec.msgpack.Decoder(Answer)


def handshake_body(message: Hello | Answer | Proof) -> bytes:
    """What is proven, and what `encode_handshake` puts behind the length."""
    return _encoder.encode(message)


def encode_handshake(message: Hello | Answer | Proof) -> bytes:
    """One frame."""
    body = handshake_body(message)
    assert len(body) <= MAX_HANDSHAKE_BYTES
    return _LENGTH.pack(len(body)) + body


def handshake_bytes(header: bytes | memoryview) -> int:
    """How many bytes follow a handshake frame's length. Raises: WireError."""
    (num_bytes,) = _LENGTH.unpack(header)
    if not 0 < num_bytes <= MAX_HANDSHAKE_BYTES:
        raise WireError(f"a handshake of {num_bytes} bytes")
    return int(num_bytes)


def decode_hello(body: bytes | memoryview) -> Hello:
    """Raises: WireError."""
    return _decode(_hello, body, "a handshake")


def decode_proof(body: bytes | memoryview) -> Proof:
    """Raises: WireError."""
    return _decode(_proof, body, "a proof")


def decode_answer(body: bytes | memoryview) -> Answer:
    """Raises: WireError."""
    return _decode(_answer, body, "an answer to a handshake")


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes | memoryview, what: str) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not {what}: {error}") from error


def check_hello(hello: Hello, worker_id: WorkerId, layout: PeerLayout) -> str:
    """Why the serving side refuses; empty if it does not. Until it has said Welcome it serves
    nothing."""
    if hello.protocol_version != PEER_PROTOCOL_VERSION:
        return (
            f"peer protocol {hello.protocol_version} is not {PEER_PROTOCOL_VERSION}: "
            "run the same version of xllm on both"
        )
    if hello.callee != worker_id:
        return f"this is worker {worker_id}, not {hello.callee[:MAX_REASON_CHARS]}"
    return layout.difference(hello.layout)[:MAX_REASON_CHARS]


def check_proof_wanted(hello: Hello, *, wants: bool) -> str:
    """Why the two cannot trust each other whatever they prove; empty if they can."""
    if wants and len(hello.nonce) != NONCE_BYTES:
        return f"{NO_PROOF}: {FIX}"
    if hello.nonce and not wants:
        return f"{NO_SECRET_HERE}: {FIX}"
    return ""


def encode_fetch(fetch_id: int, hashes: Sequence[BlockHash], trace: str = "") -> bytes:
    """`trace`: a valid `traceparent`, for a side that wants it."""
    assert 0 < len(hashes) <= MAX_FETCH_BLOCKS
    names = b"".join(hashes)
    if trace:
        return _FETCH.pack(fetch_id, len(hashes) | _IS_TRACED) + pack(trace) + names
    return _FETCH.pack(fetch_id, len(hashes)) + names


class FetchHeader(NamedTuple):
    fetch_id: int
    num_hashes: int
    num_trace_bytes: int
    """Before the hashes."""


def decode_fetch_header(header: bytes | memoryview) -> FetchHeader:
    """Raises: WireError."""
    fetch_id, count = _FETCH.unpack(header)
    num_trace_bytes = PACKED_BYTES if count & _IS_TRACED else 0
    count &= ~_IS_TRACED
    if not 0 < count <= MAX_FETCH_BLOCKS:
        raise WireError(f"a fetch of {count} blocks")
    return FetchHeader(fetch_id, count, num_trace_bytes)


class BlockStatus(enum.IntEnum):
    HIT = 0
    MISS = 1


class BlockHeader(NamedTuple):
    fetch_id: int
    position: int
    status: int
    """`BlockStatus`, unless it is garbage."""
    num_bytes: int
    checksum: bytes


def encode_hit(fetch_id: int, index: int, num_bytes: int, checksum: bytes) -> bytes:
    return _BLOCK.pack(fetch_id, index, BlockStatus.HIT, num_bytes, checksum)


def encode_miss(fetch_id: int, index: int) -> bytes:
    return _BLOCK.pack(fetch_id, index, BlockStatus.MISS, 0, bytes(16))


@dataclass(slots=True)
class ExpectedBlocks:
    """The blocks of one fetch that have not come yet, in order: what a header may say."""

    fetch_id: int
    num_blocks: int
    block_bytes: int
    next_index: int = 0

    def check(self, header: bytes | memoryview) -> BlockHeader:
        """Takes the header of the next block. Raises: WireError if it is not that."""
        found = BlockHeader._make(_BLOCK.unpack(header))
        if (found.fetch_id, found.position) != (self.fetch_id, self.next_index):
            raise WireError(
                f"block {found.position} of fetch {found.fetch_id} came instead of block "
                f"{self.next_index} of fetch {self.fetch_id}"
            )
        wanted = {BlockStatus.HIT: self.block_bytes, BlockStatus.MISS: 0}.get(
            found.status  # type: ignore[call-overload]
        )
        if found.num_bytes != wanted:
            raise WireError(f"a block of status {found.status} with {found.num_bytes} bytes")
        self.next_index += 1
        return found

    @property
    def is_complete(self) -> bool:
        return self.next_index == self.num_blocks


def _shown(value: object) -> str:
    return value.hex()[:8] if isinstance(value, bytes) else str(value)
