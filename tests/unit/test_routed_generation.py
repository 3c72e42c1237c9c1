"""A request that outlives its workers, on workers that only remember what they were told."""

from __future__ import annotations

import asyncio
from collections.abc import Set as AbstractSet
from itertools import pairwise

import pytest

from xllm.errors import EngineFault, InvalidRequest, NoWorker, Overloaded, RequestError, WorkerLost
from xllm.protocol import FinishReason, GenerateRequest, SamplingParams, TokenDelta, WorkerId
from xllm.roles import routed_generation
from xllm.roles.delta_queue import Listener
from xllm.roles.routed_generation import Placed, RoutedGeneration


class Attempt:
    def __init__(self, worker_id: WorkerId, request: GenerateRequest, listener: Listener) -> None:
        self.worker_id = worker_id
        self.request = request
        self.listener = listener
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def say(self, *tokens: int, index: int = 0, last: bool = False, offset: int = -1) -> None:
        request = self.request
        self.listener(
            TokenDelta(
                request_id="r",
                attempt=request.attempt,
                index=index,
                offset=len(request.output_ids) if offset < 0 else offset,
                token_ids=list(tokens),
                finish_reason=FinishReason.STOP if last else None,
            )
        )


class Fleet:
    """Workers by name, asked in that order."""

    def __init__(self, *names: str) -> None:
        self.names = [WorkerId(name) for name in names]
        self.attempts: list[Attempt] = []
        self.num_moves = 0

    def place(
        self, request: GenerateRequest, listener: Listener, excluded: AbstractSet[WorkerId]
    ) -> Placed:
        for name in self.names:
            if name not in excluded:
                attempt = Attempt(name, request, listener)
                self.attempts.append(attempt)
                return Placed(name, attempt.cancel)
        raise NoWorker("no worker can serve at the moment")

    def start(self, n: int = 1, *, may_wait: bool = False) -> RoutedGeneration:
        request = GenerateRequest(
            request_id="r", model_id="m", prompt_ids=[1], sampling=SamplingParams(), n=n
        )
        return RoutedGeneration(request, self.place, 2, self._count, may_wait)

    def _count(self) -> None:
        self.num_moves += 1

    async def attempt(self, number: int) -> Attempt:
        """Waits for it."""
        async with asyncio.timeout(1):
            while len(self.attempts) <= number:  # noqa: ASYNC110
                await asyncio.sleep(0)
        return self.attempts[number]


def collect(generation: RoutedGeneration) -> asyncio.Task[list[int]]:
    async def run() -> list[int]:
        return [token for delta in [d async for d in generation] for token in delta.token_ids]

    return asyncio.create_task(run())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_generation, "PLACE_PERIOD_S", 0.0)


async def test_the_stream_goes_on_elsewhere() -> None:
    fleet = Fleet("a", "b")
    generation = fleet.start()
    tokens = collect(generation)
    first = await fleet.attempt(0)
    first.say(1, 2)
    first.listener(WorkerLost("a was lost"))
    second = await fleet.attempt(1)
    assert generation.worker_id == second.worker_id == "b"
    assert (second.request.attempt, second.request.output_ids) == (1, [1, 2])
    first.say(3, offset=2)
    second.say(3, last=True)
    assert await tokens == [1, 2, 3]
    assert fleet.num_moves == 1


async def test_each_sample_has_its_own_worker_after_a_loss() -> None:
    fleet = Fleet("a", "b")
    tokens = collect(fleet.start(n=2))
    first = await fleet.attempt(0)
    first.say(10, index=0)
    first.listener(WorkerLost("a was lost"))
    zero, one = await fleet.attempt(1), await fleet.attempt(2)
    assert [(a.request.index, a.request.n) for a in (zero, one)] == [(0, 1), (1, 1)]
    one.say(20, index=1, last=True)
    zero.say(11, index=0, last=True)
    assert await tokens == [10, 20, 11]


