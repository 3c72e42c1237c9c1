"""What the scheduler sees of the cache: match a prefix, reserve blocks, commit them, free them.

The life of a sequence's blocks:

    match          which leading blocks are cached, on the device and below; changes nothing
    try_admit      takes those on the device, and reserves a block for every other token that is
                   known, or nothing; begins to load the blocks that are in lower tiers
    poll           once a step: sequences whose load has ended
    complete_load  what has arrived is named; the rest is computed
    try_extend     one more block when the next token needs it
    commit         blocks that have become full get their names and can be found by others
    free           everything goes back; named blocks stay in the cache until evicted

A prefix that a sequence is about to commit, by computing or loading it, is *pending*: whoever needs
it next waits for it instead of doing the same again. A promise ends with the commit, or with the
one who gave it.

When every full block of the prompt is cached and nothing is left over, one token has to run all
the same, to have logits to sample from: the last one, whose KV is there already and is not written
again (`Sequence.num_written_tokens`).

A load that has ended without some of its blocks may leave a transfer behind that still writes to
them. Such *busy* blocks keep their reference, and come back with a later `poll`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xllm.cache.block_hash import CacheRoot, hash_blocks
from xllm.cache.block_pool import BlockPool
from xllm.cache.kv_contract import CachedSequence, LowerTiers
from xllm.cache.prefetch import Prefetcher, PrefetchOutcome
from xllm.cache.tier import TierName
from xllm.protocol import BlockHash, FetchRange

if TYPE_CHECKING:
    from xllm.cache.loads import BlockSource, LoadTicket


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The unbroken cached prefix of a sequence; valid until the pool changes."""

    block_ids: list[int]
    """On the device."""
    num_tokens: int
    """In those blocks."""
    is_pending: bool
    """The block after the prefix is being computed or loaded by somebody else."""
    sources: list[BlockSource] = field(default_factory=list)
    """Where the blocks that follow those on the device are."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counters since the start, in tokens."""

    queried_tokens: int
    hit_tokens_by_tier: dict[TierName, int]

    @property
    def hit_tokens(self) -> int:
        return sum(self.hit_tokens_by_tier.values())


