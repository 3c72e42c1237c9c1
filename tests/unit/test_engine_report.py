"""What a worker says of its engine."""

from __future__ import annotations

from dataclasses import replace

from xllm.engine.statistics import EngineStatistics
from xllm.protocol import Epoch, TierUsage, Watermark
from xllm.roles.engine_report import EngineReport, status_line
from xllm.telemetry import Metrics

BEFORE = EngineStatistics(num_blocks=100, prompt_tokens=50, generated_tokens=10, num_steps=5)
NOW = EngineStatistics(
    num_blocks=100,
    num_used_blocks=25,
    num_running=3,
    num_waiting=2,
    prompt_tokens=250,
    generated_tokens=110,
    queried_tokens=400,
    hit_tokens=100,
    num_preemptions=1,
    num_steps=9,
)


class FakeEngine:
    def __init__(self) -> None:
        self.now = BEFORE

    def statistics(self) -> EngineStatistics:
        return self.now


def test_status_line() -> None:
    assert status_line(BEFORE, NOW, 10.0) == (
        "prompt_tokens_per_s=20 output_tokens_per_s=10 running=3 waiting=2 "
        "cache_usage=25% hit_rate=25%"
    )


def test_nothing_was_looked_up() -> None:
    assert status_line(NOW, replace(NOW, num_steps=10), 10.0).endswith("hit_rate=-")


def test_metrics_follow_the_engine_and_count_once() -> None:
    engine, metrics = FakeEngine(), Metrics()
    report = EngineReport(engine, metrics)
    report.collect()
    engine.now = NOW
    report.collect()
    report.collect()
    rendered = metrics.render().decode()
    for line in (
        "xllm_num_requests_running 3.0",
        "xllm_num_requests_waiting 2.0",
        "xllm_kv_cache_usage_perc 0.25",
        "xllm_kv_cache_blocks 100.0",
        "xllm_prompt_tokens_total 350.0",
        "xllm_generation_tokens_total 110.0",
        "xllm_prefix_cache_queries_total 400.0",
        "xllm_prefix_cache_hits_total 100.0",
        "xllm_num_preemptions_total 1.0",
    ):
        assert f"\n{line}\n" in rendered


def test_load() -> None:
    engine = FakeEngine()
    engine.now = NOW
    marks = {"m": Watermark(1, 5, 2)}
    load = EngineReport(engine, Metrics()).load(Epoch(7), marks)
    assert (load.epoch, load.running_requests_num, load.waiting_requests_num) == (7, 3, 2)
    assert load.gpu_cache_usage_perc == 0.25
    assert load.watermarks == marks
    assert load.tiers == {"device": TierUsage(25, 100)}
    assert load.eviction_age_s == {}