async def test_a_refusal_is_no_loss() -> None:
    fleet = Fleet("a", "b")
    tokens = collect(fleet.start())
    for number in range(6):
        attempt = await fleet.attempt(number)
        attempt.listener(NoWorker("the worker is draining"))
    (await fleet.attempt(6)).say(1, last=True)
    assert await tokens == [1]
    workers = [attempt.worker_id for attempt in fleet.attempts]
    assert all(before != after for before, after in pairwise(workers))


async def test_too_many_losses_are_one_error() -> None:
    fleet = Fleet("a", "b", "c", "d")
    tokens = collect(fleet.start())
    for number in range(3):
        (await fleet.attempt(number)).listener(WorkerLost("lost"))
    with pytest.raises(WorkerLost, match="3 workers"):
        await tokens
    assert [attempt.worker_id for attempt in fleet.attempts] == ["a", "b", "c"]


async def test_somebody_who_can_go_on_is_waited_for() -> None:
    fleet = Fleet("a")
    tokens = collect(fleet.start())
    first = await fleet.attempt(0)
    first.say(1)
    fleet.names.clear()
    first.listener(WorkerLost("a was lost"))
    for _ in range(5):
        await asyncio.sleep(0)
    fleet.names.append(WorkerId("a"))
    second = await fleet.attempt(1)
    second.say(2, last=True)
    assert await tokens == [1, 2]


async def test_a_new_request_waits_only_if_it_may() -> None:
    fleet = Fleet()
    with pytest.raises(NoWorker):
        fleet.start()
    tokens = collect(fleet.start(may_wait=True))
    await asyncio.sleep(0)
    fleet.names.append(WorkerId("a"))
    first = await fleet.attempt(0)
    assert first.request.attempt == 0
    first.say(1, last=True)
    assert await tokens == [1]


async def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_generation, "PLACE_TIMEOUT_S", 0.0)
    fleet = Fleet("a")
    tokens = collect(fleet.start())
    first = await fleet.attempt(0)
    fleet.names.clear()
    first.listener(WorkerLost("a was lost"))
    with pytest.raises(WorkerLost, match="a was lost; no other"):
        await tokens


async def test_a_new_request_that_every_worker_refuses_is_refused() -> None:
    fleet = Fleet("a", "b")
    tokens = collect(fleet.start())
    for number in range(2):
        (await fleet.attempt(number)).listener(Overloaded("full", retry_after_s=3))
    with pytest.raises(Overloaded, match="full"):
        await tokens


@pytest.mark.parametrize("error", [InvalidRequest("no"), EngineFault("broken")])
async def test_other_errors_end_the_request_and_all_its_attempts(error: RequestError) -> None:
    fleet = Fleet("a", "b")
    tokens = collect(fleet.start(n=2))
    first = await fleet.attempt(0)
    first.say(10)
    first.listener(WorkerLost("a was lost"))
    zero, one = await fleet.attempt(1), await fleet.attempt(2)
    zero.listener(error)
    with pytest.raises(type(error)):
        await tokens
    assert one.is_cancelled
    assert len(fleet.attempts) == 3


async def test_a_gap_is_a_loss() -> None:
    fleet = Fleet("a", "b")
    tokens = collect(fleet.start())
    first = await fleet.attempt(0)
    first.say(1)
    first.say(9, offset=5)
    second = await fleet.attempt(1)
    assert first.is_cancelled
    second.say(2, last=True)
    assert await tokens == [1, 2]


async def test_cancelling_stops_every_attempt() -> None:
    fleet = Fleet("a", "b")
    generation = fleet.start()
    tokens = collect(generation)
    first = await fleet.attempt(0)
    first.say(1)
    generation.cancel()
    generation.cancel()
    assert first.is_cancelled
    first.listener(WorkerLost("late"))
    assert await tokens == []
    assert len(fleet.attempts) == 1


async def test_a_consumer_that_is_cancelled_stops_every_attempt() -> None:
    fleet = Fleet("a", "b")
    tokens = collect(fleet.start())
    first = await fleet.attempt(0)
    await asyncio.sleep(0)
    tokens.cancel()
    with pytest.raises(asyncio.CancelledError):
        await tokens
    assert first.is_cancelled
