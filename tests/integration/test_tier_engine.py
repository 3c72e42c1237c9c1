"""An engine with a model over real tiers: under load, with a disk that fails in every way, and with
a prompt as long as they come. Whatever happens below, the tokens are the same."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests import peers
from tests.golden.tiny_models import TINY_MODELS, TinyModel, prompt_ids, write_model
from xllm.cache.slab import OS_IO, VectorIO
from xllm.cache.slab_format import checksum_of
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory
from xllm.engine.runner import Runner
from xllm.errors import RequestError
from xllm.protocol import BlockHash, GenerateRequest, SamplingParams, TokenDelta

VOCAB = 320
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4
"""Of the tiny llama, at 16 tokens a block in float32."""

CONFIG = EngineConfig(
    device="cpu",
    dtype="float32",
    num_threads=1,
    block_size=16,
    max_cache_size=40 * BLOCK_BYTES,
    max_model_len=300,
    disk_cache_size=2 << 20,
    disk_write_policy="write_through",
    prefetch_timeout=200,
)


class FaultyIO:
    """The system's calls, with a fault in some of them; which one can change at any time."""

    def __init__(self) -> None:
        self.fault = ""
        self.num_faults = 0
        self._rng = Random(0)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        fault = self._draw("slow", "short", "flip", "eio")
        if fault == "slow":
            time.sleep(0.3)
        elif fault == "eio":
            raise OSError(errno.EIO, "injected")
        elif fault == "short":
            return os.preadv(fd, buffers[:1], offset)
        num_bytes = os.preadv(fd, buffers, offset)
        if fault == "flip":
            target = buffers[0].cast("B")
            target[self._rng.randrange(min(len(target), BLOCK_BYTES))] ^= 1 << self._rng.randrange(
                8
            )
        return num_bytes

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        fault = self._draw("enospc", "eio", "short")
        if fault in ("enospc", "eio"):
            raise OSError(errno.ENOSPC if fault == "enospc" else errno.EIO, "injected")
        return os.pwritev(fd, buffers[:1] if fault == "short" else buffers, offset)

    def _draw(self, *possible: str) -> str:
        if self.fault in possible and self._rng.random() < 0.5:
            self.num_faults += 1
            return self.fault
        return ""


@asynccontextmanager
async def running(
    config: EngineConfig, folder: Path, io: VectorIO = OS_IO
) -> AsyncIterator[Engine]:
    runner = await asyncio.to_thread(Runner, config, folder)
    engine = await asyncio.to_thread(Engine, runner, LowerTiersFactory(runner, io=io))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def generate(
    engine: Engine, prompt: list[int], max_tokens: int = 6, salt: str = ""
) -> tuple[list[int], dict[str, int]]:
    """Greedy tokens, and cached tokens by tier."""
    deltas: asyncio.Queue[TokenDelta | RequestError] = asyncio.Queue()
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    request = GenerateRequest(
        request_id="r", model_id="", prompt_ids=prompt, sampling=sampling, salt=salt
    )
    engine.submit(request, deltas.put_nowait)
    tokens: list[int] = []
    cached: dict[str, int] = {}
    while True:
        delta = await deltas.get()
        if isinstance(delta, RequestError):
            raise delta
        tokens += delta.token_ids
        cached = cached or delta.cached_tokens_by_tier
        if delta.finish_reason is not None:
            return tokens, cached


async def settle(engine: Engine) -> None:
    assert engine.tiers is not None
    tiers = engine.tiers
    async with asyncio.timeout(60):
        while not await engine.call(lambda: tiers.is_idle):  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.005)


async def write_until_detached(engine: Engine) -> None:
    """A fault meets only every other transfer, so a turn may be over before one has failed."""
    assert engine.tiers is not None
    disk = engine.tiers.disk
    assert disk is not None
    for attempt in range(50):
        if await engine.call(lambda: disk.attachment is None):
            return
        await generate(engine, PROMPTS[0], salt=f"{disk.num_detachments} {attempt}")
        await settle(engine)
    pytest.fail("the disk fails, and nobody has noticed")


