"""Greedy tokens against the oracle's when blocks come from peers: from each of a peer's tiers, from
one that is killed while it sends, and in a routed cluster under load."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tests.e2e.processes import launcher
from tests.golden.fixtures import NUM_OUTPUT_TOKENS, GoldenPrompt, load_golden_prompts
from tests.golden.matrix import CHUNKED, UNCHUNKED
from tests.golden.peer_process import killed_after, peer_process
from tests.golden.routed_load import asks, run_load, start_cluster
from tests.golden.tiny_models import TINY_MODELS, TinyModel, prompt_ids, write_model
from tests.peers import B, Worker, running
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.protocol import FetchRange
from xllm.tokenizer import Tokenizer

DEVICE, HOST, DISK = TierName.DEVICE, TierName.HOST, TierName.DISK
TIMEOUT_S = 300.0
LONG_PROMPT_TOKENS = 131_072


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of some prompts on one way."""

    way: str
    problems: list[str]
    num_remote_tokens: int
    """Taken from peers."""


def with_lower_tiers(config: EngineConfig, directory: str, host_bytes: int) -> EngineConfig:
    return replace(
        config,
        host_cache_size=host_bytes,
        disk_cache_dir=directory,
        disk_cache_size=2 * host_bytes,
        disk_write_policy="write_through",
        prefetch_timeout=600_000,
    )


async def from_every_tier(
    config: EngineConfig,
    folder: Path,
    prompts: Sequence[GoldenPrompt],
    num_tokens: int,
    directory: str,
    *,
    together: bool,
    host_bytes: int = 1 << 30,
) -> list[Outcome]:
    """One worker computes the prompts; another fetches them from its device, host and disk."""
    outcomes = []
    lending = with_lower_tiers(config, directory, host_bytes)
    fetching = replace(config, prefetch_timeout=600_000)
    async with running(lending, folder) as a, running(fetching, folder, B) as b:
        await _ask_all(a, prompts, num_tokens, together=together)
        await a.settle()
        # Lent is what is in host memory, if it is there: its checksum is known.
        for tier, cleared in ((HOST, (DEVICE,)), (DISK, (HOST,)), (DEVICE, (HOST, DISK))):
            if tier is DEVICE:
                await _ask_all(a, prompts, 1, together=together)
                await a.settle()
            await a.clear(*cleared)
            await b.clear(DEVICE)
            before = (await a.lent()).served
            hints = [a.holds(prompt.prompt_ids) for prompt in prompts]
            problems, remote = await _ask_all(b, prompts, num_tokens, hints, together=together)
            after = (await a.lent()).served
            if not after[tier] - before[tier] == sum(after.values()) - sum(before.values()) > 0:
                problems.append(f"blocks came from {after} after {before}, not from the {tier}")
            outcomes.append(Outcome(f"from a peer's {tier}", problems, remote))
    return outcomes


async def from_one_that_is_killed(
    config: EngineConfig,
    folder: Path,
    prompt: GoldenPrompt,
    num_tokens: int,
    share: float,
) -> Outcome:
    """`share` of the prompt's blocks, by bytes, arrive before the peer's process is killed."""
    prompt_tokens = len(prompt.prompt_ids)
    async with (
        peer_process(config, folder) as peer,
        running(replace(config, prefetch_timeout=600_000), folder, B) as b,
    ):
        await peer.compute([prompt.prompt_ids], 1)
        num_blocks = prompt_tokens // b.engine.root.block_size
        num_bytes = int(share * num_blocks * b.server.layout.block_bytes)
        async with killed_after(peer, num_bytes) as address:
            hint = [replace_address(hint, address) for hint in b.holds(prompt.prompt_ids)]
            problems, remote = await _ask_all(b, [prompt], num_tokens, [hint], together=False)
        if not peer.has_ended:
            problems.append("the peer was not killed")
        if not 0 < remote < num_blocks * b.engine.root.block_size:
            problems.append(f"{remote} tokens came from it, neither none nor all were expected")
        again, _ = await _ask_all(b, [prompt], num_tokens, together=False)
        problems += again
    return Outcome(f"from a peer killed at {share:.0%}", problems, remote)


def replace_address(hint: FetchRange, address: str) -> FetchRange:
    """As if A was there."""
    return FetchRange(hint.worker_id, address, hint.first, hint.count)


