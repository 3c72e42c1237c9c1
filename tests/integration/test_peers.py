"""Workers that fetch blocks of each other: real engines, real sockets, and peers that fail."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.golden.tiny_models import prompt_ids
from xllm.cache.lender import LendCounters, Lender
from xllm.cache.news import CacheNews
from xllm.cache.peer_client import PeerLimits
from xllm.cache.peer_server import PeerServer
from xllm.cache.peer_wire import (
    FETCH_HEADER_BYTES,
    LENGTH_BYTES,
    PEER_PROTOCOL_VERSION,
    Goodbye,
    PeerLayout,
    Welcome,
    decode_fetch_header,
    encode_handshake,
    encode_hit,
    encode_miss,
    handshake_bytes,
)
from xllm.cache.prefetch import PrefetchOutcome
from xllm.cache.slab_format import checksum_of
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory, peer_layout
from xllm.engine.runner import Runner
from xllm.errors import NoWorker, RequestError
from xllm.protocol import FetchRange, GenerateRequest, SamplingParams, TokenDelta, WorkerId

VOCAB = 320
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4
"""Of the tiny llama, at 16 tokens a block in float32."""

CONFIG = EngineConfig(
    device="cpu",
    dtype="float32",
    num_threads=1,
    block_size=16,
    max_cache_size=60 * BLOCK_BYTES,
    max_model_len=300,
    prefetch_timeout=20_000,
)
NONE_SERVED = {TierName.DEVICE: 0, TierName.HOST: 0, TierName.DISK: 0}
A, B = WorkerId("a"), WorkerId("b")


class Worker:
    """An engine that serves peers."""

    def __init__(self, engine: Engine, server: PeerServer, address: str) -> None:
        self.engine = engine
        self.server = server
        self.address = address

    async def generate(
        self, prompt: list[int], *, fetch: list[FetchRange] | None = None, salt: str = ""
    ) -> tuple[list[int], dict[str, int]]:
        """Greedy tokens, and cached tokens by tier."""
        deltas: asyncio.Queue[TokenDelta | RequestError] = asyncio.Queue()
        sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        request = GenerateRequest(
            request_id="r",
            model_id="",
            prompt_ids=prompt,
            sampling=sampling,
            salt=salt,
            fetch=fetch or [],
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

    def holds(self, prompt: list[int], worker_id: WorkerId = A) -> list[FetchRange]:
        return [FetchRange(worker_id, self.address, 0, len(prompt) // 16)]

    async def clear(self, *tiers: TierName) -> None:
        for tier in tiers:
            await self.engine.call(lambda tier=tier: self.engine.cache_admin.clear(tier))  # type: ignore[misc]

    @property
    def lender(self) -> Lender:
        assert self.engine.tiers is not None
        assert self.engine.tiers.lender is not None
        return self.engine.tiers.lender

    async def lent(self) -> LendCounters:
        """When all has been given back: a peer has its blocks a moment before that."""
        async with asyncio.timeout(10):
            while await self.engine.call(lambda: self.lender.num_loans):  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.002)
        return await self.engine.call(self.lender.snapshot)

    async def settle(self) -> None:
        tiers = self.engine.tiers
        assert tiers is not None
        async with asyncio.timeout(60):
            while not await self.engine.call(lambda: tiers.is_idle):  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(
    config: EngineConfig,
    folder: Path,
    worker_id: WorkerId = A,
    limits: PeerLimits | None = None,
) -> AsyncIterator[Worker]:
    runner = await asyncio.to_thread(Runner, config, folder)
    factory = LowerTiersFactory(runner, peer_id=worker_id, peer_limits=limits)
    engine = await asyncio.to_thread(Engine, runner, factory)
    await engine.start()
    assert engine.tiers is not None
    assert engine.tiers.lender is not None
    layout = peer_layout(runner, engine.root)
    lender, books = engine.tiers.lender, engine.books
    server = PeerServer(worker_id, layout, lender, books, is_busy=lambda: engine.is_busy)
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    server.start(listening)
    try:
        yield Worker(engine, server, address)
    finally:
        await asyncio.to_thread(server.close)
        await engine.stop()


@pytest.mark.parametrize("tier", [TierName.DEVICE, TierName.HOST, TierName.DISK])
async def test_the_tokens_are_the_same_from_every_tier_of_a_peer(
    tiny_llama: Path, tmp_path: Path, tier: TierName
) -> None:
    config = CONFIG
    if tier is not TierName.DEVICE:
        config = replace(
            config,
            host_cache_size=1 << 20,
            disk_cache_dir=str(tmp_path / "disk"),
            disk_cache_size=2 << 20,
            disk_write_policy="write_through",
        )
    prompt = prompt_ids(250, VOCAB)
    async with running(config, tiny_llama) as a, running(CONFIG, tiny_llama, B) as b:
        expected, _ = await a.generate(prompt)
        if tier is not TierName.DEVICE:
            await a.settle()
            above = [TierName.DEVICE, TierName.HOST][: 1 if tier is TierName.HOST else 2]
            await a.clear(*above)
        assert await b.generate(prompt, fetch=a.holds(prompt)) == (expected, {"remote": 240})
        assert await b.generate(prompt) == (expected, {"device": 240})
        assert await a.lent() == LendCounters({**NONE_SERVED, tier: 15}, 0)
        assert await b.generate(prompt, salt="other", fetch=a.holds(prompt)) == (expected, {})
        assert await a.lent() == LendCounters({**NONE_SERVED, tier: 15}, 15)


async def test_blocks_that_are_given_back_to_an_idle_engine_are_not_reported_as_used(
    tiny_llama: Path,
) -> None:
    prompt = prompt_ids(250, VOCAB)
    async with running(CONFIG, tiny_llama) as a:
        await a.generate(prompt)
        names = a.engine.kv_cache.name_prompt(prompt, "")
        loan = await a.engine.call(lambda: a.lender.lend(names[: a.lender.max_blocks]))
        async with asyncio.timeout(30):
            while not a.engine.statistics().num_used_blocks:  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.002)
            a.engine.books.submit(lambda: a.lender.end(loan))
            while a.engine.statistics().num_used_blocks:  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.002)


PROMPT = prompt_ids(250, VOCAB, seed=3)
NUM_FULL = 15
QUICK = PeerLimits(connect_s=0.5, stall_s=0.3, check_s=0.02, grace_s=0.05)


class FakePeer:
    """Answers as a script says, with blocks that a real worker has computed."""

    def __init__(self, layout: PeerLayout, blocks: list[bytes]) -> None:
        self.layout = layout
        self.blocks = blocks
        self.script = ""
        self.num_connections = 0
        self.address = ""
        self.release = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.script == "silent":
            await reader.read()
            return
        length = handshake_bytes(await reader.readexactly(LENGTH_BYTES))
        await reader.readexactly(length)
        handshakes = {
            "garbage": b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "long handshake": b"\xff\xff\xff\x7f",
            "refusal": encode_handshake(Goodbye("no")),
            "another worker": encode_handshake(Welcome(PEER_PROTOCOL_VERSION, WorkerId("c"))),
            "another version": encode_handshake(Welcome(99, A)),
        }
        welcome = encode_handshake(Welcome(PEER_PROTOCOL_VERSION, A))
        writer.write(handshakes.get(self.script, welcome))
        if self.script in handshakes:
            await reader.read()
            return
        while True:
            header = await reader.readexactly(FETCH_HEADER_BYTES)
            fetch_id, count, _ = decode_fetch_header(header)
            await reader.readexactly(16 * count)
            for index in range(count):
                await self._send(writer, fetch_id, index)

    async def _send(self, writer: asyncio.StreamWriter, fetch_id: int, index: int) -> None:
        block = self.blocks[index]
        checksum = checksum_of(np.frombuffer(block, dtype=np.uint8))
        header = encode_hit(fetch_id, index, len(block), checksum)
        if index == 7:
            match self.script:
                case "dies":
                    writer.write(header + block[:100])
                    await writer.drain()
                    raise ConnectionError
                case "truncated header":
                    writer.write(header[:20])
                    await writer.drain()
                    raise ConnectionError
                case "flipped bit":
                    block = bytes([block[0] ^ 1]) + block[1:]
                case "wrong order":
                    header = encode_hit(fetch_id, 8, len(block), checksum)
                case "too long":
                    header = encode_hit(fetch_id, index, 1 << 31, checksum)
                case "miss":
                    writer.write(encode_miss(fetch_id, index))
                    return
                case "stalls":
                    writer.write(header + block[:100])
                    await self.release.wait()
        if self.script == "slow":
            await asyncio.sleep(0.04)
        writer.write(header + block)


@asynccontextmanager
async def fake_peer(layout: PeerLayout, blocks: list[bytes]) -> AsyncIterator[FakePeer]:
    peer = FakePeer(layout, blocks)
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    peer.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield peer
    finally:
        peer.release.set()
        server.close()


async def blocks_of(worker: Worker, prompt: list[int]) -> list[bytes]:
    """Computes the prompt, and returns the bytes of its full blocks."""
    await worker.generate(prompt)
    cache, tiers = worker.engine.kv_cache, worker.engine.tiers
    assert tiers is not None
    device = tiers._device

    def read() -> list[bytes]:
        block_ids = [cache.pool.lookup(name) for name in cache.name_prompt(prompt, "")]
        return [bytes(device.view(b)) for b in block_ids if b is not None]  # type: ignore[arg-type]

    return await worker.engine.call(read)


async def check_nothing_is_left(worker: Worker) -> None:
    cache, tiers = worker.engine.kv_cache, worker.engine.tiers
    assert tiers is not None
    await worker.settle()
    await worker.clear(TierName.DEVICE)

    def check() -> int:
        cache.poll()
        cache.check_invariants([])
        tiers.check_invariants()
        return cache.pool.num_free

    assert await worker.engine.call(check) == cache.pool.num_blocks
    assert worker.engine.statistics().num_faults == 0


FAILURES = {
    **dict.fromkeys(("silent", "garbage", "long handshake", "refusal"), 0),
    **dict.fromkeys(("another worker", "another version"), 0),
    **dict.fromkeys(("dies", "truncated header", "flipped bit", "wrong order"), 7),
    **dict.fromkeys(("too long", "miss", "stalls"), 7),
}
"""By script: how many blocks arrive all the same."""


async def test_a_peer_that_fails_costs_the_blocks_it_has_not_sent(tiny_llama: Path) -> None:
    async with (
        running(CONFIG, tiny_llama) as a,
        running(CONFIG, tiny_llama, B, QUICK) as b,
    ):
        expected, _ = await a.generate(PROMPT)
        blocks = await blocks_of(a, PROMPT)
        assert len(blocks) == NUM_FULL
        tiers = b.engine.tiers
        assert tiers is not None
        assert tiers.peers is not None
        for script, num_arrived in FAILURES.items():
            async with fake_peer(a.server.layout, blocks) as peer:
                peer.script = script
                before = tiers.statistics()
                hint = [FetchRange(A, peer.address, 0, NUM_FULL)]
                cached = {"remote": 16 * num_arrived} if num_arrived else {}
                assert await b.generate(PROMPT, fetch=hint) == (expected, cached), script
                after = tiers.statistics()
                assert before.peers is not None
                assert after.peers is not None
                is_failure = script != "miss"
                assert after.peers.num_failures - before.peers.num_failures == is_failure, script
                is_corrupt = script == "flipped bit"
                assert after.peers.num_corrupt - before.peers.num_corrupt == is_corrupt, script
                assert after.loads.num_timeouts == before.loads.num_timeouts, script
                await check_nothing_is_left(b)
                if is_failure:
                    assert after.num_peers_avoided >= 1
                    assert await b.generate(PROMPT, fetch=hint) == (expected, {})
                    assert peer.num_connections == 1, "a peer that has failed is not asked"
                    await b.clear(TierName.DEVICE)


async def test_nobody_there_is_a_peer_that_fails(tiny_llama: Path) -> None:
    async with running(CONFIG, tiny_llama, B, QUICK) as b:
        expected, _ = await b.generate(PROMPT)
        await b.clear(TierName.DEVICE)
        with socket.create_server(("127.0.0.1", 0)) as bound:
            port = bound.getsockname()[1]
        for address in (f"127.0.0.1:{port}", "nonsense", "no.such.host.invalid:1"):
            hint = [FetchRange(A, address, 0, NUM_FULL)]
            assert await b.generate(PROMPT, fetch=hint) == (expected, {})
            await check_nothing_is_left(b)


async def test_a_slow_peer_is_not_waited_for_beyond_the_deadline(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xllm.cache.load_runs.MAX_FETCH_BLOCKS", 2)
    config = replace(CONFIG, prefetch_timeout=250)
    limits = replace(QUICK, window_bytes=5 * BLOCK_BYTES, stall_s=5.0)
    async with running(CONFIG, tiny_llama) as a, running(config, tiny_llama, B, limits) as b:
        expected, _ = await a.generate(PROMPT)
        blocks = await blocks_of(a, PROMPT)
        async with fake_peer(a.server.layout, blocks) as peer:
            peer.script = "slow"
            peer.blocks = blocks
            hint = [FetchRange(A, peer.address, 0, NUM_FULL)]
            # Each fetch begins with its own block 0: only the first one's are what they should be.
            tokens, cached = await b.generate(PROMPT, fetch=[hint[0]])
            assert tokens == expected or cached["remote"] > 32
            assert 0 < cached["remote"] < 16 * NUM_FULL
            statistics = b.engine.tiers.statistics()  # type: ignore[union-attr]
            assert statistics.loads.num_timeouts == 1
            await check_nothing_is_left(b)


async def test_two_models_that_differ_in_one_weight_never_meet(
    tiny_llama: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    async with running(CONFIG, tiny_llama) as a, running(CONFIG, other, B, QUICK) as b:
        await a.generate(PROMPT)
        expected, _ = await b.generate(PROMPT)
        await b.clear(TierName.DEVICE)
        assert await b.generate(PROMPT, fetch=a.holds(PROMPT)) == (expected, {})
        assert await a.lent() == LendCounters(NONE_SERVED, 0), "refused at the handshake"
        # And if it were not: the names differ from the first block on.
        ours = b.engine.kv_cache.name_prompt(PROMPT, "")
        loan = await a.engine.call(lambda: a.lender.lend(ours[:3]))
        assert loan.blocks == [None] * 3
        await a.engine.call(lambda: a.lender.end(loan))


async def test_a_block_is_fetched_once_however_many_want_it(tiny_llama: Path) -> None:
    async with running(CONFIG, tiny_llama) as a, running(CONFIG, tiny_llama, B) as b:
        expected, _ = await a.generate(PROMPT)
        hint = a.holds(PROMPT)
        names = b.engine.kv_cache.name_prompt(PROMPT, "")
        served = await asyncio.gather(
            b.engine.prefetch(names, hint),
            *(b.generate(PROMPT, fetch=hint) for _ in range(3)),
            b.engine.prefetch(names, hint),
        )
        assert [tokens for tokens, _ in served[1:4]] == [expected] * 3
        assert [cached for _, cached in served[1:4]] == [{"device": 240}] * 3
        assert served[0] == PrefetchOutcome(NUM_FULL, NUM_FULL)
        assert served[4] == PrefetchOutcome(NUM_FULL, 0)
        assert (await a.lent()).served[TierName.DEVICE] == NUM_FULL
        await check_nothing_is_left(b)


async def test_a_prefetch_ends_with_what_could_be_had(tiny_llama: Path) -> None:
    async with running(CONFIG, tiny_llama) as a, running(CONFIG, tiny_llama, B, QUICK) as b:
        await a.generate(PROMPT)
        names = b.engine.kv_cache.name_prompt(PROMPT, "")
        assert await b.engine.prefetch(names, []) == PrefetchOutcome(0, 0)
        part = [FetchRange(A, a.address, 0, 5)]
        assert await b.engine.prefetch(names, part) == PrefetchOutcome(5, 5)
        assert await b.engine.prefetch(names, a.holds(PROMPT)) == PrefetchOutcome(15, 10)
        await b.clear(TierName.DEVICE)
        async with fake_peer(a.server.layout, []) as peer:
            peer.script = "refusal"
            hint = [FetchRange(A, peer.address, 0, 15)]
            assert await b.engine.prefetch(names, hint) == PrefetchOutcome(0, 0)
        await check_nothing_is_left(b)
    with pytest.raises(NoWorker):
        await b.engine.prefetch(names, [])


async def test_fetched_blocks_go_down_to_the_local_tiers_and_are_news(
    tiny_llama: Path, tmp_path: Path
) -> None:
    config = replace(
        CONFIG,
        host_cache_size=1 << 20,
        disk_cache_dir=str(tmp_path / "disk"),
        disk_cache_size=2 << 20,
        disk_write_policy="write_through",
    )
    async with running(CONFIG, tiny_llama) as a, running(config, tiny_llama, B) as b:
        expected, _ = await a.generate(PROMPT)
        news: list[CacheNews] = []
        b.engine.cache_news.listener = news.append
        await b.generate(PROMPT, fetch=a.holds(PROMPT))
        await b.settle()
        names = set(b.engine.kv_cache.name_prompt(PROMPT, ""))
        told = [event.hash for item in news for _, events in item.changes for event in events]
        assert {name: told.count(name) for name in names} == dict.fromkeys(names, 3)
        for tier, above in ((TierName.HOST, 1), (TierName.DISK, 2)):
            await b.clear(*[TierName.DEVICE, TierName.HOST][:above])
            assert await b.generate(PROMPT) == (expected, {tier.value: 240})


async def test_a_salt_separates_tenants_across_workers(tiny_llama: Path) -> None:
    async with running(CONFIG, tiny_llama) as a, running(CONFIG, tiny_llama, B) as b:
        expected, _ = await a.generate(PROMPT, salt="a secret")
        for salt in ("", "another secret"):
            assert await b.generate(PROMPT, salt=salt, fetch=a.holds(PROMPT)) == (expected, {})
        cached = {"remote": 240}
        assert await b.generate(PROMPT, salt="a secret", fetch=a.holds(PROMPT)) == (
            expected,
            cached,
        )
