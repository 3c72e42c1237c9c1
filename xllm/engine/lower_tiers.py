"""The tiers below one engine's device: how large they are, and their making.

On a CPU the device cache and the host tier are in the same memory, on a GPU the host tier alone is
in the machine's. Whatever is there is checked as a whole before anything is allocated: a tier that
does not fit ends the process with figures, not with a kill in the middle of the night.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from xllm.cache.block_hash import CacheRoot
from xllm.cache.block_pool import BlockObserver, BlockPool
from xllm.cache.disk_tier import DiskTier, DiskTierConfig, cache_directory
from xllm.cache.eviction import EvictionPolicyName
from xllm.cache.host_tier import HostMemoryBlocks, HostTier
from xllm.cache.lender import Lender
from xllm.cache.mover import Mover
from xllm.cache.peer_book import PeerBook
from xllm.cache.peer_client import PeerClient, PeerLimits
from xllm.cache.peer_wire import PeerLayout
from xllm.cache.peers import Peers
from xllm.cache.slab import OS_IO, VectorIO
from xllm.cache.slab_format import round_up
from xllm.cache.store_client import StoreClient, StoreSlots
from xllm.cache.store_process import StoreAddress
from xllm.cache.store_tier import StoreTier
from xllm.cache.store_transfers import STAGING_BYTES
from xllm.cache.stores import DiskWritePolicy
from xllm.cache.tier import TierName
from xllm.cache.tiers import Tiers
from xllm.config import EngineConfig
from xllm.engine.device_blocks import device_blocks
from xllm.engine.memory import available_memory_bytes
from xllm.engine.runner import Runner
from xllm.errors import ConfigError
from xllm.protocol import WorkerId
from xllm.security.trust import ANYBODY, Trust

logger = logging.getLogger(__name__)

DEFAULT_CUDA_HOST_BLOCKS_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of the machine's memory that the tiers take together; checked before they do."""

    device_bytes: int
    """0 where the device has memory of its own."""
    host_slots: int
    host_bytes: int
    staging_bytes: int
    store_bytes: int = 0
    """Of the shared store: buffers, and what is lent to its pool."""

    def check(self, available_bytes: int) -> None:
        """Raises: ConfigError if it is not there."""
        needed = self.device_bytes + self.host_bytes + self.staging_bytes + self.store_bytes
        if needed > available_bytes:
            store = f", {_gib(self.store_bytes)} shared store" if self.store_bytes else ""
            raise ConfigError(
                f"the cache needs {_gib(needed)} of memory ({_gib(self.device_bytes)} device, "
                f"{_gib(self.host_bytes)} host, {_gib(self.staging_bytes)} disk buffers{store}), "
                f"but {_gib(available_bytes)} are available; lower --max_cache_size, "
                "--host_cache_size or --host_blocks_factor"
                + (" or --store_segment_size" if self.store_bytes else "")
            )


def plan_memory(runner: Runner, store: StoreAddress | None = None) -> MemoryPlan:
    """What the tiers of `runner` will take, by its config. Raises: ConfigError."""
    config, block_bytes = runner.config, runner.block_bytes
    is_cuda = runner.device.type == "cuda"
    slot_bytes = round_up(block_bytes)
    if config.host_cache_size:
        host_slots = config.host_cache_size // slot_bytes
        if host_slots == 0:
            raise ConfigError(
                f"--host_cache_size={config.host_cache_size}: does not hold one block of "
                f"{slot_bytes} bytes"
            )
    else:
        factor = config.host_blocks_factor
        if factor is None:
            factor = DEFAULT_CUDA_HOST_BLOCKS_FACTOR if is_cuda else 0.0
        if not config.enable_prefix_cache:
            factor = 0.0
        host_slots = int(runner.num_blocks * factor)
    return MemoryPlan(
        device_bytes=0 if is_cuda else runner.num_blocks * block_bytes,
        host_slots=host_slots,
        host_bytes=host_slots * slot_bytes,
        staging_bytes=0 if config.disk_cache_dir is None else max(STAGING_BYTES, 2 * slot_bytes),
        store_bytes=(
            0 if store is None else StoreSlots(block_bytes).num_bytes + store.segment_size
        ),
    )


