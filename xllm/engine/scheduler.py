"""Which tokens run in the next step: continuous batching with chunked prefill. Pure.

Each step has a budget of `max_tokens_per_batch` rows, spent in this order:

 1. decodes, one row each, so that running streams never wait for a prompt;
 2. prompts that have begun, oldest first;
 3. waiting requests, by priority and then age, while there are blocks, seats and budget.

A request is admitted when every block that its known tokens need is reserved, or not at all; then
only output can run out of blocks. When it does, the newest sequence is preempted: it gives its
blocks back (its committed ones stay cached) and waits at the head of the queue. The oldest
sequence always gets on, because a cache is never smaller than one request of the greatest length.

Beside decodes a prompt gets no more rows than keep the step under `max_step_s`, so that streams
flow evenly (TBT); alone it gets the whole budget.

A waiting request whose next block is being computed or loaded for another is passed over until
that block is there: requests that arrive together with the same new prefix compute it once.

A request with blocks in lower tiers is admitted like any other, but LOADING, without rows, until
they have arrived or `prefetch_timeout_s` is over; others run meanwhile. It keeps its place in the
order of admission, so it can be preempted.

With n > 1 the first sample prefills; the others are its `children`, draw their first token from the
same logits, and are forked from its blocks after that step.

`schedule` and `complete` come in pairs: nothing else may change a sequence between them, so
cancellations are applied before `schedule`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from xllm.cache.kv_cache import KVCache, PrefixMatch
from xllm.engine.request import Sequence, SequenceState
from xllm.engine.step_cost import StepCost, StepWork, decode_work, prefill_work
from xllm.protocol import FinishReason, GenerateRequest

MAX_PASSED_OVER = 32
"""Waiting requests that one step passes over because of a pending prefix: bounds its cost."""

MIN_CHUNK_TOKENS = 16
"""Prompt tokens that a step computes beside decodes even if it takes longer than it should."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_tokens_per_batch: int
    max_seqs_per_batch: int
    max_model_len: int
    max_tokens_per_chunk: int = 0
    """Prompt tokens of a step that also decodes; 0: what keeps the step under `max_step_s`."""
    max_step_s: float = 0.080
    """What nearly all steps that decode take at most."""
    prefetch_timeout_s: float | None = None
    """Of a load; None: what computing the same tokens would take."""
    enable_chunked_prefill: bool = True


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Rows [start, start + num_tokens) of one sequence's tokens."""

    seq: Sequence
    start: int
    num_tokens: int
    num_samples: int
    """Tokens to draw from the last row's logits: 0 in the middle of a prompt, n for a prompt with
    n - 1 children, otherwise 1."""

    @property
    def scored_positions(self) -> range:
        """Rows whose successor is a prompt token that is to be scored."""
        if not self.seq.wants_prompt_logprobs:
            return range(0)
        first = max(self.start, len(self.seq.prompt_logprobs) - 1)
        return range(first, min(self.start + self.num_tokens, self.seq.prompt_len - 1))

    @property
    def work(self) -> StepWork:
        if self.seq.is_decoding:
            return decode_work(self.start + 1)
        return prefill_work(self.start, self.num_tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Decodes come first."""

    scheduled: list[ScheduledSequence]
    num_decodes: int
    copies: list[tuple[int, int]]
    """Blocks to copy, (source, target), before anything runs."""

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)

    @property
    def work(self) -> StepWork:
        return sum((s.work for s in self.scheduled), StepWork())


@dataclass(slots=True)
class Advance:
    """What a step did to one sequence."""

    seq: Sequence
    offset: int
    token_ids: list[int] = field(default_factory=list)
    sample: int | None = None
    """Index into the step's drawn tokens; None: no token was drawn."""
    stop_token_id: int | None = None


class _Budget:
    """What is left for prompts in one step: rows, and beside decodes also seconds."""

    def __init__(
        self, limits: SchedulerLimits, cost: StepCost, decodes: list[ScheduledSequence]
    ) -> None:
        self._limits = limits
        self._cost = cost
        self._rows = limits.max_tokens_per_batch - len(decodes)
        self._is_shared = bool(decodes)
        self._is_used = self._is_shared
        self._work = StepWork()
        for item in decodes:
            self._work += decode_work(item.start + 1)
        if self._is_shared and limits.max_tokens_per_chunk:
            self._rows = min(self._rows, limits.max_tokens_per_chunk)

    def affords(self, start: int, num_tokens: int) -> int:
        """Of the `num_tokens` from position `start` on, how many may run in this step."""
        if not self._limits.enable_chunked_prefill:
            runs_alone = num_tokens > self._limits.max_tokens_per_batch and not self._is_used
            return num_tokens if num_tokens <= self._rows or runs_alone else 0
        num_tokens = min(num_tokens, self._rows)
        if self._is_shared and not self._limits.max_tokens_per_chunk:
            planned_s = self._cost.planned_s(self._limits.max_step_s)
            left_s = planned_s - self._cost.predict(self._work)
            # However slow the decodes are, a prompt gets on by a little each step.
            least = 0 if self._work.prefill_pairs else MIN_CHUNK_TOKENS
            num_tokens = min(num_tokens, max(self._cost.max_prefill(left_s, start), least))
        return num_tokens

    def take(self, start: int, num_tokens: int) -> int:
        """`affords`, and spends it."""
        num_tokens = self.affords(start, num_tokens)
        if num_tokens:
            self._rows -= num_tokens
            self._is_used = True
            self._work += prefill_work(start, num_tokens)
        return num_tokens


class Scheduler:
    """Waiting and running sequences of one engine, for its thread alone."""

    def __init__(
        self,
        kv_cache: KVCache,
        limits: SchedulerLimits,
        eos_token_ids: Iterable[int],
        cost: StepCost | None = None,
    ) -> None:
        self.kv_cache = kv_cache
        self.limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        """In order of admission: the last one is preempted first."""
        self.num_preemptions = 0
        self._eos_token_ids = frozenset(eos_token_ids)
        self._cost = cost or StepCost()
        self._copies: list[tuple[int, int]] = []
        self._preempted = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queues a sequence behind those as urgent as it."""
        position = len(self.waiting)
        while position and self._urgency(seq) < self._urgency(self.waiting[position - 1]):
            position -= 1
        self.waiting.insert(position, seq)

    def abort(self, request: GenerateRequest) -> None:
        """Ends all samples of a request, which is known by its identity, and frees their blocks."""
        for seq in [seq for seq in (*self.waiting, *self.running) if seq.group is request]:
            self._finish(seq, FinishReason.ABORT)

    def abort_all(self) -> None:
        """Ends every sequence, as if its client had gone away."""
        for seq in (*self.waiting, *self.running):
            self._finish(seq, FinishReason.ABORT)

    def schedule(self) -> StepPlan:
        """Decides the next step; the plan is empty when nothing can run."""
        self.poll_loads()
        decodes = self._schedule_decodes()
        budget = _Budget(self.limits, self._cost, decodes)
        prefills: list[ScheduledSequence] = []
        for seq in self.running:
            if seq.state is SequenceState.RUNNING and not seq.is_decoding:
                self._schedule_prefill(seq, budget, prefills)
        if not self._preempted:
            self._admit(budget, prefills)
        copies, self._copies = self._copies, []
        return StepPlan(decodes + prefills, len(decodes), copies)

    def poll_loads(self) -> None:
        """Lets sequences whose blocks have arrived run; moves the lower tiers' work on."""
        for seq in self.kv_cache.poll():
            assert isinstance(seq, Sequence)
            if self.kv_cache.complete_load(seq):
                self._begin(seq)
            else:
                self._preempt(seq)

    def complete(self, plan: StepPlan, token_ids: list[int]) -> list[Advance]:
        """Applies a step: `token_ids` are the drawn tokens, `num_samples` for each entry in order.

        Returns what every sequence gained, in the plan's order; those that have ended have a
        `finish_reason` and hold no blocks.
        """
        advances: list[Advance] = []
        drawn = 0
        for item in plan.scheduled:
            seq = item.seq
            seq.num_computed_tokens = item.start + item.num_tokens
            self.kv_cache.commit(seq)
            if item.num_samples == 0:
                if seq.num_remaining_tokens == 0:  # max_tokens = 0: the prompt was to be scored
                    advances += [Advance(member, 0) for member in (seq, *seq.children)]
                    self._finish(seq, FinishReason.LENGTH)
                continue
            children, seq.children = seq.children, []
            for member in (seq, *children):
                advances.append(self._append(member, token_ids[drawn], drawn))
                drawn += 1
            for child in children:
                if child.finish_reason is None:
                    self._fork(seq, item, child)
            for member in (seq, *children):
                if member.finish_reason is not None:
                    self._finish(member, member.finish_reason)
        return advances

    def _urgency(self, seq: Sequence) -> tuple[int, float]:
        return (seq.group.priority, seq.arrival)

    def _schedule_decodes(self) -> list[ScheduledSequence]:
        self._preempted = False
        for seq in list(self.running):
            if seq.is_decoding and seq.state is SequenceState.RUNNING:
                while not self.kv_cache.try_extend(seq):
                    self._preempted = True
                    victim = self.running[-1]
                    self._preempt(victim)
                    if victim is seq:
                        break
        decoding = [seq for seq in self.running if seq.is_decoding]
        return [
            ScheduledSequence(seq, seq.num_computed_tokens, 1, 1)
            for seq in decoding[: self.limits.max_tokens_per_batch]
        ]

    def _schedule_prefill(
        self, seq: Sequence, budget: _Budget, prefills: list[ScheduledSequence]
    ) -> None:
        """Adds the chunk of `seq` that the budget affords, if any."""
        remaining = seq.num_remaining_tokens
        num_tokens = budget.take(seq.num_computed_tokens, remaining)
        if num_tokens == 0:
            return
        num_samples = 0
        if num_tokens == remaining and seq.sampling.max_tokens > 0:
            num_samples = 1 + len(seq.children)
        prefills.append(ScheduledSequence(seq, seq.num_computed_tokens, num_tokens, num_samples))

    def _admit(self, budget: _Budget, prefills: list[ScheduledSequence]) -> None:
        num_passed_over = 0
        for seq in list(self.waiting):
            if len(self.running) >= self.limits.max_seqs_per_batch:
                return
            match = self.kv_cache.match(seq, self._block_compute_s())
            if match.is_pending:
                num_passed_over += 1
                if num_passed_over == MAX_PASSED_OVER:
                    return
                continue
            start = min(match.num_tokens, seq.num_tokens - 1)
            if not match.sources and not budget.affords(start, seq.num_tokens - start):
                return
            # A block for the next token of each running sequence stays free, so that admitting
            # one request does not preempt another a moment later.
            if not self.kv_cache.try_admit(
                seq, match, len(self.running), self._load_timeout_s(match)
            ):
                return
            self.waiting.remove(seq)
            self.running.append(seq)
            if seq.load is not None:
                seq.state = SequenceState.LOADING
            else:
                self._begin(seq)
                self._schedule_prefill(seq, budget, prefills)

    def _begin(self, seq: Sequence) -> None:
        """All that the cache had of `seq` is on the device."""
        seq.state = SequenceState.RUNNING
        if seq.cached_tokens is None:
            seq.cached_tokens = seq.cached_by_tier

    def _block_compute_s(self) -> float | None:
        """What loading a block has to beat; None: whoever set a timeout wants to wait for it."""
        if self.limits.prefetch_timeout_s is not None:
            return None
        return self._cost.token_s() * self.kv_cache.block_size

    def _load_timeout_s(self, match: PrefixMatch) -> float:
        if self.limits.prefetch_timeout_s is not None:
            return self.limits.prefetch_timeout_s
        num_tokens = len(match.sources) * self.kv_cache.block_size
        return self._cost.predict(prefill_work(match.num_tokens, num_tokens))

    def _append(self, seq: Sequence, token_id: int, sample: int) -> Advance:
        advance = Advance(seq, seq.num_output_tokens, [token_id], sample)
        seq.token_ids.append(token_id)
        sampling = seq.sampling
        is_stop = token_id in sampling.stop_token_ids or (
            token_id in self._eos_token_ids and not sampling.ignore_eos
        )
        if is_stop and seq.num_output_tokens >= sampling.min_tokens:
            seq.finish_reason = FinishReason.STOP
            advance.stop_token_id = token_id
        elif (
            seq.num_output_tokens >= sampling.max_tokens
            or seq.num_tokens >= self.limits.max_model_len
        ):
            seq.finish_reason = FinishReason.LENGTH
        return advance

    def _fork(self, parent: Sequence, item: ScheduledSequence, child: Sequence) -> None:
        child.cached_tokens = parent.cached_tokens
        copies = None
        if len(self.running) < self.limits.max_seqs_per_batch:
            copies = self.kv_cache.try_fork(parent, child)
        if copies is None:  # it finds the full blocks in the cache when there is room again
            self.add(child)
            return
        child.state = SequenceState.RUNNING
        self.running.append(child)
        self._copies += copies

    def _preempt(self, seq: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(seq)
        self.kv_cache.free(seq)
        seq.state = SequenceState.WAITING
        self.waiting.insert(0, seq)

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.state in (SequenceState.RUNNING, SequenceState.LOADING):
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self.kv_cache.free(seq)
        seq.state = SequenceState.FINISHED
        seq.finish_reason = reason
        for child in seq.children:
            child.state = SequenceState.FINISHED
            child.finish_reason = reason