class KVCache:
    """Blocks of one engine. Synchronous, for the engine's thread alone."""

    def __init__(
        self,
        pool: BlockPool,
        root: CacheRoot,
        *,
        enable_prefix_cache: bool = True,
        tiers: LowerTiers | None = None,
    ) -> None:
        self.pool = pool
        self.block_size = root.block_size
        self._root = root
        self._enable_prefix_cache = enable_prefix_cache
        self._tiers = tiers
        self.on_used: Callable[[list[BlockHash]], None] = lambda chain: None
        """Called with the blocks that an admitted prompt found, if it found any."""
        if tiers is not None:
            pool.on_evict = tiers.evicted
        self._roots: dict[str, BlockHash] = {}
        self._pending: set[BlockHash] = set()
        self._loading: dict[LoadTicket, CachedSequence] = {}
        self._busy: set[int] = set()
        self._prefetcher: Prefetcher | None = None
        if tiers is not None and enable_prefix_cache:
            self._prefetcher = Prefetcher(pool, tiers, self._pending)
        self._queried_tokens = 0
        self._hit_tokens: dict[TierName, int] = {}

    @property
    def next_deadline(self) -> float | None:
        """When `poll` has to be called although no transfer has ended, by `time.monotonic`."""
        return None if self._tiers is None else self._tiers.next_deadline

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, seq: CachedSequence, block_compute_s: float | None = None) -> PrefixMatch:
        """How much of `seq` is cached now. Names its full blocks; changes no block.

        `block_compute_s`: what computing one block takes; a tier slower than that is not read.
        """
        if not (self._enable_prefix_cache and seq.uses_prefix_cache):
            return PrefixMatch([], 0, False)
        self._name_blocks(seq)
        block_ids: list[int] = []
        for block_hash in seq.block_hashes:
            block_id = self.pool.lookup(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        first = len(block_ids)
        rest = seq.block_hashes[first:]
        num_known = len(rest)
        if self._pending:
            num_known = next((i for i, h in enumerate(rest) if h in self._pending), num_known)
        sources: list[BlockSource] = []
        if num_known and self._tiers is not None:
            sources = self._tiers.match(rest[:num_known], block_compute_s, seq.fetch, first)
        is_pending = len(sources) == num_known < len(rest)
        return PrefixMatch(block_ids, first * self.block_size, is_pending, sources)

    def expected_blocks(self, seq: CachedSequence, limit: int) -> int:
        """How many leading blocks a waiting `seq` will not compute itself, as far as that can be
        told from `limit` of them: they are in a tier, or promised. Changes no block."""
        if not (self._enable_prefix_cache and seq.uses_prefix_cache):
            return 0
        self._name_blocks(seq)
        names = seq.block_hashes[:limit]
        for index, name in enumerate(names):
            is_known = self.pool.lookup(name) is not None or name in self._pending
            if is_known:
                continue
            if self._tiers is None or not self._tiers.match([name], None, seq.fetch, index):
                return index
        return len(names)

    def try_admit(
        self,
        seq: CachedSequence,
        match: PrefixMatch,
        num_spare_blocks: int = 0,
        load_timeout_s: float = 0.0,
    ) -> bool:
        """Reserves blocks for all of `seq`'s tokens, the matched ones shared; False: too few.

        `num_spare_blocks` have to stay free besides. On success `seq` continues at
        `num_computed_tokens`, unless it has a `load`: then not before `complete_load`.
        """
        assert not seq.block_table
        num_matched = len(match.block_ids)
        self.pool.acquire(match.block_ids)
        num_new = self.blocks_for(len(seq.token_ids)) - num_matched
        if num_new + num_spare_blocks > self.pool.num_free:
            self.pool.release(match.block_ids)
            return False
        fresh = self.pool.allocate(num_new)
        assert fresh is not None
        self.pool.observe_reuse(match.block_ids)
        seq.block_table = match.block_ids + fresh
        seq.num_committed_blocks = num_matched
        self._begin_after(seq, num_matched)
        seq.cached_by_tier = {TierName.DEVICE: seq.num_computed_tokens}
        if not (self._enable_prefix_cache and seq.uses_prefix_cache):
            return True
        seq.pending_hashes = [h for h in seq.block_hashes[num_matched:] if h not in self._pending]
        self._pending.update(seq.pending_hashes)
        self._queried_tokens += len(seq.token_ids)
        self._count_hit(TierName.DEVICE, seq.num_computed_tokens)
        if found := seq.block_hashes[: num_matched + len(match.sources)]:
            self.on_used(found)
        if self._tiers is not None:
            self._tiers.used(found)
            if match.sources:
                self._start_load(self._tiers, seq, match, load_timeout_s)
        return True

    def poll(self) -> list[CachedSequence]:
        """Sequences whose load has ended: `complete_load` is next for each."""
        if self._tiers is None:
            return []
        done: list[CachedSequence] = []
        for ticket in self._tiers.poll():
            seq = self._loading.pop(ticket, None)
            if seq is not None:
                done.append(seq)
            elif self._prefetcher is not None:
                self._busy |= self._prefetcher.end(ticket)
        for block_id in self._tiers.take_returned_blocks():
            self._busy.remove(block_id)
            self.pool.release([block_id])
        return done

    def prefetch(
        self,
        hashes: Seq[BlockHash],
        fetch: Seq[FetchRange],
        timeout_s: float,
        on_end: Callable[[PrefetchOutcome], None],
    ) -> None:
        """Brings a chain here from peers ahead of requests: see `prefetch.py`."""
        if self._prefetcher is None:
            on_end(PrefetchOutcome(0, 0))
        else:
            self._prefetcher.start(hashes, fetch, timeout_s, on_end)

    def cancel_prefetches(self) -> None:
        """They end with what has arrived by now."""
        if self._prefetcher is not None:
            self._busy |= self._prefetcher.cancel()

    def complete_load(self, seq: CachedSequence) -> bool:
        """`seq` goes on after the blocks that have arrived; False: there is no block to put in the
        place of a busy one, and it has to be freed."""
        ticket = seq.load
        assert ticket is not None
        assert self._tiers is not None
        busy = set(ticket.busy_block_ids)
        instead = self.pool.allocate(len(busy))
        if instead is None:
            return False
        seq.load = None
        seq.loads += ticket.spans
        self._busy |= busy
        seq.block_table = [instead.pop() if b in busy else b for b in seq.block_table]
        for tier in ticket.tiers:
            self._commit_block(seq, seq.num_committed_blocks)
            seq.num_committed_blocks += 1
            computed_before = seq.num_computed_tokens
            self._begin_after(seq, seq.num_committed_blocks)
            gained = seq.num_computed_tokens - computed_before
            seq.cached_by_tier[tier] = seq.cached_by_tier.get(tier, 0) + gained
            self._count_hit(tier, gained)
        self._end_promises(seq, seq.num_committed_blocks)
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
                self._commit_block(seq, i)
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
        """Gives all blocks of `seq` back, but for busy ones, and its promises up."""
        block_ids = seq.block_table
        if seq.load is not None:
            assert self._tiers is not None
            self._tiers.cancel(seq.load)
            self._loading.pop(seq.load, None)
            busy = set(seq.load.busy_block_ids)
            self._busy |= busy
            block_ids = [b for b in block_ids if b not in busy]
            seq.load = None
        self.pool.release(block_ids)
        seq.block_table = []
        seq.num_committed_blocks = 0
        seq.num_computed_tokens = 0
        seq.num_written_tokens = 0
        self._pending.difference_update(seq.pending_hashes)
        seq.pending_hashes = []

    def clear(self) -> int:
        """Forgets all cached blocks of the device; returns how many there were."""
        if self._tiers is not None:
            self._tiers.cleared()
        return self.pool.clear()

    def name_prompt(self, token_ids: Seq[int], salt: str) -> list[BlockHash]:
        """Of its full blocks."""
        return hash_blocks(self._root_of(salt), token_ids, self.block_size)

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(self._queried_tokens, dict(self._hit_tokens))

    def check_invariants(self, sequences: list[CachedSequence]) -> None:
        """`sequences`: all that hold blocks or promises."""
        self.pool.check_invariants()
        assert set(self._loading.values()) <= {s for s in sequences if s.load is not None}
        references: dict[int, int] = dict.fromkeys(self._busy, 1)
        lent = [] if self._tiers is None else self._tiers.lent_block_ids
        fetched = [] if self._prefetcher is None else self._prefetcher.block_ids
        for block_id in (*self.pool.held_block_ids, *lent, *fetched):
            references[block_id] = references.get(block_id, 0) + 1
        for seq in sequences:
            for block_id in seq.block_table:
                references[block_id] = references.get(block_id, 0) + 1
            assert seq.num_computed_tokens <= len(seq.block_table) * self.block_size
        self.pool.check_references(references)
        promised = [h for seq in sequences for h in seq.pending_hashes]
        promised += [] if self._prefetcher is None else self._prefetcher.pending_hashes
        assert len(promised) == len(set(promised))
        assert set(promised) == self._pending

    def _count_hit(self, tier: TierName, num_tokens: int) -> None:
        self._hit_tokens[tier] = self._hit_tokens.get(tier, 0) + num_tokens

    def _begin_after(self, seq: CachedSequence, num_blocks: int) -> None:
        """`seq` has so many leading blocks from the cache."""
        seq.num_written_tokens = num_blocks * self.block_size
        seq.num_computed_tokens = min(seq.num_written_tokens, len(seq.token_ids) - 1)

    def _start_load(
        self, tiers: LowerTiers, seq: CachedSequence, match: PrefixMatch, timeout_s: float
    ) -> None:
        start = len(match.block_ids)
        stop = start + len(match.sources)
        blocks = zip(
            *(seq.block_hashes[start:stop], match.sources, seq.block_table[start:stop]), strict=True
        )
        seq.load = tiers.start_load(list(blocks), timeout_s, seq.trace)
        self._loading[seq.load] = seq

    def _commit_block(self, seq: CachedSequence, index: int) -> None:
        block_id, block_hash = seq.block_table[index], seq.block_hashes[index]
        if self.pool.commit(block_id, block_hash) and self._tiers is not None:
            parent = seq.block_hashes[index - 1] if index else None
            self._tiers.committed(block_hash, parent, block_id)

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
