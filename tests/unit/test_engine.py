"""The engine's two threads, with a runner that draws from the context instead of a model."""

import asyncio
import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xllm.config import EngineConfig
from xllm.engine.batch import Batch
from xllm.engine.engine import MAX_FAULTS_IN_A_ROW, Engine
from xllm.engine.sampler import Draw, SampledTokens, SamplingBatch
from xllm.engine.scheduler import StepPlan
from xllm.engine.timeline import Timeline
from xllm.errors import EngineFault, InvalidRequest, NoWorker, RequestError, WorkerLost
from xllm.protocol import FinishReason, GenerateRequest, SamplingParams, TokenDelta, TokenLogprob

VOCAB = 100


class FakeRunner:
    """Draws (last token + 1 + sample index) % VOCAB; can be told to wait or to fail."""

    def __init__(self, num_blocks: int = 64) -> None:
        self.config = EngineConfig(block_size=4, max_tokens_per_batch=64, max_seqs_per_batch=8)
        self.fingerprint = "f"
        self.kv_dtype = "float32"
        self.num_blocks = num_blocks
        self.max_model_len = 100
        self.model_config = SimpleNamespace(vocab_size=VOCAB, eos_token_ids=(0,))
        self.device = torch.device("cpu")
        self.staging = None
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.is_faulty = False

    def allocate_cache(self, num_blocks: int) -> None:
        assert num_blocks == self.num_blocks

    def enter_thread(self) -> None:
        pass

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        assert pairs

    def execute(self, batch: Batch, sampling: SamplingBatch) -> SampledTokens:
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        token_ids: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        for row, entry in zip(batch.logits_indices.tolist(), sampling.rows, strict=True):
            if isinstance(entry, Draw):
                token_id = (int(batch.input_ids[row]) + 1 + entry.index) % VOCAB
                wants = entry.params.logprobs is not None
            else:
                token_id, wants = entry.token_id, True
            token_ids.append(token_id)
            logprobs.append(TokenLogprob(token_id, -0.5, []) if wants else None)
        faulty = frozenset({0}) if self.is_faulty and token_ids else frozenset[int]()
        return SampledTokens(token_ids, logprobs, faulty)


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
async def engine(runner: FakeRunner):  # type: ignore[no-untyped-def]
    engine = Engine(runner)  # type: ignore[arg-type]
    await engine.start()
    yield engine
    runner.gate.set()
    await engine.stop()


class Client:
    """Collects what the engine says of one request."""

    def __init__(self, engine: Engine, prompt: list[int], n: int = 1, **sampling: object) -> None:
        self.items: list[TokenDelta | RequestError] = []
        self.ended = asyncio.Event()
        self.first = asyncio.Event()
        self._num_open = n
        request = GenerateRequest(
            request_id="r",
            model_id="m",
            prompt_ids=prompt,
            n=n,
            sampling=SamplingParams(**({"temperature": 0.0, "max_tokens": 5} | sampling)),  # type: ignore[arg-type]
        )
        self.handle = engine.submit(request, self._hear)

    def _hear(self, item: TokenDelta | RequestError) -> None:
        assert not self.ended.is_set(), "nothing follows the end"
        self.items.append(item)
        self.first.set()
        if isinstance(item, RequestError):
            self.ended.set()
        elif item.finish_reason is not None:
            self._num_open -= 1
            if self._num_open == 0:
                self.ended.set()

    async def deltas(self) -> list[TokenDelta]:
        await asyncio.wait_for(self.ended.wait(), 5)
        assert all(isinstance(item, TokenDelta) for item in self.items)
        return self.items  # type: ignore[return-value]

    async def error(self) -> RequestError:
        await asyncio.wait_for(self.ended.wait(), 5)
        assert isinstance(self.items[-1], RequestError)
        return self.items[-1]


async def until_idle(engine: Engine) -> None:
    async with asyncio.timeout(5):
        while engine.statistics().num_running or engine.statistics().num_used_blocks:  # noqa: ASYNC110 - another thread
            await asyncio.sleep(0)


