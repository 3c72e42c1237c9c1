"""What an engine reports of itself: one frozen snapshot, replaced after each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from xllm.cache.tier import TierName
from xllm.cache.tiers import Tiers, TiersStatistics
from xllm.engine.load_meter import LoadMeter
from xllm.engine.scheduler import StepPlan
from xllm.engine.step_cost import decode_work
from xllm.engine.timeline import Timeline
from xllm.protocol import GenerateRequest, PrefillCost

RATE_PROMPT_TOKENS = 512
"""Length of the prompt whose rate is reported."""


class EngineObserver(Protocol):
    """Takes what histograms are made of; called on the engine's thread."""

    def request_begun(self, waited_s: float) -> None:
        """A sequence is in a step for the first time, so long after it was submitted."""
        ...

    def step_done(self, plan: StepPlan, seconds: float) -> None: ...

    def request_ended(self, request: GenerateRequest, timeline: Timeline) -> None:
        """However it ended; the timeline does not change any more."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """Counters since the start, and gauges as of the last step."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    """Known tokens, of running and waiting sequences, whose KV is not computed yet."""
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    num_evictions: int = 0
    prompt_tokens: int = 0
    """Computed by prefill; cached ones are not in it."""
    generated_tokens: int = 0
    queried_tokens: int = 0
    """Looked up in the prefix cache."""
    hit_tokens: int = 0
    """Found there."""
    num_preemptions: int = 0
    num_steps: int = 0
    num_faults: int = 0
    step_s: float = 0.0
    """Spent in steps, in all."""
    last_step_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    """Of a new prompt of RATE_PROMPT_TOKENS, by the fitted cost of a step."""
    decode_step_s: float = 0.0
    """Of one sequence with that context, likewise."""
    prefill_cost: PrefillCost | None = None
    """Of which these rates are examples; None: not known yet."""
    queue_s: float = 0.0
    """Until a prompt that comes now would begin to be computed."""
    victim_used_at: float | None = None
    """When the device block was last used that the next one displaces, by `time.monotonic`; None:
    there is room."""
    hit_tokens_by_tier: dict[TierName, int] = field(default_factory=dict)
    """Where `hit_tokens` came from."""
    tiers: TiersStatistics | None = None
    """Of what is below the device; None: nothing is."""

    @property
    def cache_usage(self) -> float:
        """0 to 1; cached blocks that nobody uses do not count."""
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0


@dataclass(slots=True)
class Counters:
    """What the engine's thread counts."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_steps: int = 0
    num_faults: int = 0
    step_s: float = 0.0
    last_step_s: float = 0.0

    def count(self, plan: StepPlan, seconds: float) -> None:
        self.num_steps += 1
        self.step_s += seconds
        self.last_step_s = seconds
        self.prompt_tokens += plan.num_tokens - plan.num_decodes
        self.generated_tokens += sum(item.num_samples for item in plan.scheduled)

    def snapshot(self, meter: LoadMeter, tiers: Tiers | None) -> EngineStatistics:
        scheduler, cost = meter.scheduler, meter.cost
        pool = scheduler.kv_cache.pool.statistics()
        cache = scheduler.kv_cache.statistics()
        return EngineStatistics(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            waiting_tokens=sum(
                seq.num_remaining_tokens
                for seq in (*scheduler.waiting, *scheduler.running)
                if not seq.is_decoding
            ),
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_used,
            num_cached_blocks=pool.num_cached,
            num_evictions=pool.num_evictions,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            queried_tokens=cache.queried_tokens,
            hit_tokens=cache.hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self.num_steps,
            num_faults=self.num_faults,
            step_s=self.step_s,
            last_step_s=self.last_step_s,
            prefill_tokens_per_s=cost.prefill_tokens_per_s(RATE_PROMPT_TOKENS),
            decode_step_s=cost.predict(decode_work(RATE_PROMPT_TOKENS)),
            prefill_cost=cost.prefill_cost(),
            queue_s=meter.queue_s(),
            victim_used_at=scheduler.kv_cache.pool.next_victim_used_at(),
            hit_tokens_by_tier=cache.hit_tokens_by_tier,
            tiers=None if tiers is None else tiers.statistics(),
        )
