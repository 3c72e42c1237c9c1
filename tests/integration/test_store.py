"""Engines over a real pool on Mooncake Store: its tokens are the same, and what fails is a miss."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.golden.fixtures import load_golden_prompts
from tests.golden.matrix import CHUNKED, run_prompts
from tests.golden.tiny_models import prompt_ids
from tests.integration.etcd_server import EtcdServer
from tests.missing import skip_or_fail
from tests.mooncake_pool import MooncakePool, why_not
from xllm.cache.store_client import GET_NICENESS
from xllm.cache.store_object import key_of
from xllm.cache.store_process import StoreAddress, StoreAgent
from xllm.cache.store_tier import StoreTier
from xllm.cache.threads import LOWEST_PRIORITY
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory
from xllm.engine.runner import Runner
from xllm.errors import RequestError
from xllm.protocol import GenerateRequest, SamplingParams, TokenDelta
from xllm.roles.cache_port import look_up

VOCAB = 320
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4
CONFIG = EngineConfig(
    device="cpu",
    dtype="float32",
    num_threads=1,
    block_size=16,
    max_cache_size=60 * BLOCK_BYTES,
    max_model_len=300,
    prefetch_timeout=20_000,
)
PROMPT = prompt_ids(200, VOCAB)
NUM_CACHED = 192


@pytest.fixture(scope="module")
def needs_store() -> None:
    """Skips where it cannot be had, but not in CI."""
    reason = why_not()
    if reason is not None:
        skip_or_fail(reason)


@pytest.fixture(scope="module")
def pool(needs_store: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakePool]:
    pool = MooncakePool(tmp_path_factory.mktemp("pool"), 256 << 20)
    try:
        pool.start()
        yield pool
    finally:
        pool.close()


@pytest.fixture
def own_pool(needs_store: None, tmp_path: Path) -> Iterator[MooncakePool]:
    """For a test that does something to it."""
    pool = MooncakePool(tmp_path, 64 << 20)
    try:
        pool.start()
        yield pool
    finally:
        pool.close()


class Worker:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def store(self) -> StoreTier:
        assert self.engine.tiers is not None
        assert self.engine.tiers.store is not None
        return self.engine.tiers.store

    @property
    def agent(self) -> StoreAgent | None:
        return self.store._client._agent

    async def generate(self, prompt: list[int], salt: str = "") -> tuple[list[int], dict[str, int]]:
        """Greedy tokens, and cached tokens by tier."""
        deltas: asyncio.Queue[TokenDelta | RequestError] = asyncio.Queue()
        sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        request = GenerateRequest(
            request_id="r", model_id="", prompt_ids=prompt, sampling=sampling, salt=salt
        )
        self.engine.submit(request, deltas.put_nowait)
        tokens: list[int] = []
        cached: dict[str, int] = {}
        while True:
            delta = await asyncio.wait_for(deltas.get(), 60)
            if isinstance(delta, RequestError):
                raise delta
            tokens += delta.token_ids
            cached = cached or delta.cached_tokens_by_tier
            if delta.finish_reason is not None:
                return tokens, {tier: n for tier, n in cached.items() if n}

    async def clear_device(self) -> None:
        await self.engine.call(lambda: self.engine.cache_admin.clear(TierName.DEVICE))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not await self.engine.call(condition):  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.005)

    async def attached(self) -> None:
        await self.until(lambda: self.store.is_attached)

    async def detached(self) -> None:
        await self.until(lambda: not self.store.is_attached)

    async def until_stored(self, prompt: list[int]) -> None:
        """A store that has just come back may have no room yet."""
        async with asyncio.timeout(90):
            while True:
                await self.clear_device()
                before = self.store.counters.num_stored
                _, cached = await self.generate(prompt)
                await self.settle()
                num_stored = self.store.counters.num_stored - before
                if num_stored * 16 + cached.get("remote", 0) == NUM_CACHED:
                    return
                await asyncio.sleep(0.1)

    async def settle(self) -> None:
        tiers = self.engine.tiers
        assert tiers is not None
        await self.until(lambda: tiers.is_idle)
        await self.engine.call(tiers.check_invariants)


@asynccontextmanager
async def working(
    folder: Path, store: StoreAddress, config: EngineConfig = CONFIG
) -> AsyncIterator[Worker]:
    runner = await asyncio.to_thread(Runner, config, folder)
    engine = await asyncio.to_thread(Engine, runner, LowerTiersFactory(runner, store=store))
    await engine.start()
    try:
        yield Worker(engine)
    finally:
        await engine.stop()


async def put_and_load(worker: Worker) -> list[int]:
    """The prompt's tokens, computed and then from the store alone."""
    await worker.attached()
    cold, _ = await worker.generate(PROMPT)
    await worker.settle()
    await worker.clear_device()
    assert await worker.generate(PROMPT) == (cold, {"remote": NUM_CACHED})
    return cold


