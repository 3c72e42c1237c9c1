"""How long a prompt that comes now would wait, by the engine's own costs. Pure.

    queue = (prompts in the midst of being computed + those that wait) * slowdown by decodes

A prompt that waits is reckoned without the blocks that it will find in the cache. To look for them
costs as much as admitting it, so only so many are looked for at a time; of prompts beyond these the
same share is taken to be cached.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from xllm.engine.request import Sequence, SequenceState
from xllm.engine.scheduler import Scheduler
from xllm.engine.step_cost import StepCost, StepWork, decode_work

PERIOD_S = 0.25
"""Between two measurements while prompts wait."""

MAX_LOOKUPS = 1024
"""Blocks that one measurement looks for: half a millisecond."""

MIN_PREFILL_SHARE = 0.25
"""Of a step, left to prompts however many decodes there are: as routers reckon."""


class LoadMeter:
    """For the engine's thread."""

    def __init__(
        self, scheduler: Scheduler, cost: StepCost, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.scheduler = scheduler
        self.cost = cost
        self._clock = clock
        self._queue_s = 0.0
        self._measured_at = -PERIOD_S

    def queue_s(self) -> float:
        """Seconds; at most `PERIOD_S` old, and 0 as soon as no prompt waits."""
        scheduler = self.scheduler
        begun = [seq for seq in scheduler.running if not seq.is_decoding]
        if not begun and not scheduler.waiting:
            self._queue_s = 0.0
        elif (now := self._clock()) - self._measured_at >= PERIOD_S:
            self._measured_at = now
            self._queue_s = self._measure(begun)
        return self._queue_s

    def _measure(self, begun: list[Sequence]) -> float:
        cost = self.cost.prefill_cost()
        if cost is None:
            return 0.0
        seconds = sum(cost.seconds(*self._rest_of(seq)) for seq in begun)
        block_size = self.scheduler.kv_cache.block_size
        lookups = MAX_LOOKUPS
        num_tokens = num_cached = 0
        for seq in self.scheduler.waiting:
            num_blocks = seq.num_tokens // block_size
            if num_blocks <= lookups:
                lookups -= num_blocks
                found = self.scheduler.kv_cache.expected_blocks(seq, num_blocks) * block_size
                num_tokens += seq.num_tokens
                num_cached += found
            else:
                found = seq.num_tokens * num_cached // num_tokens if num_tokens else 0
            found = min(found, seq.num_tokens - 1)
            seconds += cost.seconds(found, seq.num_tokens - found)
        return seconds * self._slowdown()

    def _rest_of(self, seq: Sequence) -> tuple[int, int]:
        """Where an admitted prompt goes on, and how many tokens are left of it."""
        start = seq.num_computed_tokens
        if seq.state is SequenceState.LOADING and seq.load is not None:
            arriving = seq.num_committed_blocks + seq.load.limit
            start = max(start, arriving * self.scheduler.kv_cache.block_size)
        start = min(start, seq.num_tokens - 1)
        return start, seq.num_tokens - start

    def _slowdown(self) -> float:
        decoding = [seq for seq in self.scheduler.running if seq.is_decoding]
        if not decoding:
            return 1.0
        work = sum((decode_work(seq.num_tokens) for seq in decoding), StepWork())
        planned_s = self.cost.planned_s(self.scheduler.limits.max_step_s)
        share = 1.0 - self.cost.predict(work) / planned_s
        return 1.0 / max(share, MIN_PREFILL_SHARE)
