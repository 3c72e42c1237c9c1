"""What the scheduler sees of the cache: match a prefix, reserve blocks, commit them, free them.

The life of a sequence's blocks:

    match       which leading blocks are cached; changes nothing
    try_admit   takes those, and reserves a block for every other token that is known, or nothing
    try_extend  one more block when the next token needs it
    commit      blocks that have become full get their names and can be found by others
    free        everything goes back; named blocks stay in the cache until evicted

A prefix that a running sequence is about to commit is *pending*: whoever needs it next waits for
it instead of computing it again. A promise ends with the commit, or with the one who gave it.

When every full block of the prompt is cached and nothing is left over, one token has to run all
the same, to have logits to sample from: the last one, whose KV is there already and is not written
again (`Sequence.num_written_tokens`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from xllm.cache.block_hash import CacheRoot, hash_blocks
from xllm.cache.block_pool import BlockPool
from xllm.protocol import BlockHash


class CachedSequence(Protocol):
    """What the cache reads and keeps of a sequence (`engine/request.py`)."""

    block_table: list[int]
    block_hashes: list[BlockHash]
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


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The unbroken cached prefix of a sequence; valid until the pool changes."""

    block_ids: list[int]
    num_tokens: int
    is_pending: bool
    """The block after the prefix is being computed by somebody else."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counters since the start, in tokens."""

    queried_tokens: int
    hit_tokens: int


class KVCache:
    """Blocks of one engine. Synchronous, for the engine's thread alone."""

    def __init__(
        self, pool: BlockPool, root: CacheRoot, *, enable_prefix_cache: bool = True
    ) -> None:
        self.pool = pool
        self.block_size = root.block_size
        self._root = root
        self._enable_prefix_cache = enable_prefix_cache
        self._roots: dict[str, BlockHash] = {}
        self._pending: set[BlockHash] = set()
        self._queried_tokens = 0
        self._hit_tokens = 0

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, seq: CachedSequence) -> PrefixMatch:
        """How much of `seq` is cached now. Names its full blocks; changes no block."""
        if not (self._enable_prefix_cache and seq.uses_prefix_cache):
            return PrefixMatch([], 0, False)
        self._name_blocks(seq)
        block_ids: list[int] = []
        for block_hash in seq.block_hashes:
            block_id = self.pool.lookup(block_hash)
            if block_id is None:
                return PrefixMatch(
                    block_ids, len(block_ids) * self.block_size, block_hash in self._pending
                )
            block_ids.append(block_id)
        return PrefixMatch(block_ids, len(block_ids) * self.block_size, False)

    def try_admit(self, seq: CachedSequence, match: PrefixMatch, num_spare_blocks: int = 0) -> bool:
        """Reserves blocks for all of `seq`'s tokens, the matched ones shared; False: too few.

        `num_spare_blocks` have to stay free besides. On success `seq` continues at
        `num_computed_tokens`.
        """
        assert not seq.block_table
        self.pool.acquire(match.block_ids)
        num_new = self.blocks_for(len(seq.token_ids)) - len(match.block_ids)
        if num_new + num_spare_blocks > self.pool.num_free:
            self.pool.release(match.block_ids)
            return False
        fresh = self.pool.allocate(num_new)
        assert fresh is not None
        seq.block_table = match.block_ids + fresh
        seq.num_committed_blocks = len(match.block_ids)
        seq.num_written_tokens = match.num_tokens
        seq.num_computed_tokens = min(match.num_tokens, len(seq.token_ids) - 1)
        if self._enable_prefix_cache and seq.uses_prefix_cache:
            seq.pending_hashes = [
                h for h in seq.block_hashes[len(match.block_ids) :] if h not in self._pending
            ]
            self._pending.update(seq.pending_hashes)
            self._queried_tokens += len(seq.token_ids)
            self._hit_tokens += seq.num_computed_tokens
        return True

    def try_extend(self, seq: CachedSequence) -> bool:
        """Makes room for the KV of the last token of `seq`; False: no block is free."""
        if len(seq.block_table) * self.block_size >= len(seq.token_ids):
            return True
        fresh = self.pool.allocate(1)
        if fresh is None:
            return False
        seq.block_table += fresh
        return True

    def commit(self, seq: CachedSequence) -> None:
        """Names the blocks that `num_computed_tokens` has filled."""
        num_full = seq.num_computed_tokens // self.block_size
        if num_full <= seq.num_committed_blocks:
            return
        if self._enable_prefix_cache:
            self._name_blocks(seq)
            for i in range(seq.num_committed_blocks, num_full):
                block_hash = seq.block_hashes[i]
                self.pool.commit(seq.block_table[i], block_hash)
            self._end_promises(seq, num_full)
        seq.num_committed_blocks = num_full

    def try_fork(
        self, parent: CachedSequence, child: CachedSequence
    ) -> list[tuple[int, int]] | None:
        """Gives `child`, a copy of `parent`'s computed tokens and one of its own, its blocks.

        Full blocks are shared. Returns the blocks to copy as (source, target) before either
        sequence runs again, or None if no block was free and nothing changed.
        """
        num_full, rest = divmod(parent.num_computed_tokens, self.block_size)
        fresh = self.pool.allocate(1) if rest else []
        if fresh is None:
            return None
        shared = parent.block_table[:num_full]
        for block_id in shared:
            self.pool.acquire((block_id,))
        child.block_table = shared + fresh
        child.block_hashes = parent.block_hashes[:num_full]
        child.num_committed_blocks = num_full
        child.num_computed_tokens = parent.num_computed_tokens
        return [(parent.block_table[num_full], fresh[0])] if rest else []

    def free(self, seq: CachedSequence) -> None:
        """Gives all blocks of `seq` back, and its promises up."""
        self.pool.release(seq.block_table)
        seq.block_table = []
        seq.num_committed_blocks = 0
        seq.num_computed_tokens = 0
        seq.num_written_tokens = 0
        self._pending.difference_update(seq.pending_hashes)
        seq.pending_hashes = []

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(self._queried_tokens, self._hit_tokens)

    def check_invariants(self, sequences: list[CachedSequence]) -> None:
        """`sequences`: all that hold blocks or promises."""
        self.pool.check_invariants()
        references: dict[int, int] = {}
        for seq in sequences:
            for block_id in seq.block_table:
                references[block_id] = references.get(block_id, 0) + 1
            assert seq.num_computed_tokens <= len(seq.block_table) * self.block_size
        self.pool.check_references(references)
        promised = [h for seq in sequences for h in seq.pending_hashes]
        assert len(promised) == len(set(promised))
        assert set(promised) == self._pending

    def _name_blocks(self, seq: CachedSequence) -> None:
        """Extends `seq.block_hashes` to all full blocks of its tokens."""
        named = len(seq.block_hashes)
        if len(seq.token_ids) // self.block_size > named:
            parent = seq.block_hashes[-1] if named else self._root_of(seq.salt)
            seq.block_hashes += hash_blocks(
                parent, seq.token_ids, self.block_size, named * self.block_size
            )

    def _root_of(self, salt: str) -> BlockHash:
        root = self._roots.get(salt)
        if root is None:
            if len(self._roots) >= 1024:
                self._roots.clear()
            root = self._roots[salt] = self._root.hash(salt)
        return root

    def _end_promises(self, seq: CachedSequence, num_full: int) -> None:
        if seq.pending_hashes:
            committed = set(seq.block_hashes[:num_full])
            self._pending.difference_update(committed.intersection(seq.pending_hashes))
            seq.pending_hashes = [h for h in seq.pending_hashes if h not in committed]