async def test_blocks_outlive_their_workers(pool: MooncakePool, tiny_llama: Path) -> None:
    async with working(tiny_llama, pool.store) as first:
        await first.attached()
        cold, cached = await first.generate(PROMPT)
        assert cached == {}
        await first.settle()
        assert first.store.counters.num_stored == 12
        await first.clear_device()
        assert await first.generate(PROMPT) == (cold, {"remote": NUM_CACHED})
    async with working(tiny_llama, pool.store) as second:
        await second.attached()
        assert await second.generate(PROMPT) == (cold, {"remote": NUM_CACHED})
        assert second.store.counters.num_asks == 1
        assert await second.generate(PROMPT) == (cold, {"device": NUM_CACHED})


async def test_a_block_is_asked_for_by_its_name_and_salt(
    pool: MooncakePool, tiny_llama: Path
) -> None:
    async with working(tiny_llama, pool.store) as worker:
        await worker.attached()
        cold, _ = await worker.generate(PROMPT, salt="a")
        await worker.settle()
        await worker.clear_device()
        assert await worker.generate(PROMPT, salt="b") == (cold, {})
        assert await worker.generate(PROMPT, salt="a") == (cold, {"remote": NUM_CACHED})


async def test_damaged_and_evicted_objects_are_misses(pool: MooncakePool, tiny_llama: Path) -> None:
    prompt = prompt_ids(200, VOCAB, seed=1)
    async with working(tiny_llama, pool.store) as worker:
        await worker.attached()
        cold, _ = await worker.generate(prompt)
        await worker.settle()
        names = await worker.engine.call(lambda: worker.engine.kv_cache.name_prompt(prompt, ""))
        keys = [key_of(worker.store.prefix, name) for name in names]
        await asyncio.to_thread(tamper, pool, {keys[3]: "flip", keys[6]: "shorten"}, [keys[9]])
        await worker.clear_device()
        # All twelve were stored by this worker, which therefore does not ask again.
        found = await worker.generate(prompt)
        assert found == (cold, {"remote": 3 * 16})
        counters = worker.store.counters
        assert (counters.num_corrupt, counters.num_absent) == (2, 1)
        # Damaged ones were removed and put again.
        await worker.settle()
        await worker.clear_device()
        assert await worker.generate(prompt) == (cold, {"remote": NUM_CACHED})
        assert counters.num_corrupt == 2


async def test_clear_and_lookup(pool: MooncakePool, tiny_llama: Path) -> None:
    async with working(tiny_llama, pool.store) as worker:
        await worker.attached()
        engine = worker.engine
        cold, _ = await worker.generate(PROMPT)
        await worker.settle()
        await worker.clear_device()
        names = await engine.call(lambda: engine.kv_cache.name_prompt(PROMPT, ""))
        async with working(tiny_llama, pool.store) as other:
            await other.attached()
            found = await look_up(other.engine, names)
            assert found.held_by_tier == {TierName.DEVICE: 0, TierName.REMOTE: NUM_CACHED}
            await other.engine.call(lambda: other.engine.cache_admin.clear(TierName.REMOTE))
            await other.until(lambda: other.store.is_idle)

            async def is_empty() -> bool:
                await other.engine.call(other.store.book.clear)
                return (await look_up(other.engine, names)).num_matched == 0

            async with asyncio.timeout(60):
                while not await is_empty():  # noqa: ASYNC110 - polled
                    await asyncio.sleep(0.01)
        # The first one still believes in its blocks: that costs computing them.
        assert await worker.generate(PROMPT) == (cold, {})


