"""What people and programs write: command lines, HTTP bodies, registrations in etcd."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import orjson

from tests.fakes import MODEL, tiny_tokenizer
from tests.fuzz.mutate import mutate_bytes, mutate_value, odd_text, odd_value, random_bytes
from tests.fuzz.runner import Target
from xllm.cache.index import CacheIndex
from xllm.coordination import DELETE, PUT, Change, Keys, KeyValue, Snapshot
from xllm.errors import ConfigError, RequestError
from xllm.flag_table import ROLES, Flag, role_flags
from xllm.flags import parse_command_line
from xllm.net import split_host_port
from xllm.protocol import (
    Epoch,
    GenerateRequest,
    MasterId,
    ModelCard,
    PrefillCost,
    SamplingParams,
    Watermark,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
)
from xllm.roles import frames
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
from xllm.roles.car_policy import POLICY_NAMES, make_router
from xllm.roles.cost_routing import Targets
from xllm.roles.registration import cache_root
from xllm.roles.registry import Registry
from xllm.roles.stream_client import StreamState

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
                prompts = await self._encoder.completion(request, tokenizer, _CARD)
            case ChatCompletionRequest() | TokenizeChatRequest():
                prompts = [await self._encoder.chat(request, tokenizer)]
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


_KEYS = Keys("t")
_INFO = WorkerInfo(
    worker_id=WorkerId("a:1"),
    epoch=Epoch(7),
    address="127.0.0.1:1",
    operator_address="127.0.0.1:2",
    block_address="127.0.0.1:3",
    model=_CARD,
    fingerprint="f",
    block_size=32,
    kv_dtype="float32",
    device_blocks=1,
    block_bytes=1,
)
_LOAD = WorkerLoad(
    epoch=Epoch(7),
    prefill_cost=PrefillCost(0.1, 0.01, 0.001),
    tier_block_s={"host": 0.1},
    watermarks={"m": Watermark(1, 2, 3)},
)
RegistryInput = list[tuple[str, Snapshot | list[Change]]]


class _Stream:
    """A worker that is always up."""

    state = StreamState.UP
    draining = False

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info

    def expect(self, info: WorkerInfo) -> None:
        self.info = info

    def unreported(self, load: WorkerLoad | None) -> int:
        return 0

    def unacknowledged(self, load: WorkerLoad) -> int:
        return 0


class RegistryTarget(Target):
    """Registrations and load reports as a master reads them from etcd."""

    name = "registry"

    def make(self, rng: random.Random) -> RegistryInput:
        updates: RegistryInput = []
        for _ in range(rng.randint(1, 3)):
            is_load = rng.random() < 0.4
            kvs = [self._some_kv(rng, is_load) for _ in range(rng.randint(1, 2))]
            update: Snapshot | list[Change]
            if rng.random() < 0.3:
                update = Snapshot(3, tuple(kvs))
            else:
                update = [Change(DELETE if rng.random() < 0.1 else PUT, kv) for kv in kvs]
            updates.append(("load" if is_load else "workers", update))
        return updates

    def _some_kv(self, rng: random.Random, is_load: bool) -> KeyValue:
        worker_id = WorkerId(rng.choice(("a:1", "b:1")))
        key = _KEYS.load_of(worker_id) if is_load else _KEYS.worker(worker_id)
        value = msgspec.json.encode(
            _LOAD if is_load else msgspec.structs.replace(_INFO, worker_id=worker_id)
        )
        with contextlib.suppress(TypeError, orjson.JSONEncodeError):
            if rng.random() < 0.7:
                value = orjson.dumps(mutate_value(rng, orjson.loads(value), odd_value))
        if rng.random() < 0.2:
            value = mutate_bytes(rng, value)
        return KeyValue(key, value, rng.randrange(9), 9, 7)

    def feed(self, data: RegistryInput) -> None:
        registry = Registry(_Stream)
        index, clock = CacheIndex(), itertools.count().__next__
        routers = [
            make_router(name, index, registry.cache_root, clock, Targets(1.0, 0.1))
            for name in POLICY_NAMES
        ]

        def report(info: WorkerInfo, load: WorkerLoad, num_unacknowledged: int) -> None:
            for router in routers:
                router.report(cache_root(info), info.worker_id, load, num_unacknowledged)

        registry.on_report(report)
        for kind, update in data:
            (registry.apply_loads if kind == "load" else registry.apply_workers)(update)
            registry.count_states()
            for card in registry.model_cards():
                request = GenerateRequest(
                    request_id="r",
                    model_id=card.model_id,
                    prompt_ids=[1] * 100,
                    sampling=SamplingParams(),
                )
                candidates = registry.candidates(card.model_id)
                for router in routers:
                    with contextlib.suppress(RequestError):
                        router.dispatched(router.route(request, candidates))
            for stream in registry.streams():
                # What a stream does with it: connects, and says hello.
                split_host_port(stream.info.address)
                hello = frames.Hello(1, MasterId("m"), stream.info.worker_id, stream.info.epoch, 0)
                frames.append_frame(bytearray(), hello, frames.MAX_TO_WORKER_BYTES)

    def allowed_bytes(self, data: RegistryInput) -> int:
        num_bytes = 0
        for _, update in data:
            kvs = [c.kv for c in update] if isinstance(update, list) else update.kvs
            num_bytes += sum(len(kv.value) for kv in kvs)
        return (256 << 10) + 100 * num_bytes
