"""The HTTP API over a real socket, asked by OpenAI's client, whose models check every answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from openai.types import Completion

from tests.fakes import MODEL, WORKER, FakeBackend, Script, Step, says, tiny_tokenizer
from xllm.config import ApiConfig
from xllm.errors import EngineFault, NoWorker, Overloaded, WorkerLost
from xllm.protocol import FinishReason, GenerateRequest, TokenDelta
from xllm.roles.openai_api import build_app, make_runner
from xllm.telemetry import Metrics

TOKENIZER = tiny_tokenizer()
ANSWER = "the größe fox 日本語 😀"
ANSWER_IDS = TOKENIZER.encode(ANSWER)
END = 1
HI = [{"role": "user", "content": "hi"}]
WAIT_S = 5.0


@dataclass
class Served:
    backend: FakeBackend
    metrics: Metrics
    url: str
    http: aiohttp.ClientSession
    client: openai.AsyncOpenAI
    """Refuses an answer that does not fit its models."""
    relaxed: openai.AsyncOpenAI
    """For a null where OpenAI sends one too, against its own client's models."""

    def metric(self, name: str) -> float:
        lines = self.metrics.render().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


Serve = Callable[..., "asyncio.Future[Served]"]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    closing = []

    async def start(
        script: Script | None = None,
        config: ApiConfig | None = None,
        is_leaving: Callable[[], bool] = lambda: False,
        **backend_options: object,
    ) -> Served:
        script = script or says(ANSWER_IDS, stop_token_id=END, cached_tokens=3)
        backend = FakeBackend(script, **backend_options)  # type: ignore[arg-type]
        metrics = Metrics()
        runner = make_runner(
            build_app(backend, config or ApiConfig(), metrics, is_leaving=is_leaving)
        )
        await runner.setup()
        closing.append(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        http = aiohttp.ClientSession(url)
        closing.append(http.close)
        client, relaxed = (
            openai.AsyncOpenAI(
                base_url=f"{url}/v1",
                api_key="none",
                max_retries=0,
                timeout=WAIT_S,
                _strict_response_validation=strict,
            )
            for strict in (True, False)
        )
        closing.extend((client.close, relaxed.close))
        return Served(backend, metrics, url, http, client, relaxed)

    yield start  # type: ignore[misc]
    for close in reversed(closing):
        await close()


async def sse_payloads(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with served.http.post(path, json=body) as response:
        assert response.status == 200
        raw = (await response.read()).decode()
    *events, done, rest = raw.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("stream", [True, False])
async def test_whoever_leaves_says_so_and_serves_on_without_keeping_connections(
    serve: Serve, stream: bool
) -> None:
    has_begun_to_leave: list[bool] = []
    served = await serve(is_leaving=lambda: bool(has_begun_to_leave))
    body = {"model": MODEL, "messages": HI, "stream": stream}
    for is_leaving in (False, True):
        if is_leaving:
            has_begun_to_leave.append(True)
        async with served.http.post("/v1/chat/completions", json=body) as response:
            assert response.status == 200
            assert ANSWER[:3] in await response.text()
            # A client that believes it may use the connection again finds it closed.
            assert (response.headers.get("Connection") == "close") == is_leaving
        async with served.http.get("/health") as response:
            assert response.status == (503 if is_leaving else 200)


async def test_a_chat_completion(serve: Serve) -> None:
    served = await serve()
    raw = await served.client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HI, extra_headers={"X-Request-Id": "mine-1"}
    )
    answer = raw.parse()
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["x-xllm-worker-id"] == WORKER
    [choice] = answer.choices
    assert choice.message.content == ANSWER
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.model == MODEL
    usage = answer.usage
    [generation] = served.backend.generations
    assert usage.prompt_tokens == len(generation.request.prompt_ids)
    assert usage.completion_tokens == len(ANSWER_IDS) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 3
    prompt = "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert TOKENIZER.decode(generation.request.prompt_ids, skip_special_tokens=False) == prompt


async def test_a_streamed_chat_completion(serve: Serve) -> None:
    served = await serve()
    stream = await served.client.chat.completions.create(
        model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
    )
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert stream.response.headers["x-xllm-worker-id"] == WORKER
    chunks = [chunk async for chunk in stream]
    *chunks, usage_chunk = chunks
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    texts = [chunk.choices[0].delta.content for chunk in chunks[1:-1]]
    assert "".join(texts) == ANSWER
    assert len(texts) > 3
    assert not any("\ufffd" in text for text in texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * len(chunks[:-1])
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].delta.content is None
    assert all(chunk.usage is None for chunk in chunks)
    assert usage_chunk.choices == []
    assert usage_chunk.usage.completion_tokens == len(ANSWER_IDS) + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_stream_as_bytes(serve: Serve) -> None:
    served = await serve(says(TOKENIZER.encode("fox")))
    body = {"messages": HI, "stream": True}
    payloads = await sse_payloads(served, "/v1/chat/completions", body)
    assert all("usage" not in payload for payload in payloads)
    assert payloads[0]["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert payloads[-1]["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    ]


async def test_several_samples(serve: Serve) -> None:
    served = await serve()
    answer = await served.client.chat.completions.create(model=MODEL, messages=HI, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == [ANSWER] * 3
    [generation] = served.backend.generations
    assert generation.request.n == 3
    assert answer.usage.prompt_tokens == len(generation.request.prompt_ids)

    texts = {0: "", 1: "", 2: ""}
    reasons = []
    stream = await served.client.chat.completions.create(model=MODEL, messages=HI, n=3, stream=True)
    async for chunk in stream:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert list(texts.values()) == [ANSWER] * 3
    assert reasons == ["stop"] * 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_never_leaks_and_ends_the_generation(
    serve: Serve, stream: bool
) -> None:
    served = await serve()
    options = {"model": MODEL, "prompt": "x", "max_tokens": 50, "stop": ["e fo", "zzz"]}
    if stream:
        # The client's model of a chunk knows no null finish_reason, which OpenAI sends in each but
        # the last: only that one is checked.
        options |= {"stream": True}
        payloads = await sse_payloads(served, "/v1/completions", options)
        Completion.model_validate(payloads[-1], strict=True)
        text = "".join(payload["choices"][0]["text"] for payload in payloads)
        reason = payloads[-1]["choices"][0]["finish_reason"]
    else:
        answer = await served.client.completions.create(**options)
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        assert answer.usage.completion_tokens < len(ANSWER_IDS)
    assert (text, reason) == ("the größ", "stop")
    [generation] = served.backend.generations
    await asyncio.wait_for(generation.cancelled.wait(), WAIT_S)
    assert generation.num_sent < len(ANSWER_IDS)


async def test_a_sample_that_stopped_does_not_end_the_others(serve: Serve) -> None:
    fox, dog = TOKENIZER.encode("fox stop."), TOKENIZER.encode("lazy dog")

    def script(request: GenerateRequest) -> list[Step]:
        longest = max(len(fox), len(dog))
        return [
            TokenDelta(
                request_id=request.request_id,
                attempt=0,
                index=index,
                offset=i,
                token_ids=ids[i : i + 1],
                finish_reason=FinishReason.LENGTH if i == len(ids) - 1 else None,
            )
            for i in range(longest)
            for index, ids in enumerate((fox, dog))
            if i < len(ids)
        ]

    served = await serve(script)
    answer = await served.client.completions.create(
        model=MODEL, prompt="x", n=2, max_tokens=50, stop="st"
    )
    assert [choice.text for choice in answer.choices] == ["fox ", "lazy dog"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]


async def test_log_probabilities_of_a_chat(serve: Serve) -> None:
    served = await serve()
    answer = await served.client.chat.completions.create(
        model=MODEL, messages=HI, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == ANSWER
    assert all(len(entry.top_logprobs) == 2 for entry in content)

    streamed = []
    stream = await served.client.chat.completions.create(
        model=MODEL, messages=HI, logprobs=True, top_logprobs=2, stream=True
    )
    async for chunk in stream:
        choice = chunk.choices[0]
        if choice.logprobs:
            assert choice.delta.content
            streamed += choice.logprobs.content
    assert streamed == content


async def test_log_probabilities_with_an_echoed_prompt(serve: Serve) -> None:
    served = await serve()
    answer = await served.relaxed.completions.create(
        model=MODEL, prompt="the dog", echo=True, logprobs=1, max_tokens=2
    )
    [choice] = answer.choices
    assert choice.text == "the dogthe "
    logprobs = choice.logprobs
    assert logprobs.tokens == ["the", " do", "g", "the", " "]
    assert logprobs.text_offset == [0, 3, 6, 7, 10]
    assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[1][" do"] == -0.5
    assert served.backend.generations[0].request.sampling.prompt_logprobs == 1


async def test_scoring_a_prompt_without_generating(serve: Serve) -> None:
    served = await serve()
    answer = await served.relaxed.completions.create(
        model=MODEL, prompt="the dog", echo=True, logprobs=0, max_tokens=0
    )
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("the dog", "length")
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    assert answer.usage.completion_tokens == 0


FOX = TOKENIZER.encode("fox")


@pytest.mark.parametrize(
    ("prompt", "prompt_ids"),
    [
        ("fox", [FOX]),
        (FOX, [FOX]),
        (["fox", "the"], [FOX, TOKENIZER.encode("the")]),
        ([FOX, [5]], [FOX, [5]]),
    ],
)
async def test_every_form_of_prompt(
    serve: Serve, prompt: object, prompt_ids: list[list[int]]
) -> None:
    served = await serve()
    answer = await served.client.completions.create(
        model=MODEL, prompt=prompt, n=2, echo=True, max_tokens=3
    )
    requests = [generation.request for generation in served.backend.generations]
    assert [request.prompt_ids for request in requests] == prompt_ids
    assert len({request.request_id for request in requests}) == len(requests)
    assert [choice.index for choice in answer.choices] == list(range(2 * len(prompt_ids)))
    for choice in answer.choices:
        assert choice.text == TOKENIZER.decode(prompt_ids[choice.index // 2]) + "the gr"
    assert answer.usage.prompt_tokens == sum(map(len, prompt_ids))
    assert answer.usage.completion_tokens == 3 * len(answer.choices)


async def test_what_a_request_asks_reaches_the_backend(serve: Serve) -> None:
    served = await serve()
    await served.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, *HI],
        seed=7,
        temperature=0.5,
        max_completion_tokens=9,
        logit_bias={"5": -100},
        extra_body={
            "cache_salt": "tenant",
            "top_k": 4,
            "min_p": 0.1,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "ignore_eos": True,
            "unheard_of": 1,
            "add_generation_prompt": False,
            "chat_template_kwargs": {"unused": True},
        },
    )
    request = served.backend.generations[0].request
    assert request.salt == "tenant"
    sampling = request.sampling
    assert (sampling.seed, sampling.temperature, sampling.max_tokens) == (7, 0.5, 9)
    assert (sampling.top_k, sampling.min_p, sampling.min_tokens) == (4, 0.1, 2)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ([9], True)
    assert sampling.logit_bias == {5: -100.0}
    prompt = "<|start|>system\nbe brief<|end|>\n<|start|>user\nhi<|end|>\n"
    assert TOKENIZER.decode(request.prompt_ids, skip_special_tokens=False) == prompt


async def test_models(serve: Serve) -> None:
    served = await serve(models=["a/b", "c"])
    assert [model.id for model in (await served.client.models.list()).data] == ["a/b", "c"]
    async with served.http.get("/v1/models/a/b") as response:
        model = await response.json()
    assert (model["id"], model["max_model_len"]) == ("a/b", 256)
    with pytest.raises(openai.NotFoundError):
        await served.client.models.retrieve("nope")


async def test_the_model_may_be_left_out_only_if_there_is_one(serve: Serve) -> None:
    for models, status in (["one"], 200), (["one", "two"], 404), ([], 503):
        served = await serve(models=models)
        async with served.http.post("/v1/completions", json={"prompt": "x"}) as response:
            assert response.status == status


async def test_tokenize_and_detokenize(serve: Serve) -> None:
    served = await serve()

    async def post(path: str, **body: object) -> dict[str, object]:
        async with served.http.post(path, json=body) as response:
            assert response.status == 200
            answer: dict[str, object] = await response.json()
            return answer

    answer = await post("/tokenize", prompt="fox the", return_token_strs=True)
    ids = TOKENIZER.encode("fox the")
    assert answer["tokens"] == ids
    assert answer["count"] == len(ids)
    assert answer["max_model_len"] == 256
    assert "".join(answer["token_strs"]) == "fox the"  # type: ignore[arg-type]
    assert await post("/detokenize", tokens=ids) == {"prompt": "fox the"}
    assert await post("/detokenize", tokens=[END]) == {"prompt": "<|end|>"}
    chat = await post("/tokenize", messages=HI, add_generation_prompt=False)
    assert TOKENIZER.decode(chat["tokens"], False) == "<|start|>user\nhi<|end|>\n"  # type: ignore[arg-type]
    assert (await post("/tokenize", prompt=""))["count"] == 0


async def test_health_follows_the_backend(serve: Serve) -> None:
    served = await serve(models=[])
    async with served.http.get("/health") as response:
        assert response.status == 503
    served.backend.models.append(MODEL)
    async with served.http.get("/health") as response:
        assert response.status == 200


async def test_metrics_of_a_request(serve: Serve) -> None:
    served = await serve()
    await served.client.chat.completions.create(model=MODEL, messages=HI, n=2)
    assert served.metric("xllm_time_to_first_token_seconds_count") == 1
    assert served.metric("xllm_e2e_request_latency_seconds_count") == 1
    assert served.metric("xllm_inter_token_latency_seconds_count") == 2 * len(ANSWER_IDS)
    assert served.metric("xllm_request_generation_tokens_sum") == 2 * (len(ANSWER_IDS) + 1)
    assert served.metric('xllm_request_success_total{finished_reason="stop"}') == 2
    assert served.metric("xllm_api_requests_in_flight") == 0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NoWorker("no worker"), openai.InternalServerError),
        (Overloaded("full", retry_after_s=7), openai.RateLimitError),
        (EngineFault("broken"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("where", ["refused at once", "before the first token"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_has_its_own_status(
    serve: Serve, error: Overloaded, kind: type[openai.APIStatusError], where: str, stream: bool
) -> None:
    served = await serve(lambda request: [error])
    if where == "refused at once":
        served.backend.refusal = error
    with pytest.raises(kind) as caught:
        await served.client.chat.completions.create(model=MODEL, messages=HI, stream=stream)
    response = caught.value.response
    assert response.status_code == error.http_status
    assert caught.value.body["message"] == error.message
    assert response.headers["x-request-id"]
    assert ("x-xllm-worker-id" in response.headers) == (where == "before the first token")
    if error.retryable:
        assert response.headers["retry-after"] == str(error.retry_after_s or 1)
    assert served.metric(f'xllm_request_errors_total{{label="{error.label}"}}') == 1


def loses_its_worker(request: GenerateRequest) -> list[Step]:
    [first, *_] = says(ANSWER_IDS)(request)
    return [first, WorkerLost("the worker is gone")]


async def test_an_error_within_a_stream_is_an_event_and_there_is_no_end(serve: Serve) -> None:
    served = await serve(loses_its_worker)
    stream = await served.client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    chunks = aiter(stream)
    assert (await anext(chunks)).choices[0].delta.role == "assistant"
    assert (await anext(chunks)).choices[0].delta.content == "the"
    with pytest.raises(openai.APIError, match="the worker is gone"):
        await anext(chunks)
    async with served.http.post(
        "/v1/completions", json={"prompt": "x", "stream": True}
    ) as response:
        assert b"[DONE]" not in await response.read()
    assert served.metric('xllm_request_errors_total{label="worker_lost"}') == 2


async def test_an_error_within_a_whole_answer_is_its_status(serve: Serve) -> None:
    served = await serve(loses_its_worker)
    with pytest.raises(openai.InternalServerError, match="the worker is gone"):
        await served.client.chat.completions.create(model=MODEL, messages=HI)


@pytest.mark.parametrize("script", [lambda request: [], lambda request: 1 // 0])
async def test_a_backend_that_breaks_its_contract_is_an_engine_fault(
    serve: Serve, script: Script
) -> None:
    served = await serve(script)
    with pytest.raises(openai.InternalServerError):
        await served.client.completions.create(model=MODEL, prompt="x")
    # And the server keeps serving.
    assert (await served.client.models.list()).data


async def test_one_failure_of_several_prompts_cancels_the_others(serve: Serve) -> None:
    never = asyncio.Event()

    def script(request: GenerateRequest) -> list[Step]:
        return [EngineFault("broken")] if request.prompt_ids == FOX else [never]

    served = await serve(script)
    with pytest.raises(openai.InternalServerError):
        await served.client.completions.create(model=MODEL, prompt=["the", "fox"])
    assert all(generation.cancelled.is_set() for generation in served.backend.generations)


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_request", None),
        (b"{", 400, "invalid_request", None),
        (b"[]", 400, "invalid_request", None),
        (b"\xff", 400, "invalid_request", None),
        (b'{"prompt": "\\ud800"}', 400, "invalid_request", None),
        (b'{"prompt": NaN}', 400, "invalid_request", None),
        (b"[" * 100_000, 400, "invalid_request", None),
        (b'{"prompt": []}', 400, "invalid_request", "prompt"),
        (b'{"prompt": [300]}', 400, "invalid_request", "prompt"),
        (b'{"prompt": [-1]}', 400, "invalid_request", "prompt"),
        (b'{"prompt": [[1], [99999999999999999999]]}', 400, "invalid_request", "prompt[1][0]"),
        (b'{"prompt": "x", "model": "nope"}', 404, "model_not_found", "model"),
        (
            b'{"prompt": "x", "n": 128, "prompt": ["x","x","x","x","x"]}',
            400,
            "invalid_request",
            "n",
        ),
        (b'{"prompt": "x", "max_tokens": 256}', 400, "context_length_exceeded", "max_tokens"),
        (b'{"prompt": "%s"}' % (b"z" * 3000), 400, "context_length_exceeded", "prompt"),
        (b'{"prompt": "x", "tools": [{}]}', 400, "invalid_request", "tools"),
    ],
)
async def test_bad_input_is_answered_and_serving_goes_on(
    serve: Serve, body: bytes, status: int, code: str, param: str | None
) -> None:
    served = await serve()
    async with served.http.post("/v1/completions", data=body) as response:
        assert response.status == status
        assert response.headers["X-Request-Id"]
        error = (await response.json())["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert served.backend.generations == []
    assert (await served.client.completions.create(model=MODEL, prompt="x")).choices


async def test_a_body_over_the_limit(serve: Serve) -> None:
    served = await serve(config=ApiConfig(max_body_size=1000))
    big = json.dumps({"prompt": "x" * 1000}).encode()

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(big), 100):
            yield big[start : start + 100]

    for data in big, in_chunks():
        async with served.http.post("/v1/completions", data=data) as response:
            assert response.status == 413
            assert "1000" in (await response.json())["error"]["message"]
            assert response.headers["X-Request-Id"]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "ö"])
async def test_a_request_id_unfit_for_a_header_is_replaced(serve: Serve, given: str) -> None:
    served = await serve()
    async with served.http.get("/health", headers={"X-Request-Id": given}) as response:
        assert response.headers["X-Request-Id"].startswith("req-")


@pytest.mark.parametrize(("path", "status"), [("/nope", 404), ("/v1/completions", 405)])
async def test_wrong_paths_and_methods_have_an_error_object(
    serve: Serve, path: str, status: int
) -> None:
    served = await serve()
    async with served.http.get(path) as response:
        assert response.status == status
        assert path in (await response.json())["error"]["message"]
        assert response.headers["X-Request-Id"]


async def test_too_many_requests_are_refused_until_one_ends(serve: Serve) -> None:
    go_on = asyncio.Event()
    served = await serve(
        lambda request: [go_on, *says(FOX)(request)], ApiConfig(max_concurrent_requests=1)
    )
    ask = served.client.completions.create
    first = asyncio.create_task(ask(model=MODEL, prompt="x"))
    await asyncio.wait_for(served.backend.started.wait(), WAIT_S)
    assert served.metric("xllm_api_requests_in_flight") == 1
    with pytest.raises(openai.RateLimitError) as caught:
        await ask(model=MODEL, prompt="x")
    assert caught.value.response.headers["retry-after"] == "1"
    # What costs nothing is still answered.
    assert (await served.client.models.list()).data
    go_on.set()
    assert (await first).choices[0].text == "fox"
    assert (await ask(model=MODEL, prompt="x")).choices[0].text == "fox"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens_before", [0, 2])
async def test_a_client_that_goes_away_cancels_its_generation(
    serve: Serve, stream: bool, num_tokens_before: int
) -> None:
    never = asyncio.Event()
    served = await serve(
        lambda request: [*list(says(ANSWER_IDS)(request))[:num_tokens_before], never]
    )
    body = {"prompt": ["x", "y"], "stream": stream}
    asking = asyncio.create_task(served.http.post("/v1/completions", json=body))
    await asyncio.wait_for(served.backend.started.wait(), WAIT_S)
    if stream and num_tokens_before:
        response = await asyncio.wait_for(asking, WAIT_S)
        await response.content.readline()
        response.close()
    else:
        asking.cancel()
    for generation in served.backend.generations:
        await asyncio.wait_for(generation.cancelled.wait(), WAIT_S)
    assert len(served.backend.generations) == 2
    # The handler ends in the same turn of the loop.
    await asyncio.sleep(0)
    assert served.metric("xllm_api_requests_in_flight") == 0
    assert served.metric("xllm_client_disconnects_total") == 1


async def test_a_long_prompt_leaves_the_event_loop_free(serve: Serve) -> None:
    served = await serve(max_model_len=1_000_000)
    text = "the quick brown fox " * 20_000
    asking = asyncio.create_task(served.client.completions.create(model=MODEL, prompt=text))
    turns = 0
    while not served.backend.started.is_set():
        await asyncio.sleep(0)
        turns += 1
    await asking
    # Encoding takes a tenth of a second; a loop blocked by it would turn a few times only.
    assert turns > 200