async def test_tokens_arrive_in_order_and_end_once(engine: Engine) -> None:
    deltas = await Client(engine, [1, 2, 3]).deltas()
    assert [d.token_ids for d in deltas] == [[4], [5], [6], [7], [8]]
    assert [d.offset for d in deltas] == [0, 1, 2, 3, 4]
    assert [d.finish_reason for d in deltas] == [None] * 4 + [FinishReason.LENGTH]


async def test_eos_stops_and_is_named(engine: Engine) -> None:
    last = (await Client(engine, [97]).deltas())[-1]
    assert (last.finish_reason, last.stop_token_id, last.offset) == (FinishReason.STOP, 0, 2)


async def test_ignored_eos_does_not_stop(engine: Engine) -> None:
    deltas = await Client(engine, [97], ignore_eos=True).deltas()
    assert [d.token_ids[0] for d in deltas] == [98, 99, 0, 1, 2]


async def test_many_at_once_and_all_blocks_come_back(engine: Engine) -> None:
    clients = [Client(engine, [i % 50 + 1] * (i % 17 + 1), max_tokens=20) for i in range(50)]
    for client in clients:
        assert sum(len(d.token_ids) for d in await client.deltas()) == 20
    await until_idle(engine)
    assert engine.statistics().generated_tokens == 50 * 20


async def test_samples_are_numbered(engine: Engine) -> None:
    deltas = await Client(engine, [10, 20], n=3, logprobs=0, prompt_logprobs=0).deltas()
    for index in range(3):
        own = [d for d in deltas if d.index == index]
        assert own[0].token_ids == [21 + index]
        assert own[0].prompt_logprobs == [None, TokenLogprob(20, -0.5, [])]
        assert own[1].prompt_logprobs is None
        assert all(d.logprobs is not None for d in own)


async def test_prompt_logprobs_survive_chunks(engine: Engine) -> None:
    prompt = list(range(1, 91))
    (delta,) = await Client(engine, prompt, max_tokens=0, prompt_logprobs=0).deltas()
    assert delta.token_ids == []
    assert delta.prompt_logprobs is not None
    assert [p.token_id for p in delta.prompt_logprobs if p] == prompt[1:]


async def test_cancel_frees_blocks_and_silences(engine: Engine, runner: FakeRunner) -> None:
    client = Client(engine, [1], max_tokens=90, ignore_eos=True)
    await asyncio.wait_for(client.first.wait(), 5)
    client.handle.cancel()
    heard = len(client.items)
    client.handle.cancel()
    await until_idle(engine)
    assert len(client.items) == heard


async def test_cancel_before_the_first_step(engine: Engine, runner: FakeRunner) -> None:
    runner.gate.clear()
    running = Client(engine, [1])
    waiting = Client(engine, [2])
    waiting.handle.cancel()
    runner.gate.set()
    await running.deltas()
    await until_idle(engine)
    assert waiting.items == []


async def test_a_failed_step_fails_its_requests_only(engine: Engine, runner: FakeRunner) -> None:
    runner.error = RuntimeError("broken kernel")
    assert isinstance(await Client(engine, [1]).error(), EngineFault)
    runner.error = None
    assert len(await Client(engine, [1]).deltas()) == 5
    await until_idle(engine)
    assert engine.statistics().num_faults == 1


async def test_logits_that_are_not_finite_fail_the_request(
    engine: Engine, runner: FakeRunner
) -> None:
    runner.is_faulty = True
    error = await Client(engine, [1]).error()
    assert "finite" in error.message
    runner.is_faulty = False
    await Client(engine, [1]).deltas()


async def test_it_gives_up_when_every_step_fails(engine: Engine, runner: FakeRunner) -> None:
    runner.error = RuntimeError("broken device")
    for _ in range(MAX_FAULTS_IN_A_ROW):
        await Client(engine, [1]).error()
    with pytest.raises(EngineFault):
        await engine.wait_closed()
    with pytest.raises(NoWorker):
        Client(engine, [1])


