"""Greedy tokens against the oracle's, from every tier, under every way to fill them."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.golden.fixtures import NUM_OUTPUT_TOKENS, load_golden_prompts
from tests.golden.matrix import CHUNKED, UNCHUNKED, run_prompts
from tests.mooncake_pool import MooncakePool
from xllm.cache.store_process import StoreAddress
from xllm.cache.stores import DiskWritePolicy
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory
from xllm.engine.runner import Runner

DEVICE, HOST, DISK = TierName.DEVICE, TierName.HOST, TierName.DISK


@dataclass(frozen=True)
class Stage:
    """The prompts once more, when these tiers have been cleared."""

    name: str
    cleared: tuple[TierName, ...]
    source: TierName | None
    """Where the blocks come from; None: they are computed."""


COLD = Stage("cold", (), None)
FROM_DEVICE = Stage("device", (), DEVICE)
FROM_HOST = Stage("host", (DEVICE,), HOST)
FROM_DISK = Stage("disk", (DEVICE, HOST), DISK)
RESTARTED = Stage("restart", (), DISK)


FROM_STORE = Stage("store", (DEVICE, HOST, DISK), TierName.REMOTE)
WIPED = Stage("wiped", (), TierName.REMOTE)


def run_store_matrix(model_folder: Path) -> int:
    """The same over a pool on Mooncake Store, also by engines whose disk is empty; the exit
    status."""
    return asyncio.run(_run_store(model_folder))


async def _run_store(model_folder: Path) -> int:
    num_wrong = 0
    for config, together in ((UNCHUNKED, False), (CHUNKED, True)):
        with tempfile.TemporaryDirectory(prefix="xllm-golden-") as directory:
            pool = MooncakePool(Path(directory), 4 << 30)
            try:
                await asyncio.to_thread(pool.start)
                for turn, stages in enumerate(([COLD, FROM_STORE], [WIPED, FROM_STORE])):
                    tiered = replace(
                        config,
                        disk_cache_dir=f"{directory}/{turn}",
                        disk_cache_size=2 << 30,
                        prefetch_timeout=600_000,
                    )
                    label = f"store  {'batched' if together else 'alone':7}"
                    async with _running(tiered, model_folder, pool.store) as engine:
                        for stage in stages:
                            num_wrong += await _check(engine, stage, label, together=together)
            finally:
                pool.close()
    print("golden store: " + ("identical" if num_wrong == 0 else f"{num_wrong} differences"))
    return 1 if num_wrong else 0


def run_tiers_matrix(model_folder: Path) -> int:
    """Prints a line per stage; the exit status."""
    return asyncio.run(_run(model_folder))


async def _run(model_folder: Path) -> int:
    num_wrong = 0
    for policy in DiskWritePolicy:
        for has_host in (True, False):
            stages = [COLD, FROM_DEVICE]
            if has_host:
                stages.append(FROM_HOST)
            if policy is not DiskWritePolicy.WRITE_BACK:  # it writes when it has to, or at the end
                stages.append(FROM_DISK)
            for config, together in ((UNCHUNKED, False), (CHUNKED, True)):
                with tempfile.TemporaryDirectory(prefix="xllm-golden-") as directory:
                    tiered = replace(
                        config,
                        host_cache_size=(1 << 30) * has_host,
                        disk_cache_dir=directory,
                        disk_cache_size=2 << 30,
                        disk_write_policy=policy.value,
                        prefetch_timeout=600_000,
                    )
                    label = (
                        f"{policy:24}  {'host + disk' if has_host else 'disk':11}  "
                        f"{'batched' if together else 'alone':7}"
                    )
                    for stages_of_process in (stages, [RESTARTED]):
                        async with _running(tiered, model_folder) as engine:
                            for stage in stages_of_process:
                                num_wrong += await _check(engine, stage, label, together=together)
    print("golden tiers: " + ("identical" if num_wrong == 0 else f"{num_wrong} differences"))
    return 1 if num_wrong else 0


async def _check(engine: Engine, stage: Stage, label: str, *, together: bool) -> int:
    """Runs one stage; how many prompts differ, or 1 if the blocks came from elsewhere."""
    prompts = load_golden_prompts()
    for tier in stage.cleared:
        await engine.call(lambda tier=tier: engine.cache_admin.clear(tier))
    before = engine.statistics().hit_tokens_by_tier
    started = time.monotonic()
    outcomes = await run_prompts(engine, prompts, NUM_OUTPUT_TOKENS, together=together, salt="")
    seconds = time.monotonic() - started
    await _settle(engine)
    after = engine.statistics().hit_tokens_by_tier
    wrong = [
        problem
        for prompt, outcome in zip(prompts, outcomes, strict=True)
        if (problem := prompt.mismatch(outcome.output_ids))
    ]
    hits = {tier: after.get(tier, 0) - before.get(tier, 0) for tier in after}
    num_full = sum(len(prompt.prompt_ids) // 32 * 32 for prompt in prompts)
    wanted = 0 if stage.source is None else num_full - 32 * len(prompts)
    came = sum(hits.values()) if stage.source is None else hits.get(stage.source, 0)
    is_from_there = came == 0 if stage.source is None else came >= wanted
    print(
        f"{label}  {stage.name:7}  {len(prompts) - len(wrong)}/{len(prompts)} as the oracle  "
        f"{came:6} tokens from there  {seconds:6.1f} s",
        flush=True,
    )
    for problem in wrong:
        print(f"    {problem}", flush=True)
    return len(wrong) + (not is_from_there)


@asynccontextmanager
async def _running(
    config: EngineConfig, model_folder: Path, store: StoreAddress | None = None
) -> AsyncIterator[Engine]:
    def make() -> Engine:
        runner = Runner(config, model_folder)
        return Engine(runner, LowerTiersFactory(runner, store=store))

    engine = await asyncio.to_thread(make)
    await engine.start()
    shared = None if engine.tiers is None else engine.tiers.store
    while shared is not None and not await engine.call(lambda: shared.is_attached):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield engine
    finally:
        await engine.stop()
        del engine
        gc.collect()  # gigabytes, in cycles: the next one takes as many


async def _settle(engine: Engine) -> None:
    tiers = engine.tiers
    assert tiers is not None
    while not await engine.call(lambda: tiers.is_idle):  # noqa: ASYNC110 - polled
        await asyncio.sleep(0.01)
