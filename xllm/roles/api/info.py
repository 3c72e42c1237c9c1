"""The small endpoints: models, tokenize, detokenize, health."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson
from aiohttp import web

from xllm.errors import NoWorker, UnknownModel
from xllm.protocol import ModelCard
from xllm.roles.api.body import read_json, validate
from xllm.roles.api.prompts import PromptEncoder
from xllm.roles.api.requests import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from xllm.roles.api.sampling import check_vocabulary
from xllm.roles.backend import Backend


def json_response(body: Mapping[str, Any]) -> web.Response:
    return web.Response(body=orjson.dumps(body), content_type="application/json")


def select_model(backend: Backend, model_id: str | None) -> ModelCard:
    """The model a request means: the one it names, or the only one there is.

    Raises: NoWorker, UnknownModel.
    """
    cards = backend.model_cards()
    if not cards:
        raise NoWorker("no worker is ready to serve a model")
    served = ", ".join(sorted(card.model_id for card in cards))
    if model_id is None:
        if len(cards) > 1:
            raise UnknownModel(f"model is required; served are: {served}", param="model")
        return cards[0]
    for card in cards:
        if card.model_id == model_id:
            return card
    raise UnknownModel(f"the model {model_id!r} does not exist; served: {served}", param="model")


class InfoHandlers:
    def __init__(
        self,
        backend: Backend,
        encoder: PromptEncoder,
        max_body_size: int,
        is_leaving: Callable[[], bool],
    ) -> None:
        self._backend = backend
        self._is_leaving = is_leaving
        self._encoder = encoder
        self._max_body_size = max_body_size

    async def models(self, request: web.Request) -> web.Response:
        cards = self._backend.model_cards()
        return json_response({"object": "list", "data": [_model_object(card) for card in cards]})

    async def model(self, request: web.Request) -> web.Response:
        card = select_model(self._backend, request.match_info["model"])
        return json_response(_model_object(card))

    async def health(self, request: web.Request) -> web.Response:
        """200 while requests should come here."""
        if self._is_leaving():
            raise NoWorker("this master is leaving; use another one")
        if not self._backend.model_cards():
            raise NoWorker("no worker is ready to serve a model")
        return json_response({"status": "ok"})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await read_json(request, self._max_body_size)
        wanted: TokenizeChatRequest | TokenizeTextRequest
        if "messages" in body:
            wanted = validate(TokenizeChatRequest, body)
        else:
            wanted = validate(TokenizeTextRequest, body)
        card = select_model(self._backend, wanted.model)
        tokenizer = await self._backend.tokenizer(card.model_id)
        if isinstance(wanted, TokenizeChatRequest):
            prompt = await self._encoder.chat(
                wanted, tokenizer, add_special_tokens=bool(wanted.add_special_tokens)
            )
        else:
            [prompt] = await self._encoder.texts(
                [wanted.prompt],
                tokenizer,
                add_special_tokens=wanted.add_special_tokens is not False,
            )
        ids = prompt.token_ids
        names = [tokenizer.token_name(i) for i in ids] if wanted.return_token_strs else None
        return json_response(
            {
                "count": len(ids),
                "max_model_len": card.max_model_len,
                "tokens": ids,
                "token_strs": names,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        body = validate(DetokenizeRequest, await read_json(request, self._max_body_size))
        card = select_model(self._backend, body.model)
        check_vocabulary(body.tokens, card, param="tokens")
        tokenizer = await self._backend.tokenizer(card.model_id)
        return json_response({"prompt": await self._encoder.decode(body.tokens, tokenizer)})


def _model_object(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.model_id,
        "object": "model",
        "created": card.created,
        "owned_by": "xllm",
        "max_model_len": card.max_model_len,
    }
