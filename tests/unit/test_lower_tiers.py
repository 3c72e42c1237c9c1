"""How large the tiers below the device are, and what is said when they do not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from xllm.config import EngineConfig
from xllm.engine.lower_tiers import MemoryPlan, plan_memory
from xllm.errors import ConfigError

MIB = 1 << 20


def plan(device: str = "cpu", **config: object) -> MemoryPlan:
    runner = SimpleNamespace(
        config=EngineConfig(**config),  # type: ignore[arg-type]
        device=torch.device(device),
        block_bytes=MIB,
        num_blocks=100,
    )
    return plan_memory(runner)  # type: ignore[arg-type]


def test_a_cpu_has_no_host_tier_unless_asked_for() -> None:
    assert plan() == MemoryPlan(100 * MIB, 0, 0, 0)
    assert plan(host_blocks_factor=1.5).host_slots == 150
    assert plan(host_cache_size=7 * MIB + 1).host_slots == 7


def test_a_gpu_has_memory_of_its_own_and_two_host_blocks_for_each_of_its() -> None:
    assert plan("cuda") == MemoryPlan(0, 200, 200 * MIB, 0)
    assert plan("cuda", host_blocks_factor=0.0).host_slots == 0
    assert plan("cuda", enable_prefix_cache=False).host_slots == 0


def test_a_host_tier_of_no_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not hold one block of 1048576"):
        plan(host_cache_size=1000)


def test_what_does_not_fit_together_is_refused_with_figures() -> None:
    wanted = plan(host_blocks_factor=2.0, disk_cache_dir="/d", disk_cache_size=MIB)
    wanted.check(332 * MIB)
    with pytest.raises(ConfigError, match=r"0\.32 GiB.*0\.10 GiB device.*0\.20 GiB host.*0\.30"):
        wanted.check(310 * MIB)
