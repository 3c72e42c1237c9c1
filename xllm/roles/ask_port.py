"""POST /admin/ask on a master's operator port: a chat request by whoever operates the cluster.

Body and answer are those of /v1/chat/completions. It takes the way of any request, over this
master's own backend and into its metrics, but needs the operators' key, not one of the API, and has
no tenant: its blocks are those of requests without a key.
"""

from __future__ import annotations

import time
import uuid
from concurrent.futures import Executor

from aiohttp import web

from xllm.config import ApiConfig
from xllm.errors import RequestError
from xllm.roles.api.errors import error_response
from xllm.roles.api.handlers import CALL, Call, GenerationHandlers
from xllm.roles.api.prompts import PromptEncoder
from xllm.roles.api.sse import CLIENT_CLOSED_REQUEST, ClientGone
from xllm.roles.backend import Backend
from xllm.telemetry import Metrics


class AskPort:
    """The route of one master; `executor` encodes long prompts."""

    def __init__(
        self, backend: Backend, config: ApiConfig, metrics: Metrics, executor: Executor
    ) -> None:
        self._handlers = GenerationHandlers(backend, PromptEncoder(executor), config, metrics)

    @property
    def routes(self) -> list[web.RouteDef]:
        return [web.post("/admin/ask", self._ask)]

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        request[CALL] = Call(f"req-{uuid.uuid4().hex}", time.monotonic())
        try:
            return await self._handlers.chat_completions(request)
        except RequestError as error:
            return error_response(error)
        except ClientGone:
            return web.Response(status=CLIENT_CLOSED_REQUEST)
