"""Real clients against the API: what they send is taken, what they get they understand.

The model is a script that says what a model might: tool calls in Hermes' notation, thoughts.
What Open WebUI, vLLM's benchmark and guidellm send was read from their sources.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import anthropic
import openai
import pytest
from aiohttp import web
from pydantic import BaseModel

from tests.fakes import MODEL, FakeBackend, Script, says, tiny_tokenizer
from xllm.config import ApiConfig
from xllm.errors import Overloaded
from xllm.protocol import GenerateRequest
from xllm.roles.openai_api import build_app, make_runner
from xllm.telemetry import Metrics

TOKENIZER = tiny_tokenizer()
END = 1
HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
CALLS = (
    'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
ANSWER = "Warm, größer 😀."
TIMEOUT_S = 30.0


def tells(text: str) -> Script:
    return says(TOKENIZER.encode(text), stop_token_id=END, cached_tokens=3)


def looks_and_answers(request: GenerateRequest) -> Any:
    """Calls tools; with their results in the prompt, answers."""
    prompt = TOKENIZER.decode(request.prompt_ids, skip_special_tokens=False)
    return tells(ANSWER if "<tool_response>" in prompt else CALLS)(request)


@dataclass
class Served:
    backend: FakeBackend
    url: str

    @property
    def prompt(self) -> str:
        """Of the last request."""
        ids = self.backend.generations[-1].request.prompt_ids
        return TOKENIZER.decode(ids, skip_special_tokens=False)

    @property
    def request(self) -> GenerateRequest:
        return self.backend.generations[-1].request


Serve = Callable[..., Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners = []

    async def start(script: Script, **config: Any) -> Served:
        backend = FakeBackend(script, max_model_len=4096)
        runner = make_runner(build_app(backend, ApiConfig(**config), Metrics()))
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return Served(backend, f"http://127.0.0.1:{runner.addresses[0][1]}")

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def openai_client() -> AsyncIterator[Callable[[Served], openai.AsyncOpenAI]]:
    clients = []

    def new(served: Served) -> openai.AsyncOpenAI:
        client = openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="k", max_retries=0, timeout=TIMEOUT_S
        )
        clients.append(client)
        return client

    yield new
    for client in clients:
        await client.close()


@pytest.fixture
async def anthropic_client() -> AsyncIterator[Callable[[Served], anthropic.AsyncAnthropic]]:
    clients = []

    def new(served: Served) -> anthropic.AsyncAnthropic:
        client = anthropic.AsyncAnthropic(
            base_url=served.url, api_key="k", max_retries=0, timeout=TIMEOUT_S
        )
        clients.append(client)
        return client

    yield new
    for client in clients:
        await client.close()


NewOpenAI = Callable[[Served], openai.AsyncOpenAI]
NewAnthropic = Callable[[Served], anthropic.AsyncAnthropic]


# ---- openai: chat ----


async def test_openai_calls_tools_whole(serve: Serve, openai_client: NewOpenAI) -> None:
    served = await serve(tells(CALLS))
    answer = await openai_client(served).chat.completions.create(
        model=MODEL, messages=HI, tools=TOOLS
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("get_weather", {"city": "Paris"}),
        ("now", {}),
    ]
    assert len({call.id for call in calls}) == 2
    assert "get_weather" in served.prompt
    assert not served.request.sampling.grammar


@pytest.mark.parametrize("stream", [True, False])
async def test_one_call_where_more_are_not_wanted(
    serve: Serve, openai_client: NewOpenAI, stream: bool
) -> None:
    client = openai_client(await serve(tells(CALLS)))
    options: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False}
    if stream:
        async with client.chat.completions.stream(model=MODEL, messages=HI, **options) as events:
            answer: Any = await events.get_final_completion()
    else:
        answer = await client.chat.completions.create(model=MODEL, messages=HI, **options)
    [call] = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}


async def test_openai_loops_over_tools_in_a_stream(serve: Serve, openai_client: NewOpenAI) -> None:
    client = openai_client(await serve(looks_and_answers))
    messages: list[Any] = list(HI)
    for _ in range(2):
        async with client.chat.completions.stream(
            model=MODEL, messages=messages, tools=TOOLS
        ) as stream:
            message = (await stream.get_final_completion()).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
            messages.append(result)
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[-1]["content"] == ANSWER


async def test_deltas_of_calls_are_those_of_openai(serve: Serve, openai_client: NewOpenAI) -> None:
    client = openai_client(await serve(tells(CALLS)))
    stream = await client.chat.completions.create(
        model=MODEL, messages=HI, tools=TOOLS, stream=True
    )
    chunks = [chunk.choices[0] async for chunk in stream]
    assert chunks[-1].finish_reason == "tool_calls"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    for index, name in enumerate(("get_weather", "now")):
        first, *others = [delta for delta in deltas if delta.index == index]
        assert (first.type, first.function.name) == ("function", name)
        assert first.id.startswith("call_")
        assert first.function.arguments == ""
        assert others
        assert all(other.id is None and other.function.name is None for other in others)
    cities = [delta.function.arguments for delta in deltas if delta.index == 0]
    assert len(cities) > 3, "arguments come in pieces"
    assert json.loads("".join(cities)) == {"city": "Paris"}


@pytest.mark.parametrize(
    ("tool_choice", "finish_reason", "is_forced"),
    [
        ("auto", "tool_calls", False),
        ("required", "tool_calls", True),
        ({"type": "function", "function": {"name": "now"}}, "stop", True),
        ("none", "stop", False),
    ],
)
async def test_tool_choice(
    serve: Serve,
    openai_client: NewOpenAI,
    tool_choice: Any,
    finish_reason: str,
    is_forced: bool,
) -> None:
    served = await serve(tells(CALLS))
    answer = await openai_client(served).chat.completions.create(
        model=MODEL, messages=HI, tools=TOOLS, tool_choice=tool_choice
    )
    [choice] = answer.choices
    assert choice.finish_reason == finish_reason
    grammar = served.request.sampling.grammar
    assert bool(grammar) == is_forced
    assert ("get_weather" in grammar) == (tool_choice == "required")
    if tool_choice == "none":
        assert choice.message.content == CALLS
        assert choice.message.tool_calls is None
        assert "get_weather" not in served.prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "?"}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "?"}},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"guided_regex": "a("}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {"grammar": "root ::= ["}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
    ],
)
async def test_what_cannot_be_is_refused_before_a_worker_hears_of_it(
    serve: Serve, openai_client: NewOpenAI, fields: dict[str, Any], param: str
) -> None:
    served = await serve(tells("x"))
    with pytest.raises(openai.BadRequestError) as caught:
        await openai_client(served).chat.completions.create(
            model=MODEL, messages=HI, extra_body=fields
        )
    assert caught.value.param == param
    assert served.backend.generations == []


@pytest.mark.parametrize("depth", [150, 500, 1000])
async def test_schemas_of_any_depth_are_answered(serve: Serve, depth: int) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"items": schema}
    function = {"name": "f", "parameters": schema}
    chat = {"model": MODEL, "messages": HI, "max_tokens": 9}
    served = await serve(tells("x"))
    async with aiohttp.ClientSession() as http:
        for path, fields in (
            ("chat/completions", {"guided_json": schema}),
            ("chat/completions", {"tools": [{"type": "function", "function": function}]}),
            (
                "chat/completions",
                {
                    "tools": [{"type": "function", "function": function}],
                    "tool_choice": "required",
                },
            ),
            ("messages", {"tools": [{"name": "f", "input_schema": schema}]}),
            (
                "messages",
                {
                    "messages": [
                        {
                            "role": "assistant",
                            "content": [
                                {"type": "tool_use", "id": "1", "name": "f", "input": schema}
                            ],
                        },
                        {"role": "user", "content": "so?"},
                    ]
                },
            ),
        ):
            body = deep_json({**chat, **fields}, schema, depth)
            async with http.post(f"{served.url}/v1/{path}", data=body) as response:
                assert response.status in (200, 400), await response.text()


def deep_json(body: dict[str, Any], schema: dict[str, Any], depth: int) -> str:
    """`json.dumps(body)`, which gives up where `schema` is too deep."""

    def flat(value: Any) -> Any:
        if value is schema:
            return "SCHEMA"
        if isinstance(value, dict):
            return {key: flat(entry) for key, entry in value.items()}
        return [flat(entry) for entry in value] if isinstance(value, list) else value

    deep = '{"items":' * depth + "{}" + "}" * depth
    return json.dumps(flat(body)).replace('"SCHEMA"', deep)


class Person(BaseModel):
    name: str
    likes: Literal["tea", "coffee"]


async def test_openai_parses_into_a_model(serve: Serve, openai_client: NewOpenAI) -> None:
    served = await serve(tells('{"name": "Ada", "likes": "tea"}'))
    answer = await openai_client(served).chat.completions.parse(
        model=MODEL, messages=HI, response_format=Person
    )
    assert answer.choices[0].message.parsed == Person(name="Ada", likes="tea")
    assert "coffee" in served.request.sampling.grammar


async def test_thoughts_are_apart(serve: Serve, openai_client: NewOpenAI) -> None:
    served = await serve(
        tells(f"<think>\nhm, {{}}\n</think>\n\n{ANSWER}"), reasoning_parser="qwen3"
    )
    client = openai_client(served)
    whole = await client.chat.completions.create(model=MODEL, messages=HI)
    message = whole.choices[0].message
    assert (message.reasoning_content, message.content) == ("hm, {}", ANSWER)  # type: ignore[attr-defined]
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(thoughts) == "hm, {}"
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    # The answer is held to its form, the thoughts before it are not.
    form: Any = {"type": "json_object"}
    await client.chat.completions.create(model=MODEL, messages=HI, response_format=form)
    assert "</think>" in served.request.sampling.grammar


# ---- openai: responses ----


async def test_openai_responses(serve: Serve, openai_client: NewOpenAI) -> None:
    served = await serve(tells(ANSWER))
    answer = await openai_client(served).responses.create(
        model=MODEL, input="hi", instructions="be short", max_output_tokens=200
    )
    assert answer.output_text == ANSWER
    assert answer.status == "completed"
    assert answer.usage.input_tokens_details.cached_tokens == 3
    assert answer.usage.output_tokens == len(TOKENIZER.encode(ANSWER)) + 1
    assert served.prompt.startswith("<|start|>system\nbe short<|end|>")
    cut = await openai_client(served).responses.create(model=MODEL, input="hi", max_output_tokens=2)
    assert cut.status == "incomplete"
    assert cut.incomplete_details.reason == "max_output_tokens"


async def test_openai_responses_parse(serve: Serve, openai_client: NewOpenAI) -> None:
    served = await serve(tells('{"name": "Ada", "likes": "tea"}'))
    answer = await openai_client(served).responses.parse(
        model=MODEL, input="hi", text_format=Person
    )
    assert answer.output_parsed == Person(name="Ada", likes="tea")
    assert "coffee" in served.request.sampling.grammar


async def test_openai_responses_loop_over_tools_in_a_stream(
    serve: Serve, openai_client: NewOpenAI
) -> None:
    served = await serve(looks_and_answers)
    client = openai_client(served)
    tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    items: list[Any] = [{"role": "user", "content": "hi"}]
    kinds: list[str] = []
    for _ in range(2):
        async with client.responses.stream(model=MODEL, input=items, tools=tools) as stream:
            events = [event async for event in stream]
            response = await stream.get_final_response()
        kinds += [event.type for event in events]
        numbers = [event.sequence_number for event in events]
        assert numbers == sorted(numbers)
        items += [item.model_dump(exclude_none=True) for item in response.output]
        calls = [item for item in response.output if item.type == "function_call"]
        for call in calls:
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
            items.append(result)
        if not calls:
            break
    assert response.output_text == ANSWER
    assert "<tool_response>\n21\n</tool_response>" in served.prompt
    assert '"name": "get_weather"' in served.prompt
    for kind in (
        "response.created",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ):
        assert kind in kinds


async def test_openai_responses_think(serve: Serve, openai_client: NewOpenAI) -> None:
    served = await serve(tells(f"hm</think>{ANSWER}"), reasoning_parser="deepseek-r1")
    client = openai_client(served)
    whole = await client.responses.create(model=MODEL, input="hi")
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output[0].content[0].text == "hm"
    # What the model thought may come back.
    items: list[Any] = [item.model_dump(exclude_none=True) for item in whole.output]
    again = await client.responses.create(
        model=MODEL, input=[*HI, *items, {"role": "user", "content": "and?"}]
    )
    assert again.output_text == ANSWER


@pytest.mark.parametrize("name", ["previous_response_id", "background"])
async def test_what_needs_a_store_is_refused(
    serve: Serve, openai_client: NewOpenAI, name: str
) -> None:
    client = openai_client(await serve(tells("x")))
    value: Any = True if name == "background" else "resp_1"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model=MODEL, input="hi", **{name: value})
    assert caught.value.param == name


# ---- anthropic ----


async def test_anthropic_messages(serve: Serve, anthropic_client: NewAnthropic) -> None:
    served = await serve(tells(ANSWER))
    client = anthropic_client(served)
    answer = await client.messages.create(
        model=MODEL, max_tokens=200, system="be short", messages=HI, stop_sequences=["größer"]
    )
    assert [block.text for block in answer.content] == ["Warm, "]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "größer")
    assert answer.usage.cache_read_input_tokens == 3
    assert answer.usage.input_tokens + 3 == len(served.request.prompt_ids)
    counted = await client.messages.count_tokens(model=MODEL, system="be short", messages=HI)
    assert counted.input_tokens == len(served.request.prompt_ids)
    cut = await client.messages.create(model=MODEL, max_tokens=2, messages=HI)
    assert cut.stop_reason == "max_tokens"


async def test_anthropic_loops_over_tools_in_a_stream(
    serve: Serve, anthropic_client: NewAnthropic
) -> None:
    served = await serve(looks_and_answers)
    client = anthropic_client(served)
    tools: list[Any] = [
        {"name": tool["function"]["name"], "input_schema": WEATHER} for tool in TOOLS
    ]
    messages: list[Any] = list(HI)
    for _ in range(2):
        async with client.messages.stream(
            model=MODEL, max_tokens=300, messages=messages, tools=tools
        ) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            answer = await stream.get_final_message()
        content = [block.model_dump(exclude_none=True) for block in answer.content]
        messages.append({"role": "assistant", "content": content})
        if answer.stop_reason != "tool_use":
            break
        assert text == "I look."
        assert [b.input for b in answer.content if b.type == "tool_use"] == [{"city": "Paris"}, {}]
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "21"}
            for block in answer.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
    assert text == ANSWER
    assert answer.stop_reason == "end_turn"
    assert "<tool_response>\n21\n</tool_response>" in served.prompt


async def test_anthropic_thinks_and_chooses_tools(
    serve: Serve, anthropic_client: NewAnthropic
) -> None:
    served = await serve(tells(f"<think>hm</think>{CALLS}"), reasoning_parser="qwen3")
    client = anthropic_client(served)
    tools: list[Any] = [{"name": "now", "input_schema": {"type": "object"}}]
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 300, "messages": HI, "tools": tools}
    answer = await client.messages.create(**options, tool_choice={"type": "tool", "name": "now"})
    kinds = [block.type for block in answer.content]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    assert answer.stop_reason == "tool_use"
    assert "now" in served.request.sampling.grammar
    async with client.messages.stream(**options, tool_choice={"type": "any"}) as stream:
        streamed = await stream.get_final_message()
    assert [block.type for block in streamed.content] == kinds
    assert streamed.content[0].thinking == "hm"


async def test_errors_are_anthropics(serve: Serve, anthropic_client: NewAnthropic) -> None:
    served = await serve(tells("x"))
    client = anthropic_client(served)
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.messages.create(model="nope", max_tokens=1, messages=HI)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as bad:
        await client.messages.create(model=MODEL, max_tokens=0, messages=HI)
    assert bad.value.body["error"]["message"].startswith("max_tokens")
    served.backend.script = lambda request: [*list(tells("ab")(request))[:1], Overloaded("full")]
    with pytest.raises(anthropic.APIStatusError):
        async with client.messages.stream(model=MODEL, max_tokens=9, messages=HI) as stream:
            await stream.get_final_message()


# ---- litellm ----


@pytest.mark.filterwarnings("ignore")
async def test_litellm(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    import litellm

    served = await serve(tells(CALLS))
    options: dict[str, Any] = {"api_key": "k", "messages": HI, "timeout": TIMEOUT_S}
    as_openai = {"model": f"openai/{MODEL}", "api_base": f"{served.url}/v1"}
    answer = await litellm.acompletion(**options, **as_openai, tools=TOOLS)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == [
        "get_weather",
        "now",
    ]
    stream = await litellm.acompletion(**options, **as_openai, tools=TOOLS, stream=True)
    whole = litellm.stream_chunk_builder([chunk async for chunk in stream])
    assert [json.loads(c.function.arguments) for c in whole.choices[0].message.tool_calls] == [
        {"city": "Paris"},
        {},
    ]
    as_anthropic = {"model": f"anthropic/{MODEL}", "api_base": served.url, "max_tokens": 300}
    answer = await litellm.acompletion(**options, **as_anthropic)
    assert answer.choices[0].message.content.startswith("I look.")


# ---- requests as others send them ----


async def events_of(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{served.url}{path}", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        lines = (await response.text()).splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(entry) for entry in data if entry != "[DONE]"]


async def test_open_webui(serve: Serve) -> None:
    """Its models, a chat with tools and parameters, the results, a title, a continued answer."""
    served = await serve(looks_and_answers)
    async with aiohttp.ClientSession() as http:
        headers = {"Authorization": "Bearer k", "X-OpenWebUI-User-Name": "Ada"}
        async with http.get(f"{served.url}/v1/models", headers=headers) as response:
            assert (await response.json())["data"][0]["id"] == MODEL
        tools = [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "The weather.",
                    "parameters": {**WEATHER, "type": "object"},
                },
            }
        ]
        chat = {
            "stream": True,
            "model": MODEL,
            "messages": [{"role": "system", "content": "be short"}, *HI],
            "temperature": 0.7,
            "top_p": 0.9,
            "min_p": 0.0,
            "frequency_penalty": 0.1,
            "reasoning_effort": "medium",
            "seed": 1,
            "stop": ["###"],
            "logit_bias": {"5": -100},
            "num_ctx": 4096,
            "keep_alive": "5m",
            "stream_options": {"include_usage": True},
            "tools": tools,
        }
        chunks = await events_of(served, "/v1/chat/completions", chat)
        calls = [
            call
            for chunk in chunks
            for choice in chunk["choices"]
            for call in choice["delta"].get("tool_calls", ())
        ]
        assert calls[0]["function"]["name"] == "get_weather"
        assert chunks[-1]["usage"]["completion_tokens"] > 0
        results = [
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [
                    {
                        "index": 0,
                        "id": calls[0]["id"],
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": calls[0]["id"], "content": "21"},
        ]
        chunks = await events_of(
            served, "/v1/chat/completions", {**chat, "messages": [*HI, *results]}
        )
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
        assert text == ANSWER
        title = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "### Task:\nGenerate a title"}],
            "stream": False,
            "max_completion_tokens": 1000,
        }
        async with http.post(f"{served.url}/v1/chat/completions", json=title) as response:
            assert (await response.json())["choices"][0]["message"]["content"]
    begun = [*HI, {"role": "assistant", "content": "It is "}]
    go_on = {"continue_final_message": True, "add_generation_prompt": False}
    await events_of(
        served,
        "/v1/chat/completions",
        {"model": MODEL, "stream": True, "messages": begun, **go_on},
    )
    assert served.prompt.endswith("<|start|>assistant\nIt is")


async def test_vllm_bench_serve(serve: Serve) -> None:
    served = await serve(says(TOKENIZER.encode("ab" * 20)))
    common = {"model": MODEL, "stream": True, "ignore_eos": True}
    usage = {"stream_options": {"include_usage": True}}
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    for path, body in (
        (
            "/v1/completions",
            {"prompt": "hi", "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None, **usage},
        ),
        ("/v1/chat/completions", {**chat, "max_completion_tokens": 8, **usage}),
    ):
        events = await events_of(served, path, {**common, **body})
        assert events[-1]["usage"]["completion_tokens"] == 8
        assert served.request.sampling.ignore_eos
    body = {"input": "hi", "max_output_tokens": 8, "store": False, "temperature": 0.0}
    events = await events_of(served, "/v1/responses", {**common, **body})
    assert events[-1]["response"]["usage"]["output_tokens"] == 8
    assert served.request.sampling.ignore_eos
    # With --structured-output and friends as extra_body.
    body = {**chat, "max_completion_tokens": 8, "structured_outputs": {"json": WEATHER}}
    await events_of(served, "/v1/chat/completions", {**common, **body})
    assert "city" in served.request.sampling.grammar


async def test_guidellm(serve: Serve) -> None:
    served = await serve(says(TOKENIZER.encode("ab" * 20)))
    options = {"include_usage": True, "continuous_usage_stats": True}
    fixed = {"stop": None, "ignore_eos": True}
    common = {"model": MODEL, "stream": True}
    texts = [{"type": "text", "text": "hi"}]
    for path, body in (
        ("/v1/completions", {"prompt": "hi", "max_tokens": 8, "stream_options": options}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": texts}],
                "max_completion_tokens": 8,
                "stream_options": options,
            },
        ),
    ):
        events = await events_of(served, path, {**common, **fixed, **body})
        assert events[-1]["usage"]["completion_tokens"] == 8
    item = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    body = {"input": [item], "instructions": "x", "max_output_tokens": 8}
    events = await events_of(served, "/v1/responses", {**common, **fixed, **body})
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["usage"]["output_tokens"] == 8


# ---- browsers ----


async def test_pages_of_other_origins(serve: Serve) -> None:
    served = await serve(tells("x"), cors_allow_origins="https://a.example,https://b.example")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    body = {"model": MODEL, "messages": HI}
    url = f"{served.url}/v1/chat/completions"
    async with aiohttp.ClientSession() as http:
        async with http.options(url, headers={"Origin": "https://a.example", **asks}) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
            assert response.headers["Access-Control-Allow-Headers"] == "x-api-key"
        for origin, allowed in (("https://b.example", True), ("https://c.example", False)):
            headers = {"Origin": origin}
            async with http.post(url, json=body, headers=headers) as response:
                got = response.headers.get("Access-Control-Allow-Origin")
                assert got == (origin if allowed else None)
                assert response.headers["Vary"] == "Origin"
            async with http.options(url, headers={**headers, **asks}) as response:
                assert response.status == (204 if allowed else 405)
    served = await serve(tells("x"), cors_allow_origins="*")
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{served.url}/v1/models/x", headers={"Origin": "https://c.example"}) as response,
    ):
        assert response.status == 404
        assert response.headers["Access-Control-Allow-Origin"] == "*"
    served = await serve(tells("x"))
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{served.url}/v1/models", headers={"Origin": "https://c.example"}) as response,
    ):
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_many_clients_at_once_get_their_own_answers(
    serve: Serve, openai_client: NewOpenAI
) -> None:
    client = openai_client(await serve(looks_and_answers))

    async def ask() -> int:
        answer = await client.chat.completions.create(
            model=MODEL, messages=HI, tools=TOOLS, n=3, stream=False
        )
        return sum(len(choice.message.tool_calls) for choice in answer.choices)

    assert await asyncio.gather(*(ask() for _ in range(8))) == [6] * 8
