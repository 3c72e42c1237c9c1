"""A worker's engine for people and machines: metrics, the status line, the load in etcd."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from xllm.engine.scheduler import StepPlan
from xllm.engine.statistics import EngineStatistics
from xllm.engine.timeline import Timeline
from xllm.protocol import Epoch, GenerateRequest, Watermark, WorkerLoad
from xllm.roles.load_report import make_load
from xllm.roles.tier_report import collect_tiers, tiers_status
from xllm.telemetry import Metrics

logger = logging.getLogger(__name__)

STATUS_PERIOD_S = 10.0


class StepMetrics:
    """Feeds the histograms, on the engine's thread: an `EngineObserver`."""

    def __init__(self, metrics: Metrics) -> None:
        self._queue_time = metrics.request_queue_time_seconds
        self._rows = metrics.iteration_tokens
        self._load_time = metrics.request_load_time_seconds
        self._computed = metrics.request_prefill_kv_computed_tokens
        self._prefill_time = metrics.request_prefill_time_seconds
        self._decode_time = metrics.request_decode_time_seconds
        self._inference_time = metrics.request_inference_time_seconds
        self._step = {
            phase: metrics.step_seconds.labels(phase) for phase in ("prefill", "decode", "mixed")
        }

    def request_begun(self, waited_s: float) -> None:
        self._queue_time.observe(waited_s)

    def step_done(self, plan: StepPlan, seconds: float) -> None:
        if plan.num_decodes == len(plan.scheduled):
            phase = "decode"
        else:
            phase = "mixed" if plan.num_decodes else "prefill"
        self._step[phase].observe(seconds)
        self._rows.observe(plan.num_tokens)

    def request_ended(self, request: GenerateRequest, timeline: Timeline) -> None:
        if timeline.loads:
            self._load_time.observe(timeline.load_s)
        if timeline.prefill_s is not None:
            self._prefill_time.observe(timeline.prefill_s)
            num_cached = sum(timeline.cached_tokens.values())
            self._computed.observe(timeline.num_prompt_tokens - num_cached)
        if timeline.decode_s is not None:
            self._decode_time.observe(timeline.decode_s)
        if timeline.inference_s is not None:
            self._inference_time.observe(timeline.inference_s)


class ReportedEngine(Protocol):
    def statistics(self) -> EngineStatistics: ...


class EngineReport:
    """Follows an engine's statistics; the event loop's thread only."""

    def __init__(self, engine: ReportedEngine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._counted = EngineStatistics()

    def collect(self) -> None:
        """Brings the metrics up to the engine's last step."""
        now, before = self._engine.statistics(), self._counted
        self._counted = now
        metrics = self._metrics
        metrics.num_requests_running.set(now.num_running)
        metrics.num_requests_waiting.set(now.num_waiting)
        metrics.kv_cache_usage_perc.set(now.cache_usage)
        metrics.kv_cache_blocks.set(now.num_blocks)
        metrics.prompt_tokens.inc(_prompt_tokens(now) - _prompt_tokens(before))
        metrics.generation_tokens.inc(now.generated_tokens - before.generated_tokens)
        metrics.prefix_cache_queries.inc(now.queried_tokens - before.queried_tokens)
        metrics.prefix_cache_hits.inc(now.hit_tokens - before.hit_tokens)
        metrics.num_preemptions.inc(now.num_preemptions - before.num_preemptions)
        collect_tiers(metrics, before, now)

    def load(
        self, epoch: Epoch, watermarks: dict[str, Watermark], index_pending_blocks: int = 0
    ) -> WorkerLoad:
        now = self._engine.statistics()
        return make_load(now, epoch, watermarks, time.monotonic(), index_pending_blocks)

    async def log_status(self, period_s: float = STATUS_PERIOD_S) -> None:
        """One line per period in which the engine was busy, until cancelled."""
        before = self._engine.statistics()
        while True:
            await asyncio.sleep(period_s)
            now = self._engine.statistics()
            if now.num_steps > before.num_steps:
                logger.info("status %s", status_line(before, now, period_s))
            before = now


def status_line(before: EngineStatistics, now: EngineStatistics, period_s: float) -> str:
    """What happened between two snapshots; hit_rate is `-` when nothing was looked up."""
    queried = now.queried_tokens - before.queried_tokens
    hit_rate = f"{(now.hit_tokens - before.hit_tokens) / queried:.0%}" if queried else "-"
    prefilled = (now.prompt_tokens - before.prompt_tokens) / period_s
    generated = (now.generated_tokens - before.generated_tokens) / period_s
    return (
        f"prompt_tokens_per_s={prefilled:.0f} output_tokens_per_s={generated:.0f} "
        f"running={now.num_running} waiting={now.num_waiting} "
        f"cache_usage={now.cache_usage:.0%} hit_rate={hit_rate}{tiers_status(before, now)}"
    )


def _prompt_tokens(statistics: EngineStatistics) -> int:
    return statistics.prompt_tokens + statistics.hit_tokens