def check_memory(runner: Runner, store: StoreAddress | None = None) -> None:
    """Raises: ConfigError if the device cache and the tiers below it do not fit together."""
    plan_memory(runner, store).check(available_memory_bytes())


class LowerTiersFactory:
    """Makes the tiers once the pool is there, and the device cache is allocated."""

    def __init__(
        self,
        runner: Runner,
        observers: Mapping[TierName, BlockObserver] | None = None,
        io: VectorIO = OS_IO,
        peer_id: WorkerId | None = None,
        peer_limits: PeerLimits | None = None,
        peer_trust: Trust = ANYBODY,
        store: StoreAddress | None = None,
    ) -> None:
        """`peer_id`: what this worker calls itself to those it fetches from; None: it fetches from
        nobody, and lends nothing. `store`: the pool that it shares with others; None: none."""
        self._runner = runner
        self._observers = observers or {}
        self._io = io
        self._peer_id = peer_id if runner.config.enable_prefix_cache else None
        self._peer_limits = peer_limits
        self._peer_trust = peer_trust
        self._store = store if runner.config.enable_prefix_cache else None

    def __call__(
        self, pool: BlockPool, root: CacheRoot, on_ended: Callable[[], None]
    ) -> Tiers | None:
        """None: none is asked for. Blocks while memory is taken and the disk is scanned.

        `on_ended` is called on any thread when `Tiers.poll` has something to do, or nothing is lent
        any more.
        Raises: ConfigError.
        """
        config = self._runner.config
        host, disk = self._make_host(config), self._make_disk(config, root)
        has_lower = host is not None or disk is not None
        if not has_lower and self._peer_id is None and self._store is None:
            return None
        device = device_blocks(self._runner.cache, self._runner.native_library)
        if isinstance(device, HostMemoryBlocks):
            if has_lower:
                device.populate()
            else:
                device.populate_in_background()
        mover = Mover(on_ended=on_ended)
        peers = lender = None
        if self._peer_id is not None:
            layout = peer_layout(self._runner, root)
            client = PeerClient(
                *(self._peer_id, layout, device, mover, self._peer_limits), self._peer_trust
            )
            peers = Peers(client, PeerBook(time.monotonic))
            lender = Lender(pool, device, host, disk, on_idle=on_ended)
        store = None
        if self._store is not None:
            unsalted = root.hash("")
            store_client = StoreClient(self._store, unsalted, device, mover, on_ended)
            store = StoreTier(store_client, mover, time.monotonic)
        return Tiers(
            device,
            mover,
            host=host,
            disk=disk,
            disk_write_policy=DiskWritePolicy(config.disk_write_policy),
            clock=time.monotonic,
            cold_device_blocks=pool.coldest,
            peers=peers,
            lender=lender,
            store=store,
        )

    def _make_host(self, config: EngineConfig) -> HostTier | None:
        num_slots = plan_memory(self._runner).host_slots
        if num_slots == 0:
            return None
        tier = HostTier(
            num_slots,
            self._runner.block_bytes,
            eviction_policy=EvictionPolicyName(config.eviction_policy),
            clock=time.monotonic,
            observer=self._observers.get(TierName.HOST),
            pin_memory=self._runner.device.type == "cuda",
        )
        logger.info("host_tier_ready slots=%d bytes=%d", num_slots, num_slots * tier.slot_stride)
        return tier

    def _make_disk(self, config: EngineConfig, root: CacheRoot) -> DiskTier | None:
        if config.disk_cache_dir is None:
            return None
        unsalted = root.hash("")
        disk = DiskTierConfig(
            directory=cache_directory(Path(config.disk_cache_dir), unsalted),
            size_bytes=config.disk_cache_size,
            block_bytes=self._runner.block_bytes,
            root=unsalted,
            eviction_policy=EvictionPolicyName(config.eviction_policy),
        )
        observer = self._observers.get(TierName.DISK)
        return DiskTier(disk, clock=time.monotonic, observer=observer, io=self._io)


def peer_layout(runner: Runner, root: CacheRoot) -> PeerLayout:
    """What a peer must have in common with this engine."""
    return PeerLayout(
        root=root.hash(""),
        fingerprint=root.fingerprint,
        kv_dtype=root.kv_dtype,
        block_size=root.block_size,
        block_bytes=runner.block_bytes,
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
