"""The default model against `transformers` when blocks come from peers; the rest of it is in
`scripts/golden peers`, and 131,072 tokens from a peer in `test_tier_engine.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.golden.fixtures import (
    NUM_TINY_TOKENS,
    GoldenPrompt,
    load_fixture,
    load_golden_prompts,
)
from tests.golden.matrix import CHUNKED
from tests.golden.peers_matrix import from_every_tier, from_one_that_is_killed
from tests.golden.tiny_models import prompt_ids
from xllm.config import EngineConfig

pytestmark = pytest.mark.timeout(600)  # a model's worth of work, on whatever machine

NUM_TOKENS = 8
CONFIG = replace(
    CHUNKED,
    max_cache_size=128 << 20,
    max_model_len=1024,
    # Small steps: a quick start.
    max_tokens_per_chunk_for_prefill=100,
    max_tokens_per_batch=128,
)


async def test_from_a_peers_device_host_and_disk(
    default_model_folder: Path, tmp_path: Path
) -> None:
    prompts = [p for p in load_golden_prompts() if len(p.prompt_ids) in (33, 333)]
    outcomes = await from_every_tier(
        *(CONFIG, default_model_folder, prompts, NUM_TOKENS, str(tmp_path)),
        together=True,
        host_bytes=64 << 20,
    )
    assert [outcome.problems for outcome in outcomes] == [[], [], []]
    assert [outcome.num_remote_tokens for outcome in outcomes] == [32 + 320] * 3


async def test_from_a_peer_that_is_killed_while_it_sends(tiny_llama: Path) -> None:
    entry = load_fixture("tiny_llama")["prompts"][-1]
    ids = prompt_ids(entry["length"], 320, entry["seed"])
    prompt = GoldenPrompt(ids, entry["output_ids"], entry["gaps"], 0.0)
    config = EngineConfig(
        **{"device": "cpu", "dtype": "float32", "num_threads": 1, "block_size": 16},
        **{"max_cache_size": 1 << 20, "max_model_len": 300},
    )
    outcome = await from_one_that_is_killed(config, tiny_llama, prompt, NUM_TINY_TOKENS, 0.6)
    assert outcome.problems == []
