"""What operators may ask of a master's routing: POST /admin/route explains a decision.

A prompt is given as `text`, `messages` or `token_ids`, and has the name that a request with it
would have, `cache_salt` included. Nothing runs, and nothing that the answer depends on changes.
"""

from __future__ import annotations

from aiohttp import web
from pydantic import Field

from xllm.protocol import GenerateRequest, SamplingParams
from xllm.roles.api.body import read_json, validate
from xllm.roles.api.info import json_response, select_model
from xllm.roles.cache_port import PromptBody, answering_errors, encode_prompt
from xllm.roles.car_policy import DEFAULT_PRIORITY
from xllm.roles.cluster_backend import ClusterBackend
from xllm.security.secret import ClusterSecret


class RouteBody(PromptBody):
    """Body of /admin/route."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    priority: int | None = None


class RoutePort:
    """The routes of one master."""

    def __init__(
        self,
        backend: ClusterBackend,
        policy: str,
        max_body_bytes: int,
        secret: ClusterSecret | None = None,
    ) -> None:
        self._secret = secret
        self._backend = backend
        self._policy = policy
        self._max_body_bytes = max_body_bytes

    @property
    def routes(self) -> list[web.RouteDef]:
        return [web.post("/admin/route", answering_errors(self._route))]

    async def _route(self, request: web.Request) -> web.Response:
        body = validate(RouteBody, await read_json(request, self._max_body_bytes))
        card = select_model(self._backend, body.model)
        tokenizer = await self._backend.tokenizer(card.model_id)
        token_ids = await encode_prompt(body, tokenizer, card)
        candidates = self._backend.explain(
            GenerateRequest(
                request_id="explained",
                model_id=card.model_id,
                prompt_ids=token_ids,
                sampling=SamplingParams(),
                salt=body.salt(self._secret),
                priority=body.priority or 0,
            )
        )
        # The first one is the choice: if not even that keeps the targets, nobody does.
        is_late = candidates[0].get("in_time") is False
        return json_response(
            {
                "model": card.model_id,
                "policy": self._policy,
                "prompt_tokens": len(token_ids),
                "worker_id": candidates[0]["worker_id"],
                "refused": is_late and (body.priority or 0) >= DEFAULT_PRIORITY,
                "candidates": candidates,
            }
        )
