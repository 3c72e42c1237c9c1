"""A worker without a model: an engine that only counts, and what goes with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from xllm.errors import RequestError
from xllm.protocol import (
    Epoch,
    FinishReason,
    GenerateRequest,
    ModelCard,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
    WorkerId,
    WorkerInfo,
)
from xllm.roles.delta_queue import DeltaQueue, Listener
from xllm.roles.stream_client import WorkerStream


class CountingRequest:
    def __init__(self, engine: CountingEngine, request: GenerateRequest, listener: Listener):
        self.request = request
        self.listener = listener
        self._engine = engine

    def cancel(self) -> None:
        if self in self._engine.running:
            self._engine.running.remove(self)
            self._engine.cancelled.append(self.request.request_id)


class CountingEngine:
    """Each `step` gives every running sample its next token: 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.running: list[CountingRequest] = []
        self.cancelled: list[str] = []
        self.refuse_with: RequestError | None = None
        self.step_counter = 0

    @property
    def running_ids(self) -> list[str]:
        return [running.request.request_id for running in self.running]

    def submit(self, request: GenerateRequest, listener: Listener) -> CountingRequest:
        if self.refuse_with is not None:
            raise self.refuse_with
        running = CountingRequest(self, request, listener)
        self.running.append(running)
        return running

    def step(self, logprobs: list[TokenLogprob] | None = None) -> None:
        self.step_counter += 1
        for running in list(self.running):
            request = running.request
            offset = len(request.output_ids)
            last = offset + 1 == request.sampling.max_tokens
            running.request = msgspec.structs.replace(
                request, output_ids=[*request.output_ids, offset]
            )
            if last:
                self.running.remove(running)
            for index in range(request.index, request.index + request.n):
                running.listener(
                    TokenDelta(
                        request_id=request.request_id,
                        attempt=request.attempt,
                        index=index,
                        offset=offset,
                        token_ids=[offset],
                        logprobs=logprobs,
                        finish_reason=FinishReason.LENGTH if last else None,
                    )
                )

    async def run(self) -> None:
        """Steps until cancelled."""
        while True:
            self.step()
            await asyncio.sleep(0.001)


class Submitted(DeltaQueue):
    """One attempt on a worker, to be iterated over."""

    def __init__(self, stream: WorkerStream, request: GenerateRequest) -> None:
        super().__init__()
        self._num_open_samples = request.n
        self._running = stream.submit(request, self._listen)

    def cancel(self) -> None:
        self._running.cancel()
        self.end()

    def _listen(self, news: TokenDelta | RequestError) -> None:
        if isinstance(news, RequestError):
            self.end(news)
            return
        self.push(news)
        self._num_open_samples -= news.finish_reason is not None
        if not self._num_open_samples:
            self.end()


def submit(stream: WorkerStream, request: GenerateRequest) -> Submitted:
    return Submitted(stream, request)


def make_info(worker_id: str = "w", **changes: object) -> WorkerInfo:
    info = WorkerInfo(
        worker_id=WorkerId(worker_id),
        epoch=Epoch(7),
        address="",
        operator_address="",
        model=ModelCard(model_id="m", max_model_len=100, vocab_size=100, created=0),
        fingerprint="f" * 32,
        block_size=32,
        kv_dtype="float32",
        device_blocks=1,
        block_bytes=1,
    )
    return msgspec.structs.replace(info, **changes)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def make_request(name: str, max_tokens: int = 5, **fields: object) -> GenerateRequest:
    request = GenerateRequest(
        request_id=name,
        model_id="m",
        prompt_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=max_tokens),
    )
    return msgspec.structs.replace(request, **fields)
