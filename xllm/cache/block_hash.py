"""A block's name is its content.

    hash_i = sha256(hash_{i-1} || tokens_i as int32 little-endian)[:16]        full blocks only

`hash_{-1}` is the root: a hash over everything besides the tokens that the KV depends on. The same
tokens get the same name on every machine and after every restart, and a collision cannot be
forged, so equal names may share memory across requests, processes and machines.

The root's fields are length-prefixed: ("ab", "c") and ("a", "bc") differ.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

from xllm.protocol import BlockHash

LAYOUT_VERSION = 1
"""Bumped when the bytes of a block change their meaning."""

HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class CacheRoot:
    """What the KV of a prefix depends on besides its tokens and the tenant."""

    fingerprint: str
    kv_dtype: str
    block_size: int
    adapter: str = ""

    @lru_cache(maxsize=256)  # noqa: B019 - what it keeps is small, and bounded
    def hash(self, salt: str = "") -> BlockHash:
        """The parent of a sequence's first block; `salt` separates tenants.

        The root with an empty salt also names the directory of a disk cache.
        """
        digest = sha256()
        fields = (
            str(LAYOUT_VERSION),
            self.fingerprint,
            self.kv_dtype,
            str(self.block_size),
            self.adapter,
            salt,
        )
        for field in fields:
            encoded = field.encode()
            digest.update(len(encoded).to_bytes(4, "little"))
            digest.update(encoded)
        return BlockHash(digest.digest()[:HASH_BYTES])


def hash_blocks(
    parent: BlockHash, token_ids: Sequence[int], block_size: int, start: int = 0
) -> list[BlockHash]:
    """Names of the full blocks of `token_ids[start:]`, of which `parent` names what is before.

    `start` is a multiple of `block_size`; a partial block at the end has no name.
    """
    assert start % block_size == 0
    num_blocks = (len(token_ids) - start) // block_size
    if num_blocks <= 0:
        return []
    end = start + num_blocks * block_size
    raw = struct.pack(f"<{end - start}i", *token_ids[start:end])
    stride = block_size * 4
    hashes: list[BlockHash] = []
    for offset in range(0, num_blocks * stride, stride):
        parent = BlockHash(sha256(parent + raw[offset : offset + stride]).digest()[:HASH_BYTES])
        hashes.append(parent)
    return hashes


def split_hashes(raw: bytes) -> list[BlockHash]:
    """raw: HASH_BYTES for each."""
    starts = range(0, len(raw), HASH_BYTES)
    return [BlockHash(raw[start : start + HASH_BYTES]) for start in starts]
