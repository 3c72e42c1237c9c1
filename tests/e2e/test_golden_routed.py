"""The oracle's tokens from a cluster under load, by way of two masters and blocks of peers."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import Launcher

from tests.golden.fixtures import load_golden_prompts
from tests.golden.routed_load import asks, run_load, start_cluster
from xllm.tokenizer import Tokenizer


@pytest.mark.timeout(600)
def test_the_oracles_tokens_while_one_worker_is_killed(
    launcher: Launcher, default_model_folder: Path
) -> None:
    prompts = [p for p in load_golden_prompts() if len(p.prompt_ids) in (64, 150, 333)]
    every = asks(prompts, num_salts=2, times=3)
    # Small steps: a quick start.
    flags = (
        *("--max_cache_size=128MiB", "--max_model_len=1024"),
        *("--max_tokens_per_batch=64", "--max_seqs_per_batch=16"),
    )
    masters, workers = start_cluster(launcher, 2, *flags)
    load = run_load(
        masters,  # type: ignore[arg-type]
        Tokenizer.from_folder(default_model_folder),
        every,
        num_tokens=8,
        num_clients=4,
        at={len(every) * 2 // 3: workers[0].kill},
    )
    assert load.problems == []
    assert load.num_answered == len(every)
    assert load.cached_by_tier.total() > 0
