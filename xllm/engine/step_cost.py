"""How long a step takes, learned from the steps that ran. Pure.

    seconds = c0 + c1 * rows + c2 * prefill pairs + c3 * decode pairs

A pair is one row and one token that it attends to. c0 is dominated by reading the weights, c1 by
the linear layers, c2 by attention's arithmetic, c3 by reading the KV of decodes. They are fitted
by recursive least squares with forgetting (Ljung, "System Identification", 11.2) on relative
errors, so that a 10 ms step counts as much as a 300 ms one.

It answers two questions: how many prompt tokens fit beside the decodes of a step, and at what rate
a worker prefills, which routing needs.

A fit tells what a step takes on average. Streams feel the slow ones, so what nearly all steps take
is learned beside it, as a multiple of the fit: a machine that others use, too, gets shorter steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xllm.protocol import PrefillCost

FORGETTING = 0.995
SPREAD_SHARE = 0.97
"""Of the steps, that take at most `spread` times what was predicted."""
SPREAD_RATE = 0.02
MIN_SPREAD = 1.08
MAX_SPREAD = 1.6
_PRIOR_VARIANCE = np.array([1e-1, 1e-2, 1e-6, 1e-6]) ** 2
"""Of the coefficients, in seconds: wide, so that any measurement outweighs the prior."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes."""

    rows: int = 0
    prefill_pairs: int = 0
    decode_pairs: int = 0

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(
            self.rows + other.rows,
            self.prefill_pairs + other.prefill_pairs,
            self.decode_pairs + other.decode_pairs,
        )


def decode_work(num_tokens: int) -> StepWork:
    """One row over a context of `num_tokens`, its own included."""
    return StepWork(1, 0, num_tokens)


def prefill_work(start: int, num_tokens: int) -> StepWork:
    """Rows [start, start + num_tokens) of a prompt, causal."""
    return StepWork(num_tokens, num_tokens * start + num_tokens * (num_tokens + 1) // 2, 0)


class StepCost:
    """The fitted model of one engine. For the engine's thread; readers may see the last fit."""

    def __init__(self) -> None:
        self._coefficients: npt.NDArray[np.float64] = np.zeros(4)
        self._covariance: npt.NDArray[np.float64] = np.diag(_PRIOR_VARIANCE)
        self._spread = MIN_SPREAD
        self.num_observed = 0

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns from one step; steps in which the process slept are the caller's to leave out."""
        if seconds <= 0:
            return
        if (predicted_s := self.predict(work)) > 0:
            self._learn_spread(seconds / predicted_s)
        features = _features(work) / seconds
        gain = self._covariance @ features
        gain /= FORGETTING + features @ gain
        self._coefficients = self._coefficients + gain * (1.0 - features @ self._coefficients)
        covariance = (self._covariance - np.outer(gain, features @ self._covariance)) / FORGETTING
        # Directions that no step excites would grow without bound under forgetting.
        shrink = np.minimum(1.0, np.sqrt(_PRIOR_VARIANCE / np.diag(covariance)))
        self._covariance = covariance * np.outer(shrink, shrink)
        self.num_observed += 1

    def predict(self, work: StepWork) -> float:
        """Seconds; 0 while nothing was observed."""
        return max(float(_features(work) @ self._positive()), 0.0)

    def planned_s(self, max_s: float) -> float:
        """What a step may take by `predict`, so that nearly all of them take at most `max_s`."""
        return max_s / self._spread

    def max_prefill(self, budget_s: float, start: int) -> int:
        """Most prompt tokens, from position `start` on, that add at most `budget_s` to a step."""
        if not self.num_observed:
            return 1 << 30
        if budget_s <= 0:
            return 0
        _, per_row, per_pair, _ = self._positive()
        linear = per_row + per_pair * start
        if per_pair == 0:
            return int(budget_s / linear) if linear > 0 else 1 << 30
        # per_pair / 2 * n^2 + linear * n = budget
        return int((math.sqrt(linear**2 + 2 * per_pair * budget_s) - linear) / per_pair)

    def prefill_tokens_per_s(self, num_tokens: int) -> float:
        """The rate at which a new prompt of this length is computed, in one chunk."""
        seconds = self.predict(prefill_work(0, num_tokens))
        return num_tokens / seconds if seconds > 0 else 0.0

    def prefill_cost(self) -> PrefillCost | None:
        """What routers reckon with; None: nothing was observed."""
        if not self.num_observed:
            return None
        per_step, per_row, per_pair, _ = self._positive()
        return PrefillCost(float(per_step), float(per_row), float(per_pair))

    def token_s(self) -> float:
        """What a prompt token costs at the least, beside others in one chunk; 0: not known yet."""
        return float(self._positive()[1])

    def _learn_spread(self, ratio: float) -> None:
        """Moves towards the quantile by stochastic approximation (Robbins and Monro, 1951)."""
        is_over = ratio > self._spread
        self._spread += SPREAD_RATE * (SPREAD_SHARE if is_over else SPREAD_SHARE - 1.0)
        self._spread = min(max(self._spread, MIN_SPREAD), MAX_SPREAD)

    def _positive(self) -> npt.NDArray[np.float64]:
        return np.maximum(self._coefficients, 0.0)


def _features(work: StepWork) -> npt.NDArray[np.float64]:
    return np.array([1.0, work.rows, work.prefill_pairs, work.decode_pairs])
