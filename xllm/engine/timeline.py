"""When what happened to one request in the engine: what phases are measured by and traces drawn
from. Pure.

    submitted ──waits──> [loads] ──waits──> begun ──prefill──> first token ──decode──> ended

A preempted request waits and prefills again: that is part of its decode. With n > 1 all samples
share one timeline: the first token is that of any of them, the end that of the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xllm.cache.tier import TierName
from xllm.protocol import PhaseSeconds

if TYPE_CHECKING:
    from xllm.cache.loads import LoadSpan


@dataclass(slots=True)
class Timeline:
    """Of `time.monotonic`, in seconds; None: it did not come to that."""

    submitted_at: float
    begun_at: float | None = None
    """Its first step began."""
    first_token_at: float | None = None
    ended_at: float | None = None
    """Its last token, an error, or its cancellation: also at a stop string, which the API finds."""
    loads: list[LoadSpan] = field(default_factory=list)
    """What was brought up from below the device for it."""
    cached_tokens: Mapping[TierName, int] = field(default_factory=dict)
    """Of its prompt, by the tier that had them."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def load_s(self) -> float:
        """Spent loading, tiers at the same time counted once; 0: nothing was loaded."""
        ended_at: dict[float, float] = {}
        """By when the loads of one admission began."""
        for span in self.loads:
            ended_at[span.started_at] = max(span.ended_at, ended_at.get(span.started_at, 0.0))
        return sum(end - start for start, end in ended_at.items())

    @property
    def prefill_s(self) -> float | None:
        return _between(self.begun_at, self.first_token_at)

    @property
    def decode_s(self) -> float | None:
        return _between(self.first_token_at, self.ended_at)

    @property
    def inference_s(self) -> float | None:
        return _between(self.begun_at, self.ended_at)

    def phases(self, now: float) -> PhaseSeconds:
        """Of a request that has a first token, if its last one came at `now`."""
        begun_at = self.submitted_at if self.begun_at is None else self.begun_at
        first_at = now if self.first_token_at is None else self.first_token_at
        waited_s = begun_at - self.submitted_at
        # What was given up at the deadline went on beside the computing.
        load_s = min(self.load_s, waited_s)
        phases = (waited_s - load_s, load_s, first_at - begun_at, now - first_at)
        return PhaseSeconds(*(round(max(0.0, seconds), 6) for seconds in phases))


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