async def long_prompt(directory: Path) -> Outcome:
    """131,072 tokens of a tiny model, whose oracle is the worker that computed them."""
    changes = {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 132_000},
    }
    folder = write_model(directory / "model", TinyModel(TINY_MODELS["llama"].config | changes))
    block_bytes = 2 * 2 * 32 * 16 * 4
    config = EngineConfig(
        **{"device": "cpu", "dtype": "float32", "max_tokens_per_batch": 4096},
        max_cache_size=4200 * block_bytes,
        prefetch_timeout=600_000,
    )
    prompt = prompt_ids(LONG_PROMPT_TOKENS, 320)
    problems = []
    remote = 0
    async with running(config, folder) as a, running(config, folder, B) as b:
        cold, cached = await a.generate(prompt, timeout_s=TIMEOUT_S)
        tokens, cached = await b.generate(prompt, fetch=a.holds(prompt), timeout_s=TIMEOUT_S)
        remote = cached.get("remote", 0)
        if tokens != cold:
            problems.append(f"{tokens} instead of {cold}")
        if remote != LONG_PROMPT_TOKENS - 1:
            problems.append(f"cached tokens: {cached}")
    return Outcome(f"{LONG_PROMPT_TOKENS:,} tokens from a peer", problems, remote)


async def _ask_all(
    worker: Worker,
    prompts: Sequence[GoldenPrompt],
    num_tokens: int,
    hints: Sequence[Sequence[FetchRange]] | None = None,
    *,
    together: bool,
) -> tuple[list[str], int]:
    """What differs from the oracle, and the tokens that came from peers."""

    async def ask(prompt: GoldenPrompt, hint: Sequence[FetchRange]) -> tuple[str | None, int]:
        output_ids, cached = await worker.generate(
            prompt.prompt_ids, fetch=hint, max_tokens=num_tokens, timeout_s=TIMEOUT_S
        )
        return prompt.mismatch(output_ids), cached.get("remote", 0)

    hints = hints or [()] * len(prompts)
    pairs = list(zip(prompts, hints, strict=True))
    if together:
        answers = list(await asyncio.gather(*(ask(*pair) for pair in pairs)))
    else:
        answers = [await ask(*pair) for pair in pairs]
    problems = [problem for problem, _ in answers if problem is not None]
    return problems, sum(remote for _, remote in answers)


def run_peers_matrix(model_folder: Path) -> int:
    """Prints a line per way; the exit status."""
    outcomes = asyncio.run(_engines(model_folder))
    outcomes += _routed(model_folder)
    num_wrong = sum(len(outcome.problems) for outcome in outcomes)
    print("golden peers: " + ("identical" if num_wrong == 0 else f"{num_wrong} differences"))
    return 1 if num_wrong else 0


async def _engines(model_folder: Path) -> list[Outcome]:
    prompts = load_golden_prompts()
    every: list[Outcome] = []
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xllm-golden-")))
        for config, together in ((UNCHUNKED, False), (CHUNKED, True)):
            label = "batched" if together else "alone"
            started = time.monotonic()
            outcomes = await from_every_tier(
                *(config, model_folder, prompts, NUM_OUTPUT_TOKENS, str(directory / label)),
                together=together,
            )
            every += _show(label, outcomes, started)
        rng = random.Random(1)
        for prompt in prompts[-4:]:
            started = time.monotonic()
            outcome = await from_one_that_is_killed(
                UNCHUNKED, model_folder, prompt, NUM_OUTPUT_TOKENS, rng.uniform(0.05, 0.95)
            )
            every += _show("killed", [outcome], started)
        started = time.monotonic()
        every += _show("long", [await long_prompt(directory)], started)
    return every


def _routed(model_folder: Path) -> list[Outcome]:
    """Three workers; one is killed when half of the answers are there, and one more comes."""
    tokenizer = Tokenizer.from_folder(model_folder)
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="xllm-golden-") as folder,
        launcher(Path(folder)) as procs,
    ):
        flags = ("--max_cache_size=300MiB", "--host_cache_size=300MiB", "--max_model_len=4096")
        masters, workers = start_cluster(procs, 3, *flags)
        every = asks(load_golden_prompts(), num_salts=2, times=3)
        load = run_load(
            *(masters, tokenizer, every),
            num_tokens=16,
            num_clients=8,
            at={len(every) // 2: workers[0].kill},
        )
    outcome = Outcome("routed under load", load.problems, load.cached_by_tier["remote"])
    if not outcome.num_remote_tokens:
        outcome.problems.append(f"nothing came from peers: {dict(load.cached_by_tier)}")
    return _show("cluster", [outcome], started)


def _show(label: str, outcomes: list[Outcome], started: float) -> list[Outcome]:
    for outcome in outcomes:
        print(
            f"{label:8}  {outcome.way:34}  {len(outcome.problems)} differences  "
            f"{outcome.num_remote_tokens:7} tokens from peers  "
            f"{time.monotonic() - started:6.1f} s since the last start",
            flush=True,
        )
        for problem in outcome.problems:
            print(f"    {problem}", flush=True)
    return outcomes