async def test_a_master_that_dies_costs_misses_until_it_is_back(
    own_pool: MooncakePool, tiny_llama: Path
) -> None:
    async with working(tiny_llama, own_pool.store) as worker:
        await worker.attached()
        cold, _ = await worker.generate(PROMPT)
        await worker.settle()
        own_pool.kill("master")
        for seed in range(100):  # nobody notices before somebody asks
            if not worker.store.is_attached:
                break
            await worker.clear_device()
            assert (await worker.generate(PROMPT, salt=str(seed)))[0] == cold
        await worker.detached()
        await worker.clear_device()
        assert await worker.generate(PROMPT) == (cold, {})
        assert worker.store.statistics().num_detachments >= 1
        own_pool.start_master()
        await worker.attached()
        own_pool.kill("memory")  # whose segment the new master knows only after a while
        own_pool.start_memory()
        await worker.until_stored(PROMPT)
        await worker.clear_device()
        assert await worker.generate(PROMPT) == (cold, {"remote": NUM_CACHED})


async def test_a_frozen_master_holds_up_nobody(own_pool: MooncakePool, tiny_llama: Path) -> None:
    async with working(tiny_llama, own_pool.store) as worker:
        await worker.attached()
        cold, _ = await worker.generate(PROMPT)
        await worker.settle()
        own_pool.freeze("master")
        try:
            for salt in "abcd":  # the first one waits for an answer, the next ones do not
                assert await worker.generate(PROMPT, salt) == (cold, {})
            assert worker.store.counters.num_asks - worker.store.counters.num_unanswered == 1
        finally:
            own_pool.thaw("master")
        await worker.attached()
        await worker.until_stored(PROMPT)
        await worker.clear_device()
        assert await worker.generate(PROMPT) == (cold, {"remote": NUM_CACHED})


async def test_a_full_pool_takes_no_more(
    tmp_path: Path, needs_store: None, tiny_llama: Path
) -> None:
    pool = MooncakePool(tmp_path)
    try:
        pool.start_master()  # and nobody who lends memory
        async with working(tiny_llama, pool.store) as worker:
            await worker.attached()
            cold, _ = await worker.generate(PROMPT)
            await worker.settle()
            await worker.clear_device()
            assert await worker.generate(PROMPT) == (cold, {})
            await worker.settle()
            assert worker.store.counters.num_full == 24
            assert worker.store.is_attached
    finally:
        pool.close()


async def test_an_agent_that_is_killed_comes_back(pool: MooncakePool, tiny_llama: Path) -> None:
    async with working(tiny_llama, pool.store) as worker:
        await worker.attached()
        cold, _ = await worker.generate(PROMPT)
        await worker.settle()
        agent = worker.agent
        assert agent is not None
        agent.kill()
        await worker.clear_device()
        assert (await worker.generate(PROMPT))[0] == cold
        await worker.until(lambda: worker.agent not in (None, agent) and worker.store.is_attached)
        await worker.clear_device()
        assert await worker.generate(PROMPT) == (cold, {"remote": NUM_CACHED})


async def test_who_polls_for_the_end_of_a_get_steps_back(
    pool: MooncakePool, tiny_llama: Path
) -> None:
    async with working(tiny_llama, pool.store) as worker:
        await worker.attached()
        assert worker.agent is not None
        tasks = Path(f"/proc/{worker.agent._process.pid}/task")

        def niceness() -> list[int]:
            threads = [int(task.name) for task in tasks.iterdir()]
            return sorted(os.getpriority(os.PRIO_PROCESS, thread) for thread in threads)

        mine = os.getpriority(os.PRIO_PROCESS, 0)
        lanes = [mine, GET_NICENESS, GET_NICENESS, LOWEST_PRIORITY]
        await worker.until(lambda: niceness()[-4:] == lanes)


