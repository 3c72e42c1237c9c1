"""What the KV cache needs of the tiers below it and of the sequences that it serves. Pure."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol

from xllm.cache.tier import TierName
from xllm.protocol import BlockHash, FetchRange

if TYPE_CHECKING:
    from xllm.cache.loads import BlockSource, LoadSpan, LoadTicket


class LowerTiers(Protocol):
    """What is below the device (`tiers.Tiers`)."""

    @property
    def next_deadline(self) -> float | None: ...

    @property
    def lent_block_ids(self) -> list[int]: ...

    def match(
        self,
        hashes: Seq[BlockHash],
        block_compute_s: float | None = None,
        fetch: Seq[FetchRange] = (),
        first: int = 0,
    ) -> list[BlockSource]: ...

    def start_load(
        self,
        blocks: Seq[tuple[BlockHash, BlockSource, int]],
        timeout_s: float,
        trace: str = "",
    ) -> LoadTicket: ...

    def cancel(self, ticket: LoadTicket) -> None: ...

    def poll(self) -> list[LoadTicket]: ...

    def take_returned_blocks(self) -> list[int]: ...

    def committed(self, block_hash: BlockHash, parent: BlockHash | None, block_id: int) -> None: ...

    def used(self, chain: list[BlockHash]) -> None: ...

    def evicted(self, block_hash: BlockHash, block_id: int) -> None: ...

    def cleared(self) -> None: ...


class CachedSequence(Protocol):
    """What the cache reads and keeps of a sequence (`engine/request.py`)."""

    block_table: list[int]
    block_hashes: list[BlockHash]
    load: LoadTicket | None
    loads: list[LoadSpan]
    """What was loaded for it so far."""
    trace: str
    """A `traceparent`, for spans of fetches; empty: no trace."""
    cached_by_tier: dict[TierName, int]
    pending_hashes: list[BlockHash]
    num_committed_blocks: int
    num_computed_tokens: int
    num_written_tokens: int

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def salt(self) -> str: ...

    @property
    def uses_prefix_cache(self) -> bool: ...

    @property
    def fetch(self) -> Seq[FetchRange]:
        """Which peers are said to hold its blocks."""
        ...
