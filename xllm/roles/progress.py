"""How far a request has come, whoever ran it, and what another worker needs to go on. Pure.

Each sample of a request is run by one *attempt* at a time. A request starts as one attempt for all
its samples. When that is lost before anything came, it moves as it is; else every sample that has
not ended goes on as a request of its own, with its index and its output so far.

    attempt 0   samples 0 1 2      lost after some tokens; sample 1 had ended
    attempt 1   sample 0           output_ids = what sample 0 had
    attempt 1   sample 2           output_ids = what sample 2 had

Whatever happens, the deltas that `take` passes on have no gap and no repetition per sample, and
look as if one worker had made them: usage and scores of the prompt come from the first attempt
that brought any.
"""

from __future__ import annotations

from msgspec.structs import replace

from xllm.errors import WorkerLost
from xllm.protocol import FinishReason, GenerateRequest, TokenDelta


class _Sample:
    __slots__ = ("attempt", "cached_tokens", "first_attempt", "has_ended", "num_losses", "output")

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        """The one that counts."""
        self.output: list[int] = []
        self.first_attempt: int | None = None
        """The one that brought the first delta."""
        self.cached_tokens = 0
        self.num_losses = 0
        self.has_ended = False


class RequestProgress:
    """Follows one request from its first attempt to the end of its last sample."""

    def __init__(self, request: GenerateRequest, max_retries: int) -> None:
        self._request = request
        self._max_retries = max_retries
        self._samples = {
            index: _Sample(request.attempt)
            for index in range(request.index, request.index + request.n)
        }
        for sample in self._samples.values():
            sample.output += request.output_ids
        self._num_open = request.n

    @property
    def has_ended(self) -> bool:
        return not self._num_open

    @property
    def has_begun(self) -> bool:
        """Something of it was passed on."""
        return any(sample.first_attempt is not None for sample in self._samples.values())

    def take(self, delta: TokenDelta) -> TokenDelta | None:
        """What of `delta` is new; None if nothing is.

        Raises: WorkerLost if its attempt cannot go on: tokens are missing, or it was given up.
        """
        sample = self._samples.get(delta.index)
        if sample is None or sample.has_ended or delta.attempt != sample.attempt:
            return None
        if delta.finish_reason is FinishReason.ABORT:
            raise WorkerLost("the worker gave up the request")
        num_known = len(sample.output) - delta.offset
        if num_known < 0:
            raise WorkerLost(f"output tokens {len(sample.output)} to {delta.offset} are missing")
        if num_known > 0:
            logprobs = delta.logprobs and delta.logprobs[num_known:]
            delta = replace(delta, token_ids=delta.token_ids[num_known:], logprobs=logprobs)
            if not delta.token_ids and delta.finish_reason is None:
                return None
        sample.output += delta.token_ids
        if delta.finish_reason is not None:
            sample.has_ended = True
            self._num_open -= 1
        if sample.first_attempt is None:
            sample.first_attempt = delta.attempt
            sample.cached_tokens = delta.cached_tokens
        elif delta.attempt != sample.first_attempt:
            delta = replace(
                delta,
                cached_tokens=sample.cached_tokens,
                cached_tokens_by_tier={},
                prompt_logprobs=None,
            )
        return delta

    def next_attempts(self, lost: GenerateRequest, *, is_loss: bool) -> list[GenerateRequest]:
        """What has to be sent elsewhere instead of `lost`, one of the attempts that count.

        `is_loss`: its worker died, which may happen `max_retries` times to a sample; else it was
        refused. Raises: WorkerLost when that was too often.
        """
        indices = [
            index
            for index in range(lost.index, lost.index + lost.n)
            if not self._samples[index].has_ended
        ]
        for index in indices:
            sample = self._samples[index]
            sample.num_losses += is_loss
            if sample.num_losses > self._max_retries:
                raise WorkerLost(
                    f"{sample.num_losses} workers were lost while they ran this request, "
                    "which is given up"
                )
            sample.attempt = lost.attempt + 1
        if len(indices) == lost.n and not any(self._has_begun(index) for index in indices):
            return [replace(lost, attempt=lost.attempt + 1)]
        return [self._attempt_of(index) for index in indices]

    def _attempt_of(self, index: int) -> GenerateRequest:
        sample = self._samples[index]
        sampling = self._request.sampling
        if self._has_begun(index) and sampling.prompt_logprobs is not None:
            # They are known, and asking again would keep the prompt from the cache.
            sampling = replace(sampling, prompt_logprobs=None)
        return replace(
            self._request,
            attempt=sample.attempt,
            index=index,
            n=1,
            output_ids=list(sample.output),
            sampling=sampling,
        )

    def _has_begun(self, index: int) -> bool:
        return self._samples[index].first_attempt is not None
