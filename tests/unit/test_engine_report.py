"""What a worker says of its engine."""

from __future__ import annotations

from dataclasses import replace

from xllm.cache.loads import LoadSpan
from xllm.cache.tier import TierName
from xllm.engine.statistics import EngineStatistics
from xllm.engine.timeline import Timeline
from xllm.protocol import Epoch, GenerateRequest, SamplingParams, TierUsage, Watermark
from xllm.roles.engine_report import EngineReport, StepMetrics, status_line
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


def test_phases_of_a_request_are_observed_as_far_as_it_came() -> None:
    metrics = Metrics()
    observer = StepMetrics(metrics)
    request = GenerateRequest(
        request_id="r", model_id="m", prompt_ids=[1] * 96, sampling=SamplingParams()
    )
    spans = [LoadSpan(TierName.HOST, 1.0, 3.0, 1), LoadSpan(TierName.DISK, 1.0, 4.0, 1)]
    cached = {TierName.HOST: 32, TierName.DISK: 32}
    whole = Timeline(0.0, 5.0, 7.0, 17.0, spans, cached, num_prompt_tokens=96)
    for timeline in (whole, Timeline(0.0, 5.0, None, 6.0), Timeline(0.0, None, None, 1.0)):
        observer.request_ended(request, timeline)
    rendered = metrics.render().decode()
    for name, count, total in (
        ("request_load_time_seconds", 1, 3),
        ("request_prefill_time_seconds", 1, 2),
        ("request_decode_time_seconds", 1, 10),
        ("request_inference_time_seconds", 2, 13),
        ("request_prefill_kv_computed_tokens", 1, 32),
    ):
        assert f"\nxllm_{name}_count {count}.0\n" in rendered
        assert f"\nxllm_{name}_sum {total}.0\n" in rendered