async def test_stop_ends_open_requests_with_an_error(engine: Engine, runner: FakeRunner) -> None:
    runner.gate.clear()
    client = Client(engine, [1], max_tokens=90)
    stop = asyncio.create_task(engine.stop())
    runner.gate.set()
    await stop
    assert isinstance(await client.error(), WorkerLost)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 5, "empty"),
        ([1] * 96, 5, "96 prompt tokens and up to 5 output tokens are more than the 100"),
        ([VOCAB], 5, "from 0 to 99"),
        ([-1], 5, "from 0 to 99"),
    ],
)
async def test_what_cannot_work_is_refused(
    engine: Engine, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Client(engine, prompt, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("fields", "sampling", "param"),
    [
        ({"n": 0}, {}, "n"),
        ({"n": -1}, {}, "n"),
        ({"n": 10**9}, {}, "n"),
        ({"index": -1}, {}, "index"),
        ({"output_ids": [VOCAB]}, {}, "output_ids"),
        ({"output_ids": [1], "n": 2}, {}, "output_ids"),
        ({"output_ids": [1] * 5}, {}, "output_ids"),
        ({}, {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({}, {"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({}, {"logit_bias": {1: math.nan}}, "logit_bias"),
        ({}, {"temperature": math.nan}, "temperature"),
        ({}, {"temperature": -1.0}, "temperature"),
        ({}, {"top_p": 2.0}, "top_p"),
        ({}, {"top_k": -1}, "top_k"),
        ({}, {"seed": 2**63}, "seed"),
        ({}, {"max_tokens": -1}, "max_tokens"),
        ({}, {"repetition_penalty": 0.0}, "repetition_penalty"),
        ({}, {"logprobs": VOCAB + 1}, "logprobs"),
    ],
)
async def test_what_only_a_confused_master_asks_is_refused(
    engine: Engine, fields: dict[str, Any], sampling: dict[str, Any], param: str
) -> None:
    request = GenerateRequest(
        request_id="r",
        model_id="m",
        prompt_ids=[1],
        sampling=SamplingParams(**{"max_tokens": 5, **sampling}),
        **fields,
    )
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(request, lambda news: None)
    assert caught.value.param == param


async def test_the_observer_hears_of_every_step_and_beginning(runner: FakeRunner) -> None:
    class Observer:
        def __init__(self) -> None:
            self.rows: list[int] = []
            self.waits: list[float] = []
            self.timelines: list[Timeline] = []

        def request_begun(self, waited_s: float) -> None:
            self.waits.append(waited_s)

        def step_done(self, plan: StepPlan, seconds: float) -> None:
            self.rows.append(plan.num_tokens)

        def request_ended(self, request: GenerateRequest, timeline: Timeline) -> None:
            self.timelines.append(timeline)

    engine = Engine(runner)  # type: ignore[arg-type]
    engine.observer = observer = Observer()
    await engine.start()
    *earlier, last = await Client(engine, [1, 2, 3], max_tokens=3).deltas()
    await engine.stop()
    assert observer.rows == [3, 1, 1]
    assert len(observer.waits) == 1
    assert observer.waits[0] >= 0
    (timeline,) = observer.timelines
    assert timeline.begun_at is not None
    assert timeline.begun_at - timeline.submitted_at == observer.waits[0]
    assert timeline.first_token_at is not None
    assert timeline.ended_at is not None
    assert timeline.begun_at < timeline.first_token_at < timeline.ended_at
    assert (timeline.num_prompt_tokens, timeline.num_output_tokens) == (3, 3)
    assert timeline.prefill_s + timeline.decode_s == pytest.approx(timeline.inference_s)
    assert [delta.phases for delta in earlier] == [None, None]
    phases = last.phases
    assert phases is not None
    assert phases.load == 0
    assert phases.queue == pytest.approx(observer.waits[0], abs=1e-6)
    assert phases.prefill == pytest.approx(timeline.prefill_s, abs=1e-6)
    assert 0 < phases.decode <= timeline.decode_s + 1e-6
