"""The queue of deltas, and the backend of a worker that serves clients itself."""

from __future__ import annotations

import asyncio

import pytest

from xllm.errors import EngineFault, NoWorker, RequestError, UnknownModel
from xllm.protocol import (
    FinishReason,
    GenerateRequest,
    ModelCard,
    SamplingParams,
    TokenDelta,
    WorkerId,
)
from xllm.roles.delta_queue import DeltaQueue, Listener
from xllm.roles.local_backend import LocalBackend

CARD = ModelCard(model_id="m", max_model_len=10, vocab_size=10, created=0)


def delta(offset: int, *, index: int = 0, last: bool = False) -> TokenDelta:
    return TokenDelta(
        request_id="r",
        attempt=0,
        index=index,
        offset=offset,
        token_ids=[offset],
        finish_reason=FinishReason.LENGTH if last else None,
    )


def make_request(model_id: str = "m", n: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id="r", model_id=model_id, prompt_ids=[1], sampling=SamplingParams(), n=n
    )


class FakeEngine:
    step_counter = 0

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.num_cancelled = 0

    def submit(self, request: GenerateRequest, listener: Listener) -> FakeEngine:
        self.listener = listener
        return self

    def cancel(self) -> None:
        self.num_cancelled += 1

    def say(self, news: TokenDelta | RequestError) -> None:
        assert self.listener is not None
        self.listener(news)


async def test_a_queue_gives_what_came_before_the_error() -> None:
    queue = DeltaQueue()
    queue.push(delta(0))
    queue.end(EngineFault("broken"))
    queue.end()
    assert (await anext(queue)).offset == 0
    for _ in range(2):
        with pytest.raises(EngineFault, match="broken"):
            await anext(queue)


async def test_a_queue_wakes_its_consumer() -> None:
    queue = DeltaQueue()
    consumer = asyncio.create_task(anext(queue))
    await asyncio.sleep(0)
    queue.push(delta(0))
    assert (await consumer).offset == 0
    ending = asyncio.create_task(anext(queue, None))
    await asyncio.sleep(0)
    queue.end()
    assert await ending is None


async def test_a_consumer_that_was_cancelled_loses_nothing() -> None:
    queue = DeltaQueue()
    consumer = asyncio.create_task(anext(queue))
    await asyncio.sleep(0)
    queue.push(delta(0))
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert (await anext(queue)).offset == 0


async def test_a_local_backend_takes_nothing_before_its_model_is_loaded() -> None:
    backend = LocalBackend(WorkerId("w"))
    assert backend.model_cards() == []
    with pytest.raises(NoWorker, match="loaded"):
        backend.generate(make_request())
    with pytest.raises(NoWorker):
        await backend.tokenizer("m")


async def test_a_local_backend_runs_on_its_engine() -> None:
    engine, backend = FakeEngine(), LocalBackend(WorkerId("w"))
    backend.open(CARD, engine, None)  # type: ignore[arg-type]
    assert backend.model_cards() == [CARD]
    with pytest.raises(UnknownModel):
        backend.generate(make_request("other"))
    generation = backend.generate(make_request(n=2))
    assert generation.worker_id == "w"
    engine.say(delta(0, index=1, last=True))
    engine.say(delta(0))
    engine.say(delta(1, last=True))
    assert [(d.index, d.offset) async for d in generation] == [(1, 0), (0, 0), (0, 1)]


async def test_a_local_generation_is_cancelled_in_the_engine() -> None:
    engine, backend = FakeEngine(), LocalBackend(WorkerId("w"))
    backend.open(CARD, engine, None)  # type: ignore[arg-type]
    generation = backend.generate(make_request())
    generation.cancel()
    assert engine.num_cancelled == 1
    assert [d async for d in generation] == []