async def attach_again(engine: Engine) -> None:
    """Does not wait until the disk tier would try by itself."""
    assert engine.tiers is not None
    disk = engine.tiers.disk
    assert disk is not None
    async with asyncio.timeout(10):
        while await engine.call(lambda: disk.attachment is None):
            await engine.call(lambda: setattr(disk, "_retry_at", disk.retry_at and 0.0))
            await asyncio.sleep(0.005)


async def clear(engine: Engine, *tiers: TierName) -> None:
    for tier in tiers:
        await engine.call(lambda tier=tier: engine.cache_admin.clear(tier))  # type: ignore[misc]


PROMPTS = [prompt_ids(60 + 37 * i % 220, VOCAB, seed=i) for i in range(24)]
"""Together six times what the device holds."""


async def expected_tokens(folder: Path) -> list[list[int]]:
    async with running(replace(CONFIG, disk_cache_size=0), folder) as engine:
        return [(await generate(engine, prompt))[0] for prompt in PROMPTS]


async def test_nothing_but_time_changes_when_the_disk_fails(
    tiny_llama: Path, tmp_path: Path
) -> None:
    expected = await expected_tokens(tiny_llama)
    io = FaultyIO()
    config = replace(CONFIG, disk_cache_dir=str(tmp_path / "disk"))
    faults = ("", "slow", "short", "flip", "enospc", "eio", "removed", "")
    async with running(config, tiny_llama, io) as engine:
        num_disk_hits = 0
        for turn, fault in enumerate(faults):
            io.fault = fault
            if fault == "removed":
                shutil.rmtree(tmp_path / "disk")
            order = list(range(len(PROMPTS)))
            Random(turn).shuffle(order)
            served = await asyncio.gather(*(generate(engine, PROMPTS[i]) for i in order))
            assert [tokens for tokens, _ in served] == [expected[i] for i in order], fault
            num_disk_hits += sum(cached.get("disk", 0) for _, cached in served)
            await settle(engine)
            if fault in ("enospc", "eio", "removed"):
                await write_until_detached(engine)
            io.fault = ""
            await attach_again(engine)
        statistics = engine.statistics()
        assert statistics.num_faults == 0
        assert statistics.tiers is not None
        assert num_disk_hits > 1000
        assert io.num_faults > 20
        assert statistics.tiers.loads.num_corrupt > 0
        assert statistics.tiers.loads.num_timeouts > 0
        assert statistics.tiers.num_detachments >= 3
        await clear(engine, TierName.DEVICE)
        pool = engine.kv_cache.pool
        assert await engine.call(lambda: pool.num_free) == pool.num_blocks


async def test_bytes_come_back_as_they_were_committed(tiny_llama: Path, tmp_path: Path) -> None:
    """In bfloat16, where tokens may differ by rounding but bytes may not."""
    config = replace(
        CONFIG,
        dtype="bfloat16",
        host_cache_size=1 << 20,
        disk_cache_dir=str(tmp_path / "disk"),
        prefetch_timeout=60_000,
    )
    async with running(config, tiny_llama) as engine:
        watch = await engine.call(lambda: CommitWatch(engine))
        for turn in range(4):
            await asyncio.gather(*(generate(engine, p, salt=str(turn % 2)) for p in PROMPTS))
            await settle(engine)
            await clear(engine, *((TierName.DEVICE,), (TierName.DEVICE, TierName.HOST))[turn % 2])
            await asyncio.gather(*(generate(engine, p, salt=str(turn % 2)) for p in PROMPTS))
            await settle(engine)
        statistics = engine.statistics().tiers
        assert statistics is not None
        loaded = statistics.blocks_loaded
        assert min(loaded[TierName.HOST], loaded[TierName.DISK]) > 100
        assert watch.num_loaded == sum(loaded.values())
        assert watch.wrong == []


