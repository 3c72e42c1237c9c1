"""A request that moves from worker to worker: what is passed on, and what is sent next."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from xllm.errors import WorkerLost
from xllm.protocol import (
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
)
from xllm.roles.progress import RequestProgress


def make_request(n: int = 1, **sampling: object) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        model_id="m",
        prompt_ids=[1, 2],
        n=n,
        sampling=SamplingParams(max_tokens=8, seed=5, **sampling),
    )


def delta(
    offset: int,
    *token_ids: int,
    attempt: int = 0,
    index: int = 0,
    last: bool = False,
    **fields: object,
) -> TokenDelta:
    made = TokenDelta(
        request_id="r",
        attempt=attempt,
        index=index,
        offset=offset,
        token_ids=list(token_ids),
        finish_reason=FinishReason.LENGTH if last else None,
    )
    return replace(made, **fields)


def test_a_request_goes_on_with_what_it_has() -> None:
    request = make_request()
    progress = RequestProgress(request, 2)
    first = delta(0, 7, 8)
    assert progress.take(first) is first
    (following,) = progress.next_attempts(request, is_loss=True)
    assert following == replace(request, attempt=1, output_ids=[7, 8])
    assert progress.take(delta(2, 9)) is None, "a late frame of the worker that was given up"
    taken = progress.take(delta(2, 9, attempt=1, last=True))
    assert taken is not None
    assert (taken.offset, taken.token_ids) == (2, [9])
    assert progress.has_ended
    assert progress.take(delta(3, 9, attempt=1)) is None


def test_before_anything_came_it_moves_as_it_is() -> None:
    request = make_request(n=3)
    progress = RequestProgress(request, 2)
    (following,) = progress.next_attempts(request, is_loss=True)
    assert following == replace(request, attempt=1)
    assert not progress.has_begun


def test_samples_that_have_not_ended_go_on_by_themselves() -> None:
    request = make_request(n=3)
    progress = RequestProgress(request, 2)
    progress.take(delta(0, 10, index=0))
    progress.take(delta(0, 11, index=1, last=True))
    zero, two = progress.next_attempts(request, is_loss=True)
    assert zero == replace(request, attempt=1, n=1, index=0, output_ids=[10])
    assert two == replace(request, attempt=1, n=1, index=2)
    # Each has its own worker from now on, and its own fate.
    (again,) = progress.next_attempts(zero, is_loss=True)
    assert (again.attempt, again.index) == (2, 0)
    assert progress.take(delta(0, 12, attempt=1, index=2)) is not None
    assert progress.take(delta(1, 13, attempt=1, index=0)) is None
    assert progress.take(delta(1, 13, attempt=2, index=0, last=True)) is not None
    assert not progress.has_ended
    assert progress.take(delta(1, 14, attempt=1, index=2, last=True)) is not None
    assert progress.has_ended


def test_losses_are_limited_and_refusals_are_not() -> None:
    request = make_request()
    progress = RequestProgress(request, 2)
    for _ in range(2):
        (request,) = progress.next_attempts(request, is_loss=True)
        for _ in range(5):
            (request,) = progress.next_attempts(request, is_loss=False)
    with pytest.raises(WorkerLost, match="3 workers were lost"):
        progress.next_attempts(request, is_loss=True)


def test_what_is_known_is_not_passed_on_again() -> None:
    request = make_request()
    progress = RequestProgress(request, 2)
    progress.take(delta(0, 1, 2))
    scores = [TokenLogprob(token, -1.0, []) for token in (2, 3)]
    taken = progress.take(delta(1, 2, 3, logprobs=scores))
    assert taken is not None
    assert (taken.token_ids, taken.logprobs) == ([3], scores[1:])
    assert progress.take(delta(0, 1)) is None


@pytest.mark.parametrize(
    "bad", [delta(2, 5), delta(1, 5, finish_reason=FinishReason.ABORT)], ids=["gap", "abort"]
)
def test_an_attempt_that_cannot_go_on_counts_as_lost(bad: TokenDelta) -> None:
    request = make_request()
    progress = RequestProgress(request, 2)
    progress.take(delta(0, 4))
    with pytest.raises(WorkerLost):
        progress.take(bad)
    (following,) = progress.next_attempts(request, is_loss=True)
    assert following.output_ids == [4]


def test_prompt_and_usage_are_those_of_the_first_attempt() -> None:
    request = make_request(prompt_logprobs=1)
    progress = RequestProgress(request, 2)
    first = delta(0, 7, prompt_logprobs=[None], cached_tokens=0, cached_tokens_by_tier={"disk": 0})
    assert progress.take(first) is first
    (following,) = progress.next_attempts(request, is_loss=True)
    assert following.sampling.prompt_logprobs is None, "so that the prompt can be cached"
    assert following.sampling.seed == 5
    taken = progress.take(
        delta(1, 8, attempt=1, cached_tokens=64, cached_tokens_by_tier={"device": 64})
    )
    assert taken is not None
    assert (taken.cached_tokens, taken.cached_tokens_by_tier) == (0, {})


def test_a_prompt_that_was_not_scored_yet_still_is() -> None:
    request = make_request(prompt_logprobs=1)
    progress = RequestProgress(request, 2)
    (following,) = progress.next_attempts(request, is_loss=True)
    assert following.sampling.prompt_logprobs == 1
    first = delta(0, 7, attempt=1, prompt_logprobs=[None])
    assert progress.take(first) is first


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_losses_gives_each_sample_whole(seed: int) -> None:
    """Attempts run, are lost and babble on; what is passed on is what one worker would say."""
    rng = random.Random(seed)
    n, length = 3, 8
    request = make_request(n=n)
    progress = RequestProgress(request, max_retries=1000)
    live = [request]
    dead: list[GenerateRequest] = []
    reached: dict[tuple[int, int], int] = {}
    output: dict[int, list[int]] = {index: [] for index in range(n)}

    def speak(attempt: GenerateRequest) -> TokenDelta | None:
        """The next few tokens of one of its samples: those that any worker would draw."""
        index = rng.choice(range(attempt.index, attempt.index + attempt.n))
        offset = reached.get((attempt.attempt, index), len(attempt.output_ids))
        end = min(length, offset + rng.randint(1, 3))
        if offset == length:
            return None
        reached[attempt.attempt, index] = end
        tokens = [100 * index + position for position in range(offset, end)]
        return delta(offset, *tokens, attempt=attempt.attempt, index=index, last=end == length)

    while not progress.has_ended:
        if rng.random() < 0.2 and live:
            lost = live.pop(rng.randrange(len(live)))
            dead.append(lost)
            live += progress.next_attempts(lost, is_loss=rng.random() < 0.5)
        said = speak(rng.choice(live + dead))
        taken = progress.take(said) if said is not None else None
        if taken is not None:
            assert taken.offset + len(taken.token_ids) >= len(output[taken.index])
            output[taken.index] += taken.token_ids
    assert output == {i: [100 * i + position for position in range(length)] for i in range(n)}
