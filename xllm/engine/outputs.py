"""Between the scheduler and the sampler: which row of logits is for what, and what came of it.

The rows of one scheduled sequence are the prompt tokens to be scored, by position, and then its
draws, one per sample; the same order as `build_batch` gives to `Batch.logits_indices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future

from xllm.engine.grammar import MaskWork
from xllm.engine.request import Sequence
from xllm.engine.sampler import Draw, SampledTokens, SamplingBatch, Score, TokenHistory
from xllm.engine.scheduler import Advance, ScheduledSequence, StepPlan
from xllm.protocol import TokenDelta

BeginMasks = Callable[[list[MaskWork]], Future[None]]


class StepOutputs:
    """What one step asks of the sampler; then, given the answer, tokens and deltas."""

    def __init__(
        self,
        plan: StepPlan,
        eos_token_ids: Iterable[int],
        vocab_size: int,
        begin_masks: BeginMasks | None = None,
    ) -> None:
        """begin_masks: `MaskWorker.begin`; None where no sequence has a grammar."""
        self._plan = plan
        self._begin_masks = begin_masks
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._draw_rows: list[int] = []
        self._rows: list[Draw | Score] = []
        for item in plan.scheduled:
            self._add(item)

    def begin_sampling(self) -> SamplingBatch:
        """Begins to compute masks, where grammars want some."""
        work: list[MaskWork] = [
            (row.grammar, row.suppressed)
            for row in self._rows
            if isinstance(row, Draw) and row.grammar is not None
        ]
        if not work:
            return SamplingBatch(self._rows)
        assert self._begin_masks is not None
        return SamplingBatch(self._rows, self._begin_masks(work))

    def drawn(self, sampled: SampledTokens) -> list[int]:
        """The drawn tokens in the order that `Scheduler.complete` takes them."""
        return [sampled.token_ids[row] for row in self._draw_rows]

    def faulty(self, sampled: SampledTokens) -> list[Sequence]:
        """Sequences whose logits were not finite, or whose grammars went wrong."""
        if not sampled.faulty_rows:
            return []
        found, row = [], 0
        for item in self._plan.scheduled:
            end = row + len(item.scored_positions) + item.num_samples
            if not sampled.faulty_rows.isdisjoint(range(row, end)):
                found.append(item.seq)
            row = end
        return found

    def keep_scores(self, sampled: SampledTokens) -> None:
        """Appends what was scored to `Sequence.prompt_logprobs`; before `Scheduler.complete`."""
        row = 0
        for item in self._plan.scheduled:
            num_scores = len(item.scored_positions)
            item.seq.prompt_logprobs += sampled.logprobs[row : row + num_scores]
            row += num_scores + item.num_samples

    def delta(self, advance: Advance, sampled: SampledTokens) -> TokenDelta:
        """The message for one sample; also tells its penalties and its grammar what was drawn."""
        seq = advance.seq
        logprobs = None
        if advance.sample is not None:
            logprob = sampled.logprobs[self._draw_rows[advance.sample]]
            logprobs = [logprob] if logprob is not None else None
            if seq.history is not None:
                seq.history.append(advance.token_ids[0])
            if seq.grammar is not None:
                seq.grammar.append(advance.token_ids[0])
        is_first = advance.offset == len(seq.group.output_ids)
        cached = seq.cached_tokens or {}
        return TokenDelta(
            request_id=seq.request_id,
            attempt=seq.attempt,
            index=seq.index,
            offset=advance.offset,
            token_ids=advance.token_ids,
            finish_reason=seq.finish_reason,
            stop_token_id=advance.stop_token_id,
            logprobs=logprobs,
            prompt_logprobs=seq.prompt_logprobs if is_first and seq.wants_prompt_logprobs else None,
            cached_tokens=sum(cached.values()),
            cached_tokens_by_tier={tier.value: n for tier, n in cached.items()} if is_first else {},
        )

    def _add(self, item: ScheduledSequence) -> None:
        seq = item.seq
        num_top = seq.sampling.prompt_logprobs or 0
        for position in item.scored_positions:
            self._rows.append(Score(seq.token_ids[position + 1], num_top))
        if item.num_samples:
            for member in (seq, *seq.children):
                self._draw_rows.append(len(self._rows))
                self._rows.append(self._draw(member))

    def _draw(self, seq: Sequence) -> Draw:
        sampling = seq.sampling
        position = seq.num_output_tokens
        suppressed: list[int] = []
        if position < sampling.min_tokens:
            suppressed = [*self._eos_token_ids, *sampling.stop_token_ids]
        if seq.history is None and TokenHistory.is_needed(sampling):
            seq.history = TokenHistory(self._vocab_size, seq.group.prompt_ids, seq.output_ids)
        return Draw(sampling, seq.index, position, suppressed, seq.history, seq.grammar)
