"""What people and programs write: command lines and HTTP bodies."""

from __future__ import annotations

import asyncio
import contextlib
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import orjson

from tests.fakes import MODEL, tiny_tokenizer
from tests.fuzz.mutate import mutate_bytes, mutate_value, odd_text, random_bytes
from tests.fuzz.runner import Target
from xllm.errors import ConfigError, RequestError
from xllm.flag_table import ROLES, Flag, role_flags
from xllm.flags import parse_command_line
from xllm.protocol import (
    GenerateRequest,
    ModelCard,
)
from xllm.roles.api.body import parse_json, validate
from xllm.roles.api.errors import error_response
from xllm.roles.api.prompts import PromptEncoder
from xllm.roles.api.requests import (
    ApiModel,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from xllm.roles.api.sampling import choose_seed, sampling_params

_MAX_TYPED = 80


class FlagTarget(Target):
    """A command line is a config, an answer, or a ConfigError."""

    name = "flags"
    traces_memory = False  # absl builds all its flags for each command line

    def __init__(self) -> None:
        self._flags = {role: list(role_flags(role)) for role in ROLES}

    def make(self, rng: random.Random) -> list[str]:
        role = rng.choice(ROLES)
        argv = [f"--role={role}"] if rng.random() < 0.9 else []
        for _ in range(rng.randint(0, 3)):
            argv += self._some_flag(rng, rng.choice(self._flags[role]))
        if rng.random() < 0.1:
            argv.append(odd_text(rng)[:100])
        if rng.random() < 0.2 and argv:
            i = rng.randrange(len(argv))
            argv[i] = mutate_bytes(rng, argv[i].encode()).decode(errors="replace")
        # No process can be given a NUL; what absl proposes instead of an unknown name takes long
        # names seconds, in which nobody waits but who has typed them.
        return [text[:_MAX_TYPED] for text in argv if "\0" not in text]

    def _some_flag(self, rng: random.Random, flag: Flag) -> list[str]:
        if flag.type.is_boolean and rng.random() < 0.5:
            return [f"--{rng.choice(('', 'no'))}{flag.name}"]
        value = rng.choice(
            (
                *("0", "1", "2.5", "-3", "512M", "1e3", "auto", "127.0.0.1:2379", "true", "a.b"),
                *(
                    "~nobody_at_all/x",
                    "~",
                    "/dev/null",
                    "9" * rng.choice((20, 70)) + "T",
                    "[::1]:1",
                ),
                *("http://[", "1" * 70, "x" * 300, odd_text(rng), odd_text(rng)),
            )
        )
        return rng.choice(([f"--{flag.name}={value}"], [f"--{flag.name}", value]))

    def feed(self, data: list[str]) -> None:
        with contextlib.suppress(ConfigError):
            parse_command_line(data)

    def allowed_bytes(self, data: list[str]) -> int:
        return 0


_SAMPLING: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "n": 2,
    "seed": 3,
    "stop": ["a", "b"],
    "stop_token_ids": [1],
    "logit_bias": {"7": 1.5},
    "stream": True,
    "stream_options": {"include_usage": True},
    "presence_penalty": 0.1,
    "repetition_penalty": 1.1,
    "cache_salt": "s",
    "response_format": {"type": "text"},
    "tools": [],
    "best_of": 2,
}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "n"},
    {"role": "assistant", "tool_calls": [_CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "c"},
]
_CHAT = {"messages": _MESSAGES, "chat_template_kwargs": {"a": 1}, "add_generation_prompt": True}
_BODIES: tuple[tuple[type[ApiModel], dict[str, Any]], ...] = (
    (CompletionRequest, {**_SAMPLING, "prompt": "hello", "echo": True, "logprobs": 2}),
    (CompletionRequest, {**_SAMPLING, "prompt": ["hello", "you"]}),
    (CompletionRequest, {**_SAMPLING, "prompt": [1, 2, 3]}),
    (CompletionRequest, {**_SAMPLING, "prompt": [[1, 2], [3]]}),
    (ChatCompletionRequest, {**_SAMPLING, **_CHAT, "logprobs": True, "top_logprobs": 2}),
    (TokenizeTextRequest, {"model": MODEL, "prompt": "hello", "add_special_tokens": True}),
    (TokenizeChatRequest, {"model": MODEL, **_CHAT, "return_token_strs": True}),
    (DetokenizeRequest, {"model": MODEL, "tokens": [1, 2, 3]}),
)
BodyInput = tuple[int, bytes]
_CARD = ModelCard(model_id=MODEL, max_model_len=4096, vocab_size=300, created=0)


class BodyTarget(Target):
    """An HTTP body becomes a request, tokens and sampling, or a RequestError as OpenAI's object."""

    name = "http"

    def __init__(self) -> None:
        self._tokenizer = tiny_tokenizer()
        self._executor = ThreadPoolExecutor(1)
        self._encoder = PromptEncoder(self._executor)
        self._loop = asyncio.new_event_loop()

    def make(self, rng: random.Random) -> BodyInput:
        kind = rng.randrange(len(_BODIES))
        body: Any = _BODIES[kind][1]
        if rng.random() < 0.7:
            keep = [name for name in body if rng.random() < 0.8]
            body = {name: body[name] for name in keep}
        if rng.random() < 0.9:
            body = mutate_value(rng, body)
        try:
            raw = orjson.dumps(body)
        except (TypeError, orjson.JSONEncodeError):  # too deep, or no JSON
            raw = b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"
        if rng.random() < 0.15:
            raw = mutate_bytes(rng, raw)
        if rng.random() < 0.02:
            raw = random_bytes(rng)
        return kind, raw

    def feed(self, data: BodyInput) -> None:
        kind, raw = data
        refusal: RequestError | None = None
        try:
            request = validate(_BODIES[kind][0], parse_json(raw))
            self._loop.run_until_complete(self._prepare(request))
        except RequestError as error:
            refusal = error
        if refusal is not None:
            assert refusal.message
            assert error_response(refusal).status < 500

    def close(self) -> None:
        self._executor.shutdown()
        self._loop.close()

    async def _prepare(self, request: ApiModel) -> None:
        tokenizer = self._tokenizer
        match request:
            case CompletionRequest():
                prompts = await self._encoder.completion(request, tokenizer, _CARD, "salt")
            case ChatCompletionRequest() | TokenizeChatRequest():
                prompts = [await self._encoder.chat(request, tokenizer, "salt")]
            case TokenizeTextRequest():
                prompts = await self._encoder.texts(
                    [request.prompt], tokenizer, add_special_tokens=True
                )
            case _:
                return
        if isinstance(request, CompletionRequest | ChatCompletionRequest):
            sampling = sampling_params(
                request,
                seed=choose_seed(request.seed),
                num_prompt_tokens=len(prompts[0].token_ids),
                defaults=tokenizer.default_sampling,
                card=_CARD,
            )
            # What is accepted here has to reach a worker.
            msgspec.msgpack.encode(
                GenerateRequest(
                    request_id="r",
                    model_id=MODEL,
                    prompt_ids=prompts[0].token_ids,
                    sampling=sampling,
                    salt=request.cache_salt or "",
                )
            )

    def allowed_bytes(self, data: BodyInput) -> int:
        return (2 << 20) + 200 * len(data[1])
