"""The aiohttp application: routes, middleware, limits, life time."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from xllm.config import ApiConfig
from xllm.errors import EngineFault, InvalidRequest, RequestError
from xllm.roles.api.auth import Authenticator
from xllm.roles.api.cors import Cors
from xllm.roles.api.errors import error_response, http_error_response
from xllm.roles.api.handlers import CALL, Call, GenerationHandlers
from xllm.roles.api.info import InfoHandlers, json_response
from xllm.roles.api.openapi import openapi_document
from xllm.roles.api.prompts import PromptEncoder
from xllm.roles.api.sse import CLIENT_CLOSED_REQUEST, ClientGone
from xllm.roles.backend import Backend
from xllm.telemetry import Metrics
from xllm.tracing import OFF, Span, SpanKind, Tracer, valid_traceparent

logger = logging.getLogger(__name__)

_NUM_ENCODER_THREADS = 2
_KEEPALIVE_S = 75.0
_SHUTDOWN_S = 2.0
_SANE_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def build_app(
    backend: Backend,
    config: ApiConfig,
    metrics: Metrics,
    authenticator: Authenticator | None = None,
    is_leaving: Callable[[], bool] = lambda: False,
    tracer: Tracer = OFF,
) -> web.Application:
    """The public API over `backend`, for everybody or for whom the authenticator knows. Serve it
    with `make_runner`.

    While `is_leaving`, it serves on, but says that it is not healthy and keeps no connection.
    """
    cors = Cors(config.cors_allow_origins)
    middlewares = [_answer_errors(metrics, tracer)]
    if config.cors_allow_origins:
        middlewares.append(cors.middleware)
    if authenticator is not None:
        middlewares.append(authenticator.middleware)
    app = web.Application(client_max_size=config.max_body_size, middlewares=middlewares)
    executor = ThreadPoolExecutor(_NUM_ENCODER_THREADS, thread_name_prefix="encode")

    async def own_executor(app: web.Application) -> AsyncIterator[None]:
        yield
        executor.shutdown(wait=False, cancel_futures=True)

    app.cleanup_ctx.append(own_executor)
    app.on_response_prepare.append(_add_headers)
    app.on_response_prepare.append(cors.add_headers)

    async def close_connection(request: web.Request, response: web.StreamResponse) -> None:
        if is_leaving():
            response.force_close()
            response.headers[hdrs.CONNECTION] = "close"  # which aiohttp has decided by now

    app.on_response_prepare.append(close_connection)
    encoder = PromptEncoder(executor, metrics.tokenizer_cached_tokens.inc)
    generate = GenerationHandlers(backend, encoder, config, metrics)
    info = InfoHandlers(backend, encoder, config.max_body_size, is_leaving)
    document = openapi_document()

    async def openapi(request: web.Request) -> web.Response:
        return json_response(document)

    app.add_routes(
        [
            web.post("/v1/chat/completions", generate.chat_completions),
            web.post("/v1/completions", generate.completions),
            web.post("/v1/responses", generate.responses),
            web.post("/v1/messages", generate.messages),
            web.post("/v1/messages/count_tokens", generate.count_tokens),
            web.get("/v1/models", info.models),
            web.get("/v1/models/{model:.+}", info.model),
            web.post("/tokenize", info.tokenize),
            web.post("/detokenize", info.detokenize),
            web.get("/health", info.health),
            web.get("/openapi.json", openapi),
        ]
    )
    return app


def make_runner(app: web.Application, shutdown_s: float = _SHUTDOWN_S) -> web.AppRunner:
    """A runner that cancels the handler, and so the generation, when its client goes away.

    `shutdown_s`: what running requests get to end when it is cleaned up.
    """
    return web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=_KEEPALIVE_S,
        shutdown_timeout=shutdown_s,
    )


def _answer_errors(metrics: Metrics, tracer: Tracer) -> Middleware:
    """Outermost: names the request, and turns whatever goes wrong into an error object."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[CALL] = Call(_request_id(request), time.monotonic())
        path = _handler_name(request)
        if request.method == "POST":
            call.span = _start_trace(tracer, request, call, path)
        error = "the client has gone"
        try:
            answer = await answer_any(request, handler, call)
            error = f"status {answer.status}" if answer.status >= 500 else ""
            call.span.set({"http.response.status_code": answer.status})
        finally:
            call.span.end(error=error)
        metrics.http_requests.labels(path, f"{answer.status // 100}xx").inc()
        return answer

    async def answer_any(request: web.Request, handler: Handler, call: Call) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as error:
            metrics.request_errors.labels(error.label).inc()
            if error.http_status >= 500:
                logger.warning(
                    "request_failed request_id=%s label=%s message=%r",
                    *(call.request_id, error.label, error.message),
                )
            return error_response(error, request.path)
        except RecursionError:
            # JSON is read to a depth of 1,024, which others that have to do with it do not reach.
            metrics.request_errors.labels(InvalidRequest.label).inc()
            return error_response(InvalidRequest("the body is nested too deeply"), request.path)
        except web.HTTPException as error:
            metrics.request_errors.labels(InvalidRequest.label).inc()
            return http_error_response(error, request.method, request.path)
        except ClientGone:
            metrics.client_disconnects.inc()
            return web.Response(status=CLIENT_CLOSED_REQUEST)
        except asyncio.CancelledError:
            if request.transport is None or request.transport.is_closing():
                metrics.client_disconnects.inc()
            raise
        except Exception:
            logger.exception("request_crashed request_id=%s", call.request_id)
            metrics.request_errors.labels(EngineFault.label).inc()
            return error_response(EngineFault("internal error"))

    return middleware


def _start_trace(tracer: Tracer, request: web.Request, call: Call, path: str) -> Span:
    """A trace of its own, or what the client's `traceparent` says."""
    parent = valid_traceparent(request.headers.get("traceparent"))
    if not tracer.is_on:
        return tracer.start(path, parent)
    return tracer.start(
        f"POST {path}",
        parent,
        kind=SpanKind.SERVER,
        at=call.received_at,
        attributes={
            "http.request.method": "POST",
            "http.route": path,
            "xllm.request_id": call.request_id,
        },
    )


def _handler_name(request: web.Request) -> str:
    """The path as the API has it: not what a client made up."""
    resource = request.match_info.route.resource
    return "other" if resource is None else resource.canonical


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    call = request.get(CALL)
    if call is None:
        return
    response.headers["X-Request-Id"] = call.request_id
    if call.generations is not None and (worker_ids := call.generations.worker_ids):
        response.headers["x-xllm-worker-id"] = quote(",".join(worker_ids), safe=":,/[]@")


def _request_id(request: web.Request) -> str:
    """The client's own, if it is fit for a header and a log line."""
    given = request.headers.get("X-Request-Id", "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
