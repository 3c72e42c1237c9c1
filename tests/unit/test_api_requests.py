from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import ref

import pytest

from tests.fakes import MODEL, tiny_tokenizer
from xllm.errors import InvalidRequest
from xllm.protocol import ModelCard, SamplingParams
from xllm.roles.api.body import validate
from xllm.roles.api.errors import ContextLengthExceeded
from xllm.roles.api.prompts import PromptEncoder
from xllm.roles.api.requests import ChatCompletionRequest, CompletionRequest
from xllm.roles.api.sampling import choose_seed, sampling_params
from xllm.tokenizer import SamplingDefaults

CARD = ModelCard(model_id=MODEL, max_model_len=100, vocab_size=50, created=0)
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def completion(**fields: Any) -> CompletionRequest:
    return validate(CompletionRequest, {"prompt": "hi", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return validate(ChatCompletionRequest, {**CHAT, **fields})


def sampling(
    request: ChatCompletionRequest | CompletionRequest,
    *,
    num_prompt_tokens: int = 10,
    defaults: SamplingDefaults | None = None,
) -> SamplingParams:
    return sampling_params(
        request,
        seed=1,
        num_prompt_tokens=num_prompt_tokens,
        defaults=defaults or SamplingDefaults(),
        card=CARD,
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "1"}, "n"),
        ({"seed": 1 << 63}, "seed"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias.\u0661"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"model": 3}, "model"),
    ],
)
def test_a_field_that_cannot_be_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "boss", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_a_conversation_that_cannot_be_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{}]},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"best_of": 2},
        {"suffix": "end"},
        {"prompt_logprobs": 1},
        {"use_beam_search": True},
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not supported yet") as caught:
        chat(**fields)
    assert caught.value.param in fields


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"tools": None, "response_format": None, "guided_json": None, "best_of": None},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"best_of": 3, "n": 3},
        {"suffix": "", "use_beam_search": False},
        {"unheard_of": {"a": 1}, "user": "u", "service_tier": "auto"},
        {"temperature": 1, "top_p": 0, "top_k": -1, "seed": -5},
        {name: None for name in ("temperature", "n", "stop", "stream", "max_tokens", "logprobs")},
    ],
)
def test_what_asks_for_nothing_special_is_accepted(fields: dict[str, Any]) -> None:
    chat(**fields)


def test_messages_of_an_agent_are_accepted() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "a", "cache_control": {}}]
    request = chat(
        messages=[
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": parts, "name": "u"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "42", "tool_call_id": "1"},
        ]
    )
    assert request.messages[2].content is None


class Body(dict[str, Any]):
    """One that can be referred to weakly."""


def refuse() -> ref[Body]:
    body = Body(model=MODEL, prompt="p", stream_options={"include_usage": True})
    kept = None
    try:
        validate(CompletionRequest, body)
    except InvalidRequest as error:
        kept = error
    assert kept is not None
    return ref(body)


def test_who_keeps_a_refusal_does_not_keep_its_request_for_ever() -> None:
    refused = refuse()
    gc.collect()
    assert refused() is None


async def test_arguments_that_are_too_deep_are_refused_by_name() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "[" * 50_000}}
    request = chat(messages=[{"role": "assistant", "tool_calls": [call]}])
    with ThreadPoolExecutor(1) as executor, pytest.raises(InvalidRequest) as caught:
        await PromptEncoder(executor).chat(request, tiny_tokenizer())
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


async def test_a_chat_is_not_tokenized_again_for_the_same_tenant() -> None:
    known: list[int] = []
    tokenizer = tiny_tokenizer()
    long = "What was said before. " * 40
    first = chat(messages=[{"role": "user", "content": long}])
    turns = [
        {"role": "user", "content": long},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And then?"},
    ]
    second = chat(messages=turns)
    with ThreadPoolExecutor(1) as executor:
        encoder = PromptEncoder(executor, known.append)
        await encoder.chat(first, tokenizer, "one")
        prompt = await encoder.chat(second, tokenizer, "two")
        assert known == [0, 0]
        assert await encoder.chat(second, tokenizer, "one") == prompt
        assert known.pop() >= len(tokenizer.encode(long, add_special_tokens=False))
        assert await encoder.chat(second, tokenizer) == prompt, "without a tenant, nothing is kept"
        assert known.pop() == 0


def test_defaults_come_from_the_model_and_yield_to_the_request() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)
    params = sampling(completion(), defaults=defaults)
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.9, 20)
    assert params.repetition_penalty == 1.1
    params = sampling(completion(temperature=0, top_p=1, top_k=-1), defaults=defaults)
    assert (params.temperature, params.top_p, params.top_k) == (0, 1, 0)


def test_an_empty_nucleus_is_the_likeliest_token() -> None:
    params = sampling(completion(top_p=0))
    assert (params.top_p, params.top_k) == (1.0, 1)


def test_a_seed_is_always_chosen() -> None:
    assert choose_seed(5) == 5
    assert choose_seed(-1) == choose_seed(-1) == (1 << 63) - 1
    assert choose_seed(None) != choose_seed(None)


def test_max_tokens_defaults() -> None:
    assert sampling(completion()).max_tokens == 16
    assert sampling(completion(), num_prompt_tokens=95).max_tokens == 5
    assert sampling(chat()).max_tokens == 90
    assert sampling(chat(max_tokens=3, max_completion_tokens=4)).max_tokens == 4
    assert sampling(completion(max_tokens=0), num_prompt_tokens=100).max_tokens == 0


@pytest.mark.parametrize(
    ("request_", "num_prompt_tokens", "numbers"),
    [
        (completion(), 100, ("100",)),
        (chat(), 5000, ("100", "5000")),
        (chat(max_tokens=91), 10, ("100", "101")),
        (completion(max_tokens=0), 101, ("100", "101")),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(
    request_: CompletionRequest, num_prompt_tokens: int, numbers: tuple[str, ...]
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        sampling(request_, num_prompt_tokens=num_prompt_tokens)
    assert all(number in caught.value.message for number in numbers)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (completion(stop_token_ids=[50]), "stop_token_ids"),
        (completion(stop_token_ids=[1, 2, 70]), "stop_token_ids"),
        (completion(logit_bias={"50": 1}), "logit_bias"),
        (completion(min_tokens=17), "min_tokens"),
        (chat(max_tokens=0), "max_tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_named(request_: CompletionRequest, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampling(request_)
    assert caught.value.param == param


def test_log_probabilities_of_both_shapes() -> None:
    assert sampling(completion()).logprobs is None
    assert sampling(completion(logprobs=0)).logprobs == 0
    assert sampling(completion(logprobs=2)).prompt_logprobs is None
    assert sampling(completion(logprobs=2, echo=True)).prompt_logprobs == 2
    assert sampling(chat(logprobs=True)).logprobs == 0
    assert sampling(chat(logprobs=True, top_logprobs=3)).logprobs == 3
