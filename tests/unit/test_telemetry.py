from __future__ import annotations

import asyncio
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from xllm.telemetry import Metrics, measure_event_loop_lag


def _families(metrics: Metrics) -> set[str]:
    text = metrics.render().decode()
    return {family.name for family in text_string_to_metric_families(text)}


def test_metrics_of_two_processes_do_not_meet() -> None:
    one, other = Metrics(), Metrics()
    one.prompt_tokens.inc(5)

    assert b"xllm_prompt_tokens_total 5.0" in one.render()
    assert b"xllm_prompt_tokens_total 0.0" in other.render()


def test_all_names_have_the_prefix_and_those_of_vllm_are_kept() -> None:
    names = {name for name in _families(Metrics()) if not name.startswith("process_")}

    assert all(name.startswith("xllm_") for name in names)
    assert names >= {
        "xllm_num_requests_running",
        "xllm_num_requests_waiting",
        "xllm_kv_cache_usage_perc",
        "xllm_prefix_cache_queries",
        "xllm_prefix_cache_hits",
        "xllm_num_preemptions",
        "xllm_time_to_first_token_seconds",
        "xllm_inter_token_latency_seconds",
        "xllm_e2e_request_latency_seconds",
    }


def test_a_role_renders_only_its_concerns() -> None:
    metrics = Metrics(engine=False)
    metrics.kv_cache_usage_perc.set(0.5)

    assert "xllm_kv_cache_usage_perc" not in _families(metrics)
    assert "xllm_workers" in _families(metrics)


async def test_event_loop_lag_is_measured() -> None:
    metrics = Metrics()
    observed = asyncio.Event()
    histogram = metrics.event_loop_lag_seconds
    metrics.event_loop_lag_seconds = SimpleNamespace(  # type: ignore[assignment]
        observe=lambda lag_s: (histogram.observe(lag_s), observed.set())
    )
    async with asyncio.timeout(1):
        task = asyncio.create_task(measure_event_loop_lag(metrics, period_s=0.0))
        await observed.wait()
    task.cancel()

    assert b"xllm_event_loop_lag_seconds_count 0.0" not in metrics.render()