async def test_a_store_that_cannot_be_had_is_a_miss(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = MooncakePool(tmp_path)
    async with working(tiny_llama, nobody.store) as worker:
        cold, cached = await worker.generate(PROMPT)
        assert cached == {}
        await worker.until(lambda: worker.store.statistics().num_detachments > 0)
        assert await worker.generate(PROMPT) == (cold, {"device": NUM_CACHED})
        await worker.settle()
    assert any("store_detached" in record.message for record in caplog.records)


async def test_a_package_that_cannot_be_loaded_is_a_miss(
    tmp_path: Path,
    tiny_llama: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libibverbs.so.1: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as master:
        address = f"127.0.0.1:{master.getsockname()[1]}"
        store = replace(MooncakePool(tmp_path).store, master_server_address=address)
        async with working(tiny_llama, store) as worker:
            await worker.until(lambda: worker.store.statistics().num_detachments > 0)
            cold, cached = await worker.generate(PROMPT)
            assert cached == {}
            assert await worker.generate(PROMPT) == (cold, {"device": NUM_CACHED})
    assert "libibverbs.so.1" in caplog.text


async def test_a_worker_lends_memory_to_the_pool(
    tmp_path: Path, needs_store: None, tiny_llama: Path
) -> None:
    pool = MooncakePool(tmp_path)
    try:
        pool.start_master()
        async with working(tiny_llama, replace(pool.store, segment_size=32 << 20)) as lender:
            await lender.attached()
            async with working(tiny_llama, pool.store) as worker:
                cold = await put_and_load(worker)
            assert await lender.generate(PROMPT) == (cold, {"remote": NUM_CACHED})
    finally:
        pool.close()


async def test_members_find_one_another_through_etcd(
    tmp_path: Path, needs_store: None, tiny_llama: Path, etcd: EtcdServer
) -> None:
    pool = MooncakePool(tmp_path, 64 << 20, metadata_server=f"etcd://{etcd.address}")
    try:
        pool.start()
        async with working(tiny_llama, pool.store) as worker:
            await put_and_load(worker)
    finally:
        pool.close()


async def test_a_copy_outlives_a_member_of_the_pool(
    tmp_path: Path, needs_store: None, tiny_llama: Path
) -> None:
    pool = MooncakePool(tmp_path, 64 << 20, "-client_ttl=2")
    try:
        pool.start()
        pool.start_memory("more")
        async with working(tiny_llama, replace(pool.store, replica_num=2)) as worker:
            await worker.attached()
            cold, _ = await worker.generate(PROMPT)
            await worker.settle()
            pool.kill("memory")
            # Only time tells the store's master: `client_ttl`, and a second until it looks.
            await asyncio.sleep(3)
            await worker.clear_device()
            assert await worker.generate(PROMPT) == (cold, {"remote": NUM_CACHED})
    finally:
        pool.close()


def tamper(pool: MooncakePool, changes: dict[str, str], removed: list[str]) -> None:
    """Does to objects what only somebody else than a worker does."""
    code = f"""
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 1 << 24, "tcp", "", {pool.address!r}) == 0
for key, change in {changes!r}.items():
    value = bytearray(store.get(key))
    assert len(value) == {BLOCK_BYTES} + 64
    if change == "flip":
        value[1000] ^= 4
    else:
        del value[-16:]
    assert store.remove(key, True) == 0
    assert store.put(key, bytes(value)) == 0
for key in {removed!r}:
    assert store.remove(key, True) == 0
import os
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


GOLDEN_LENGTHS = (33, 150, 640)


@pytest.mark.timeout(300)
async def test_the_oracles_tokens_from_the_store(
    pool: MooncakePool, default_model_folder: Path, tmp_path: Path
) -> None:
    """The default model, in two engines one after the other: the second has nothing but the store,
    and a disk on which nothing is."""
    by_length = {len(prompt.prompt_ids): prompt for prompt in load_golden_prompts()}
    prompts = [by_length[length] for length in GOLDEN_LENGTHS]
    num_full = sum(length // 32 * 32 for length in GOLDEN_LENGTHS)
    for turn, num_cached in enumerate((0, num_full)):
        config = replace(
            CHUNKED,
            max_cache_size=256 << 20,
            max_model_len=1024,
            prefetch_timeout=60_000,
            disk_cache_dir=str(tmp_path / str(turn)),
            disk_cache_size=128 << 20,
        )
        async with working(default_model_folder, pool.store, config) as worker:
            await worker.attached()
            outcomes = await run_prompts(worker.engine, prompts, 16, together=True, salt="")
            assert [p.mismatch(o.output_ids) for p, o in zip(prompts, outcomes, strict=True)] == [
                None
            ] * len(prompts)
            hits = worker.engine.statistics().hit_tokens_by_tier
            assert hits.get(TierName.REMOTE, 0) >= num_cached - len(prompts)
            assert worker.store.counters.num_corrupt == 0
            await worker.settle()
