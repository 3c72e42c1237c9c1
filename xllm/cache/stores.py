"""Which blocks go down to host, disk and the shared store, in the background: never waited for.

    committed ──> host      every block, as soon as it has its name
              ──> disk      as the write policy says:
                    write_through             every block
                    write_through_selective   a block that is used, or computed, a second time
                    write_back                a block that the tier above is about to evict
              ──> store     every block that is not known to be there, straight from the device:
                            its second use may be anywhere, so nobody here can wait for it, and
                            memory does not wear out

What is to be stored waits as a name in a bounded backlog; where its bytes are is looked up when the
mover has room. By then they may be gone, and the store is dropped. `store_transfers.py` does the
rest.

For the engine's thread.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable

from xllm.cache.disk_tier import Attachment, DiskTier
from xllm.cache.host_tier import DeviceBlocks, HostTier
from xllm.cache.mover import Mover
from xllm.cache.store_tier import StoreTier
from xllm.cache.store_transfers import BlockToStore, StoreCounters, StoreTransfers
from xllm.cache.tier import Lookup, SlotTable
from xllm.protocol import BlockHash

BATCH_BYTES = 4 << 20
"""Of one transfer."""

MAX_BACKLOG = 8192
"""Names that wait for one tier; one more is dropped."""

NUM_CLEAN_AHEAD = 32
"""Blocks next to be evicted that write_back keeps on disk already."""

Backlog = OrderedDict[BlockHash, BlockHash | None]
"""Names and their parents, oldest first."""


class DiskWritePolicy(enum.StrEnum):
    WRITE_THROUGH = "write_through"
    WRITE_THROUGH_SELECTIVE = "write_through_selective"
    WRITE_BACK = "write_back"


class Storer:
    """Backlogs, and what is on the device to fill them from."""

    def __init__(
        self,
        device: DeviceBlocks,
        mover: Mover,
        host: HostTier | None,
        disk: DiskTier | None,
        policy: DiskWritePolicy,
        cold_device_blocks: Callable[[int], list[BlockHash]],
        shared: StoreTier | None = None,
    ) -> None:
        """`cold_device_blocks(n)`: up to n names that the device evicts next, in that order.
        `shared`: the store of the cluster."""
        self._transfers = StoreTransfers(device, mover, host, disk, shared)
        self._shared = shared
        self._mover = mover
        self._host = host
        self._disk = disk
        self._policy = policy
        self._cold_device_blocks = cold_device_blocks
        self._batch = max(1, BATCH_BYTES // device.block_bytes)
        self._resident: dict[BlockHash, tuple[int, BlockHash | None]] = {}
        """On the device: block id and parent."""
        self._to_host: Backlog = OrderedDict()
        self._to_disk: Backlog = OrderedDict()
        self._to_shared: Backlog = OrderedDict()
        self._seen: OrderedDict[BlockHash, None] = OrderedDict()
        """Names committed before, and maybe gone since: as many as the disk has slots."""

    @property
    def counters(self) -> StoreCounters:
        return self._transfers.counters

    @property
    def is_idle(self) -> bool:
        """Nothing waits, and no transfer is under way."""
        is_wanted = self._to_host or self._to_disk or self._to_shared
        is_put = self._shared is None or self._shared.is_idle
        return not is_wanted and self._transfers.is_idle and is_put

    def committed(self, block_hash: BlockHash, parent: BlockHash | None, block_id: int) -> None:
        """A device block has got its name."""
        self._resident[block_hash] = (block_id, parent)
        self._want_in_host(block_hash, parent)
        self._want_in_shared(block_hash, parent)
        if self._policy is DiskWritePolicy.WRITE_THROUGH or (
            self._policy is DiskWritePolicy.WRITE_THROUGH_SELECTIVE and block_hash in self._seen
        ):
            self._want_on_disk(block_hash, parent)
        self._remember(block_hash)

    def used(self, chain: list[BlockHash]) -> None:
        """A request found these blocks cached, on the device or below; head first."""
        parent: BlockHash | None = None
        for block_hash in chain:
            if block_hash in self._resident:
                self._want_in_host(block_hash, parent)
                self._want_in_shared(block_hash, parent)
            if self._policy is DiskWritePolicy.WRITE_THROUGH_SELECTIVE:
                self._want_on_disk(block_hash, parent)
            parent = block_hash

    def evicted(self, block_hash: BlockHash, block_id: int) -> None:
        """A device block has lost its name and may be overwritten from now on."""
        self._resident.pop(block_hash, None)
        self._transfers.evicted(block_id)

    def cleared(self) -> None:
        """All device blocks have lost their names."""
        self._resident.clear()
        self._to_host.clear()
        self._to_disk.clear()
        self._to_shared.clear()
        self._seen.clear()
        self._transfers.cleared()

    def flush(self) -> None:
        """Wants on disk what write_back has kept from it so far: as much as it holds, the hottest
        first, since there may not be time for all."""
        disk = self._disk_table()
        if disk is None or self._policy is not DiskWritePolicy.WRITE_BACK:
            return
        parents = {name: parent for name, (_, parent) in self._resident.items()}
        hot_first = list(reversed(parents))
        if self._host is not None:
            table = self._host.table
            hot_first = table.cold_first(table.num_slots)[::-1] + hot_first
            parents |= {name: table.parent_of(name) for name in table.hashes()}
        for block_hash in dict.fromkeys(hot_first[: disk.num_slots]):
            self._want_on_disk(block_hash, parents[block_hash])

    def pump(self) -> None:
        """Starts what there is room for."""
        if self._policy is DiskWritePolicy.WRITE_BACK:
            self._clean_ahead()
        while self._to_host and self._mover.can_store:
            self._start_to_host()
        if self._shared is not None and not self._shared.is_attached:
            self._to_shared.clear()
        while self._to_shared and self._mover.can_store and self._start_to_shared():
            pass
        while self._to_disk and self._mover.can_store:
            attachment = None if self._disk is None else self._disk.attachment
            if attachment is None:
                self._to_disk.clear()
            elif not self._start_to_disk(attachment):
                break

    def check_invariants(self) -> None:
        self._transfers.check_invariants()
        backlogs = (self._to_host, self._to_disk, self._to_shared)
        assert max(map(len, backlogs)) <= MAX_BACKLOG

    def _want_in_host(self, block_hash: BlockHash, parent: BlockHash | None) -> None:
        if self._host is not None and self._host.table.lookup(block_hash) is Lookup.MISS:
            self._enqueue(self._to_host, block_hash, parent)

    def _want_on_disk(self, block_hash: BlockHash, parent: BlockHash | None) -> None:
        table = self._disk_table()
        if table is not None and table.lookup(block_hash) is Lookup.MISS:
            self._enqueue(self._to_disk, block_hash, parent)

    def _want_in_shared(self, block_hash: BlockHash, parent: BlockHash | None) -> None:
        shared = self._shared
        if shared is not None and shared.is_attached and not shared.has(block_hash):
            self._enqueue(self._to_shared, block_hash, parent)

    def _enqueue(self, backlog: Backlog, block_hash: BlockHash, parent: BlockHash | None) -> None:
        if block_hash in backlog:
            return
        if len(backlog) >= MAX_BACKLOG:
            self.counters.num_dropped += 1
            return
        backlog[block_hash] = parent

    def _disk_table(self) -> SlotTable | None:
        return None if self._disk is None else self._disk.table

    def _remember(self, block_hash: BlockHash) -> None:
        table = self._disk_table()
        if table is not None and self._policy is DiskWritePolicy.WRITE_THROUGH_SELECTIVE:
            self._seen[block_hash] = None
            if len(self._seen) > table.num_slots:
                self._seen.popitem(last=False)

    def _clean_ahead(self) -> None:
        """Queues what the tier above the disk would evict next, if it is about to."""
        if self._host is None:
            for block_hash in self._cold_device_blocks(NUM_CLEAN_AHEAD):
                resident = self._resident.get(block_hash)
                if resident is not None:
                    self._want_on_disk(block_hash, resident[1])
        elif self._host.table.num_free < NUM_CLEAN_AHEAD:
            table = self._host.table
            for block_hash in table.cold_first(NUM_CLEAN_AHEAD):
                self._want_on_disk(block_hash, table.parent_of(block_hash))

    def _start_to_host(self) -> None:
        assert self._host is not None
        table = self._host.table
        blocks = self._take(
            self._to_host, self._batch, lambda name: table.lookup(name) is not Lookup.MISS
        )
        if blocks:
            self._transfers.copy_to_host(blocks)

    def _start_to_shared(self) -> bool:
        """Starts one batch; False: there is no slot for one."""
        assert self._shared is not None
        room = min(self._batch, self._shared.num_free_slots)
        if room == 0:
            return False
        blocks = self._take(self._to_shared, room, self._shared.has)
        if blocks:
            self._transfers.copy_to_shared(blocks)
        return True

    def _start_to_disk(self, attachment: Attachment) -> bool:
        """Starts what fits into one batch from host and device each; False: nothing did.

        A block that is on its way to the host waits for that.
        """
        in_host: list[BlockToStore] = []
        on_device: list[BlockToStore] = []
        later: list[BlockToStore] = []
        max_staged = min(self._batch, self._transfers.num_free_staging)
        while self._to_disk and len(in_host) < self._batch and len(on_device) < max_staged:
            block = self._next(self._to_disk)
            if attachment.table.lookup(block.hash) is not Lookup.MISS:
                continue
            found = Lookup.MISS if self._host is None else self._host.table.lookup(block.hash)
            if found is Lookup.PENDING:
                later.append(block)
            elif found is Lookup.HIT:
                in_host.append(block)
            elif block.block_id is not None:
                on_device.append(block)
            else:
                self.counters.num_dropped += 1
        self._to_disk.update((block.hash, block.parent) for block in later)
        if in_host:
            self._transfers.write_to_disk(attachment, in_host)
        if on_device:
            self._transfers.copy_to_disk(attachment, on_device)
        return bool(in_host or on_device)

    def _take(
        self, backlog: Backlog, max_blocks: int, is_there: Callable[[BlockHash], bool]
    ) -> list[BlockToStore]:
        """The next ones that are on the device and not stored yet."""
        blocks: list[BlockToStore] = []
        while backlog and len(blocks) < max_blocks:
            block = self._next(backlog)
            if is_there(block.hash):
                continue
            if block.block_id is None:
                self.counters.num_dropped += 1
            else:
                blocks.append(block)
        return blocks

    def _next(self, backlog: Backlog) -> BlockToStore:
        block_hash, parent = backlog.popitem(last=False)
        resident = self._resident.get(block_hash)
        return BlockToStore(block_hash, parent, None if resident is None else resident[0])
