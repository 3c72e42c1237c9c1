"""One worker of `scripts/bench pool`: as `peer_worker.py`, with a disk and a shared store.

MODEL_FOLDER DTYPE NAME DISK_FOLDER MASTER_ADDRESS
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.peer_worker import Worker, prompt_of, serve
from xllm.cache.store_object import key_of, object_bytes
from xllm.cache.store_process import StoreAddress
from xllm.cache.store_tier import StoreTier
from xllm.cache.tier import TierName
from xllm.main import SWITCH_INTERVAL_S


class PoolWorker(Worker):
    """What can be asked; each public coroutine is a command."""

    def __init__(self, folder: Path, dtype: str, name: str, disk: str, master: str) -> None:
        store = StoreAddress(
            protocol="tcp",
            master_server_address=master,
            metadata_server="P2PHANDSHAKE",
            local_hostname="127.0.0.1",
            segment_size=0,
            replica_num=1,
        )
        super().__init__(
            *(folder, dtype, name),
            disk_cache_dir=disk,
            disk_cache_size=1 << 30,
            disk_write_policy="write_through",
            store=store,
        )

    async def settle(self) -> None:
        """Until the store is there, and nothing is on its way down."""
        await self._bench.until(lambda: self._store.is_attached and self._bench.tiers.is_idle)

    async def clear_tiers(self, names: list[str]) -> None:
        for name in names:
            await self._engine.call(
                lambda name=name: self._engine.cache_admin.clear(TierName(name))
            )

    async def timed(self, seed: int, num_tokens: int) -> dict[str, Any]:
        """The seconds of a prompt, where its blocks came from, and how fast the store was."""
        before = self._store.statistics()
        served = await self._bench.ttft(prompt_of(seed, num_tokens))
        after = self._store.statistics()
        load_s = after.load_seconds - before.load_seconds
        return {
            "seconds": served.seconds,
            "by_tier": served.by_tier,
            "store_bytes_per_s": (after.load_bytes - before.load_bytes) / load_s if load_s else 0,
        }

    async def asked(self) -> dict[str, Any]:
        """How often the store was asked what it has, and what that took."""
        counters = self._store.counters
        return {"num_asks": counters.num_asks, "seconds": counters.ask_seconds}

    async def keys(self, seed: int, num_tokens: int) -> dict[str, Any]:
        """What the store's own client needs to load the same objects."""
        names = await self._engine.call(
            lambda: self._engine.kv_cache.name_prompt(prompt_of(seed, num_tokens), "")
        )
        keys = [key_of(self._store.prefix, name) for name in names]
        return {"keys": keys, "size": object_bytes(self._bench.block_bytes)}

    async def steps_beside_puts(self, num_steps: int) -> dict[str, Any]:
        """What decode steps take while every block of the device is put, again as soon as it is
        there; and bytes per second that were put."""
        before, started = self._store.counters.num_stored, time.perf_counter()
        steps = await self._bench.step_seconds_beside(num_steps, self._put_again)
        num_stored = self._store.counters.num_stored - before
        seconds = time.perf_counter() - started
        return {
            "steps": steps,
            "bytes_per_s": num_stored * self._bench.block_bytes / seconds,
        }

    def _put_again(self) -> None:
        if not self._bench.tiers.is_idle:
            return
        self._store.clear()
        pool = self._engine.kv_cache.pool
        for name in pool.coldest(pool.num_blocks):
            block_id = pool.lookup(name)
            assert block_id is not None
            self._bench.tiers.committed(name, None, block_id)

    @property
    def _store(self) -> StoreTier:
        store = self._bench.tiers.store
        assert store is not None
        return store


if __name__ == "__main__":
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as in a worker
    uvloop.run(serve(PoolWorker(Path(sys.argv[1]), *sys.argv[2:])))
    os._exit(0)
