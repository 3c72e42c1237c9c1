"""One block as an object of the shared store: its key, and what is appended to its bytes. Pure.

    key       xllm/{cache root without salt, hex}/{block's name, hex}
    value     payload of `block_bytes`, then a trailer of 64 bytes (little-endian):

    0   magic "xKVo"             8   payload length, u64      32  payload checksum (xxh3-128)
    4   format version, u16      16  block's name             48  zeros
    6   zeros                                                 56  xxh3-64 of bytes 0..56

One object holds both, so that a block and what it must hash to are never of two writes. The store
itself promises nothing of the kind, and whoever can reach it can write to it.
"""

from __future__ import annotations

import struct

import xxhash

from xllm.cache.slab_format import Buffer, round_up
from xllm.protocol import BlockHash

FORMAT_VERSION = 1
TRAILER_BYTES = 64

_MAGIC = b"xKVo"
_TRAILER = struct.Struct("<4sH2xQ16s16s8x")
_CHECKSUM = struct.Struct("<Q")
assert _TRAILER.size + _CHECKSUM.size == TRAILER_BYTES


def key_prefix(root: BlockHash) -> str:
    """Of all blocks of a cache root; `root` is without salt, which is in each name."""
    return f"xllm/{root.hex()}/"


def key_of(prefix: str, name: BlockHash) -> str:
    return prefix + name.hex()


def object_bytes(block_bytes: int) -> int:
    return block_bytes + TRAILER_BYTES


def slot_stride(block_bytes: int) -> int:
    """What an object takes in shared memory: whole pages."""
    return round_up(object_bytes(block_bytes))


def encode_trailer(name: BlockHash, checksum: bytes, block_bytes: int) -> bytes:
    body = _TRAILER.pack(_MAGIC, FORMAT_VERSION, block_bytes, name, checksum)
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def decode_trailer(trailer: bytes | Buffer, name: BlockHash, block_bytes: int) -> bytes | None:
    """What the payload must hash to; None: this is no object of that block."""
    data = bytes(trailer)
    if len(data) != TRAILER_BYTES:
        return None
    body, (checksum_of_body,) = data[: _TRAILER.size], _CHECKSUM.unpack(data[_TRAILER.size :])
    if xxhash.xxh3_64_intdigest(body) != checksum_of_body:
        return None
    magic, version, payload_bytes, its_name, checksum = _TRAILER.unpack(body)
    if (magic, version, payload_bytes, its_name) != (_MAGIC, FORMAT_VERSION, block_bytes, name):
        return None
    return bytes(checksum)