class CommitWatch:
    """Notes the bytes of every block when it is committed, computed or loaded."""

    def __init__(self, engine: Engine) -> None:
        cache, tiers = engine.kv_cache, engine.tiers
        assert tiers is not None
        self.num_loaded = 0
        self.wrong: list[BlockHash] = []
        self._computed: dict[BlockHash, set[bytes]] = {}
        self._is_loading = False
        device, committed, complete_load = tiers._device, tiers.committed, cache.complete_load

        def watch_commit(name: BlockHash, parent: BlockHash | None, block_id: int) -> None:
            view = device.view(block_id)
            assert view is not None
            self._note(name, checksum_of(view))
            committed(name, parent, block_id)

        def watch_load(seq: object) -> bool:
            self._is_loading = True
            try:
                return complete_load(seq)  # type: ignore[arg-type]
            finally:
                self._is_loading = False

        tiers.committed = watch_commit  # type: ignore[method-assign]
        cache.complete_load = watch_load  # type: ignore[method-assign]

    def _note(self, name: BlockHash, checksum: bytes) -> None:
        known = self._computed.setdefault(name, set())
        if not self._is_loading:
            known.add(checksum)
            return
        self.num_loaded += 1
        if checksum not in known:
            self.wrong.append(name)


async def test_an_engine_wakes_up_for_what_its_tiers_do(tiny_llama: Path, tmp_path: Path) -> None:
    """Idle but for a load: no poll finds its end, a wake-up does; and a stop flushes write_back."""
    config = replace(
        CONFIG,
        disk_cache_dir=str(tmp_path / "disk"),
        disk_write_policy="write_back",
        prefetch_timeout=60_000,
    )
    async with running(config, tiny_llama) as engine:
        tokens, _ = await generate(engine, PROMPTS[5])
        assert engine.statistics().tiers.blocks_stored[TierName.DISK] == 0  # type: ignore[union-attr]
    async with running(config, tiny_llama) as engine:
        before = threading.active_count()
        again, cached = await asyncio.wait_for(generate(engine, PROMPTS[5]), 10)
        assert threading.active_count() == before
        num_full = len(PROMPTS[5]) // 16 * 16
        assert (again, cached) == (tokens, {"device": 0, "disk": num_full})


async def test_calls_run_on_the_engines_thread_and_their_errors_come_back(
    tiny_llama: Path,
) -> None:
    def fail() -> None:
        raise ValueError("no")

    async with running(replace(CONFIG, disk_cache_size=0), tiny_llama) as engine:
        assert await engine.call(lambda: threading.current_thread().name) == "engine"
        with pytest.raises(ValueError, match="no"):
            await engine.call(fail)


@pytest.mark.timeout(300)
async def test_a_prompt_of_131072_tokens_passes_through_every_tier(tmp_path: Path) -> None:
    changes = {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 132_000},
    }
    model = TinyModel(TINY_MODELS["llama"].config | changes)
    folder = write_model(tmp_path / "model", model)
    block_bytes = 2 * 2 * 32 * 16 * 4
    config = EngineConfig(
        **{"device": "cpu", "dtype": "float32", "max_tokens_per_batch": 4096},
        **{"max_cache_size": 4200 * block_bytes, "host_cache_size": 4200 * block_bytes},
        **{"disk_cache_dir": str(tmp_path / "disk"), "disk_cache_size": 128 << 20},
        **{"disk_write_policy": "write_through", "prefetch_timeout": 60_000},
    )
    prompt = prompt_ids(131_072, VOCAB)
    async with peers.running(config, folder) as peer:
        engine = peer.engine
        cold, cached = await generate(engine, prompt)
        assert sum(cached.values()) == 0
        await settle(engine)
        for tier, above in (
            ("device", ()),
            ("host", (TierName.DEVICE,)),
            ("disk", (TierName.DEVICE, TierName.HOST)),
        ):
            await clear(engine, *above)
            tokens, cached = await generate(engine, prompt)
            assert (tokens, cached[tier]) == (cold, 131_071)
            await settle(engine)
        # And from there to a worker that has none of it.
        alone = replace(config, host_cache_size=0, disk_cache_dir=None, disk_cache_size=0)
        async with peers.running(alone, folder, peers.B) as other:
            fetch = peer.holds(prompt)
            tokens, cached = await other.generate(prompt, fetch=fetch, timeout_s=120)
            assert (tokens, cached["remote"]) == (cold, 131_071)
    async with running(config, folder) as engine:
        tokens, cached = await generate(engine, prompt)
        assert (tokens, cached["disk"]) == (cold, 131_071)
