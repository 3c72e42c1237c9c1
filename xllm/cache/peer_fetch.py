"""One fetch from a peer, and where the bytes of a connection go while fetches are answered. Pure.

    QUEUED ──its request is sent──> SENT ──answered, or the connection ends──> ENDED
       └──────────cancelled───────> CANCELLED

Payloads arrive in their targets directly: `BlockReceiver.buffer` says where the next bytes belong,
`received` that some have come. Each block is verified as soon as it is complete, while it is still
in the core's cache.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from xllm.cache.peer_wire import BLOCK_HEADER_BYTES, BlockHeader, ExpectedBlocks, WireError
from xllm.cache.slab_format import Buffer, checksum_of
from xllm.protocol import BlockHash, WorkerId


class Peer(NamedTuple):
    """Where a worker serves blocks."""

    worker_id: WorkerId
    address: str


class FetchState(enum.Enum):
    QUEUED = "queued"
    SENT = "sent"
    ENDED = "ended"
    CANCELLED = "cancelled"


class BlockOutcome(enum.Enum):
    ABSENT = "absent"
    """Not answered, or the peer does not have it."""
    SOUND = "sound"
    CORRUPT = "corrupt"


class PeerFetch:
    """Some blocks of one chain, asked of one peer with one request."""

    __slots__ = (
        *("block_ids", "give_up_at", "hashes", "outcomes", "peer", "state", "targets", "trace"),
    )

    def __init__(
        self,
        peer: Peer,
        hashes: Sequence[BlockHash],
        block_ids: Sequence[int],
        give_up_at: float,
        trace: str = "",
    ) -> None:
        """block_ids: device blocks that take them. `give_up_at`, by `time.monotonic`: when nobody
        has been waiting for a while and the blocks are wanted back."""
        self.peer = peer
        self.hashes = list(hashes)
        self.block_ids = list(block_ids)
        self.give_up_at = give_up_at
        self.trace = trace
        """Whose child the span of the serving side is; empty: no trace."""
        self.state = FetchState.QUEUED
        self.outcomes = [BlockOutcome.ABSENT] * len(self.hashes)
        self.targets: list[Buffer] = []
        """`block_bytes` each; set before it is SENT."""


class BlockReceiver:
    """The answers on one connection, in the order in which fetches were sent."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._outstanding: deque[tuple[PeerFetch, ExpectedBlocks]] = deque()
        self._header = memoryview(bytearray(BLOCK_HEADER_BYTES))
        self._block: BlockHeader | None = None
        """Whose payload is being received; None: a header is."""
        self._buffer = self._header
        self._filled = 0
        self._next_id = 0

    @property
    def fetches(self) -> list[PeerFetch]:
        """Sent and not answered yet."""
        return [fetch for fetch, _ in self._outstanding]

    @property
    def num_outstanding_bytes(self) -> int:
        """Of payload, at most."""
        num_blocks = sum(e.num_blocks - e.next_index for _, e in self._outstanding)
        return num_blocks * self._block_bytes

    def expect(self, fetch: PeerFetch) -> int:
        """`fetch` is about to be sent, under the id returned."""
        assert len(fetch.targets) == len(fetch.hashes)
        fetch_id, self._next_id = self._next_id, (self._next_id + 1) & 0xFFFFFFFF
        expected = ExpectedBlocks(fetch_id, len(fetch.hashes), self._block_bytes)
        self._outstanding.append((fetch, expected))
        return fetch_id

    def buffer(self) -> memoryview:
        """Where the next bytes go, at least one; valid until `received`."""
        return self._buffer[self._filled :]

    def received(self, num_bytes: int) -> PeerFetch | None:
        """So many bytes are in `buffer` now; returns the fetch that they complete.

        Raises: WireError.
        """
        self._filled += num_bytes
        if self._filled < len(self._buffer):
            return None
        self._filled = 0
        if self._block is None:
            return self._begin_block()
        fetch, _ = self._outstanding[0]
        is_sound = checksum_of(fetch.targets[self._block.position]) == self._block.checksum
        outcome = BlockOutcome.SOUND if is_sound else BlockOutcome.CORRUPT
        fetch.outcomes[self._block.position] = outcome
        return self._end_block()

    def _begin_block(self) -> PeerFetch | None:
        if not self._outstanding:
            raise WireError("a block that was not asked for")
        fetch, expected = self._outstanding[0]
        header = expected.check(self._header)
        if not header.num_bytes:
            return self._end_block()
        self._block = header
        self._buffer = fetch.targets[header.position].data
        return None

    def _end_block(self) -> PeerFetch | None:
        self._block = None
        self._buffer = self._header
        fetch, expected = self._outstanding[0]
        if not expected.is_complete:
            return None
        self._outstanding.popleft()
        return fetch
