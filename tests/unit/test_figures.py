from __future__ import annotations

import pytest

from xllm.roles.figures import Distribution, Figures
from xllm.roles.journal import Journal
from xllm.telemetry import Metrics

INF = float("inf")


def test_percentiles_are_linear_within_a_bucket() -> None:
    gaps = Distribution((0.01, 0.05, 0.1, INF), (0, 10, 20, 20))
    assert gaps.percentile(0.25) == pytest.approx(0.03)
    assert gaps.percentile(0.5) == pytest.approx(0.05)
    assert gaps.percentile(0.99) == pytest.approx(0.099)
    assert Distribution((0.1, INF), (0, 5)).percentile(0.5) == 0.1
    assert Distribution((0.1, INF), (0, 0)).percentile(0.5) is None


def test_a_point_is_what_came_since_the_one_before() -> None:
    metrics = Metrics(engine=False)
    journal = Journal(lambda: 0.0, lambda: 0.0)
    figures = Figures(metrics, journal)
    metrics.inter_token_latency_seconds.observe(60.0)  # before anybody looked
    figures.sample(1000.0)
    assert figures.describe() == []
    assert figures.summary() == {}
    for _ in range(20):
        metrics.inter_token_latency_seconds.observe(0.03)
    metrics.time_to_first_token_seconds.observe(0.2)
    metrics.request_prompt_tokens.observe(100)
    metrics.request_cached_tokens.labels("host").inc(64)
    metrics.e2e_request_latency_seconds.observe(1.0)
    journal.fresh_ttfts.append(0.2)
    figures.sample(1002.0)
    [point] = figures.describe()
    assert point["at"] == 1002.0
    assert point["output_tokens_per_s"] == 10.5
    assert point["prompt_tokens_per_s"] == 50.0
    assert point["ttft_p50_s"] == point["ttft_p95_s"] == 0.2
    assert 0.025 < point["tbt_p50_s"] < 0.05
    assert point["cached_tokens_by_tier"] == {"device": 0, "host": 64, "disk": 0, "remote": 0}
    figures.sample(1004.0)
    [late] = figures.describe(since=2)
    assert (late["tbt_p50_s"], late["ttft_p50_s"], late["prompt_tokens"]) == (None, None, 0)
    summary = figures.summary()
    assert summary["requests"] == 1
    assert summary["tbt_s"]["num"] == 20
    assert summary["ttft_s"] == {"p50": 0.2, "p95": 0.2, "num": 1}
    assert summary["cached_tokens_by_tier"]["host"] == 64


def test_old_points_go() -> None:
    figures = Figures(Metrics(engine=False), Journal(lambda: 0.0, lambda: 0.0))
    for second in range(0, 1000, 2):
        figures.sample(float(second))
    points = figures.describe()
    assert (points[0]["at"], points[-1]["at"]) == (700.0, 998.0)
    assert [point["at"] for point in figures.describe(since=figures.num_points - 1)] == [998.0]
    assert figures.describe(since=figures.num_points) == []
