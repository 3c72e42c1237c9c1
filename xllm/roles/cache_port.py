"""What operators may ask of a worker's cache: POST /admin/cache/lookup, clear, pin and unpin.

A prompt is given as `text`, `messages` or `token_ids`, and has the name that a request with it
would have, `cache_salt` included. Everything is answered on the engine's thread, between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from aiohttp import web
from pydantic import Field, model_validator

from xllm.cache.admin import PrefixLookup
from xllm.cache.tier import TierName
from xllm.errors import NoWorker, RequestError
from xllm.protocol import BlockHash, ModelCard
from xllm.roles.api.base_model import ApiModel
from xllm.roles.api.body import read_json, validate
from xllm.roles.api.errors import error_response
from xllm.roles.api.info import json_response
from xllm.roles.api.prompts import PromptEncoder
from xllm.roles.api.requests import ChatRequest, Message, Text, TokenIds
from xllm.roles.api.sampling import check_vocabulary
from xllm.security.secret import ClusterSecret
from xllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from xllm.engine.engine import Engine

MAX_TTL_S = 30 * 86400


class PromptBody(ApiModel):
    """Body of lookup and unpin: exactly one of text, messages and token_ids."""

    text: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    token_ids: TokenIds | None = None
    cache_salt: str | None = None
    api_key_name: str | None = Field(
        None, description="Whose request is meant, where API keys do not share their cache."
    )
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> PromptBody:
        given = [self.text, self.messages, self.token_ids]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give one of text, messages and token_ids")
        return self

    def salt(self, secret: ClusterSecret | None) -> str:
        """What the request would have; `secret`: the cluster's."""
        if self.api_key_name is None:
            return self.cache_salt or ""
        return (secret or ClusterSecret("")).salt(self.api_key_name, self.cache_salt or "")


ASK_POLL_S = 0.002


class PinBody(PromptBody):
    """Body of pin."""

    ttl: float = Field(gt=0, le=MAX_TTL_S, description="Seconds.")


class ClearBody(ApiModel):
    """Body of clear."""

    tier: Literal["device", "host", "disk", "remote"] | None = Field(
        None, description="None: all of them. remote: the shared store, for all workers."
    )


class CachePort:
    """The routes of one worker; they answer 503 until `open`."""

    def __init__(self, max_body_bytes: int, secret: ClusterSecret | None = None) -> None:
        self._max_body_bytes = max_body_bytes
        self._secret = secret
        self._engine: Engine | None = None
        self._card: ModelCard | None = None
        self._load_tokenizer: Callable[[], Tokenizer] | None = None
        self._tokenizer: Tokenizer | None = None

    @property
    def routes(self) -> list[web.RouteDef]:
        handlers = (self._lookup, self._clear, self._pin, self._unpin)
        return [
            web.post(f"/admin/cache/{handler.__name__.strip('_')}", answering_errors(handler))
            for handler in handlers
        ]

    def open(
        self, engine: Engine, card: ModelCard, load_tokenizer: Callable[[], Tokenizer]
    ) -> None:
        """The engine runs. `load_tokenizer` is called when it is first needed, on a thread."""
        self._engine, self._card, self._load_tokenizer = engine, card, load_tokenizer

    async def _lookup(self, request: web.Request) -> web.Response:
        body = validate(PromptBody, await read_json(request, self._max_body_bytes))
        engine, token_ids = await self._prepare(body)
        salt = body.salt(self._secret)
        names = await engine.call(lambda: engine.kv_cache.name_prompt(token_ids, salt))
        found = await look_up(engine, names)
        return json_response({"prompt_tokens": len(token_ids), **describe_lookup(found)})

    async def _clear(self, request: web.Request) -> web.Response:
        raw = await read_json(request, self._max_body_bytes) if request.can_read_body else {}
        body = validate(ClearBody, raw)
        engine = self._running_engine()
        tier = None if body.tier is None else TierName(body.tier)
        cleared = await engine.call(lambda: engine.cache_admin.clear(tier))
        return json_response({"cleared_blocks": by_name(cleared)})

    async def _pin(self, request: web.Request) -> web.Response:
        body = validate(PinBody, await read_json(request, self._max_body_bytes))
        engine, token_ids = await self._prepare(body)
        num_blocks = await engine.call(
            lambda: engine.cache_admin.pin(token_ids, body.salt(self._secret), body.ttl)
        )
        return json_response({"prompt_tokens": len(token_ids), "pinned_blocks": num_blocks})

    async def _unpin(self, request: web.Request) -> web.Response:
        body = validate(PromptBody, await read_json(request, self._max_body_bytes))
        engine, token_ids = await self._prepare(body)
        num_blocks = await engine.call(
            lambda: engine.cache_admin.unpin(token_ids, body.salt(self._secret))
        )
        return json_response({"prompt_tokens": len(token_ids), "unpinned_blocks": num_blocks})

    async def _prepare(self, body: PromptBody) -> tuple[Engine, list[int]]:
        """The engine, and the prompt's token ids. Raises: NoWorker, InvalidRequest."""
        engine = self._running_engine()
        assert self._card is not None
        if self._tokenizer is None and body.token_ids is None:
            assert self._load_tokenizer is not None
            self._tokenizer = await asyncio.to_thread(self._load_tokenizer)
        return engine, await encode_prompt(body, self._tokenizer, self._card)

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise NoWorker("the model is still being loaded; try again", retry_after_s=1)
        return self._engine


async def encode_prompt(
    body: PromptBody, tokenizer: Tokenizer | None, card: ModelCard
) -> list[int]:
    """A prompt's token ids; the tokenizer may be missing where these are given.

    Raises: InvalidRequest.
    """
    if body.token_ids is not None:
        check_vocabulary(body.token_ids, card, param="token_ids")
        return body.token_ids
    assert tokenizer is not None
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as executor:
        encoder = PromptEncoder(executor)
        if body.messages is not None:
            chat = ChatRequest(
                messages=body.messages,
                chat_template_kwargs=body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=None,
                tools=None,
                tool_choice=None,
                parallel_tool_calls=None,
            )
            return (await encoder.chat(chat, tokenizer)).token_ids
        assert body.text is not None
        [prompt] = await encoder.texts([body.text], tokenizer, add_special_tokens=True)
        return prompt.token_ids


async def look_up(engine: Engine, names: Sequence[BlockHash]) -> PrefixLookup:
    """What a worker has of a prompt whose full blocks have these names; the shared store is asked
    first, if there is one. Raises: NoWorker if the engine does not run."""
    question = await engine.call(lambda: engine.cache_admin.ask(names))
    while question is not None and question.is_open:  # noqa: ASYNC110 - for a moment
        await asyncio.sleep(ASK_POLL_S)
    return await engine.call(lambda: engine.cache_admin.lookup_blocks(names))


def describe_lookup(found: PrefixLookup) -> dict[str, Any]:
    """As JSON."""
    return {
        "matched_tokens": found.num_matched,
        "matched_tokens_by_tier": by_name(found.matched_by_tier),
        "held_tokens_by_tier": by_name(found.held_by_tier),
    }


def by_name(counts: Mapping[TierName, int]) -> dict[str, int]:
    """As JSON."""
    return {tier.value: count for tier, count in counts.items()}


Handler = Callable[[web.Request], Awaitable[web.Response]]


def answering_errors(handler: Handler) -> Handler:
    """`handler`, with the answer that clients of the API get where it raises RequestError."""

    async def answer(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except RequestError as error:
            return error_response(error)

    return answer
