"""How a failure looks to a client: OpenAI's error object, with its HTTP status.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Under /v1/messages it is Anthropic's: {"type": "error", "error": {"type": ..., "message": ...}}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web
from pydantic import ValidationError

from xllm.errors import InvalidRequest, RateLimited, RequestError, Unauthorized, UnknownModel

_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_DEFAULT_RETRY_AFTER_S = 1
_MAX_SHOWN_INPUT = 80


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus output do not fit the model; clients look for this code and shorten."""


def error_object(error: RequestError) -> dict[str, Any]:
    """The body; also the payload of an error event in the middle of a stream."""
    body = _error_object(error.http_status, error.message, error.param, _code(error))
    if isinstance(error, RateLimited):
        body["error"]["type"] = error.kind
    return body


def anthropic_error_object(error: RequestError) -> dict[str, Any]:
    return _anthropic_error_object(error.http_status, error.message)


def _anthropic_error_object(status: int, message: str) -> dict[str, Any]:
    kind = _ANTHROPIC_ERRORS.get(status)
    if kind is None:
        kind = "invalid_request_error" if status < 500 else "api_error"
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_response(error: RequestError, path: str = "") -> web.Response:
    """In the form that clients of the endpoint at `path` expect."""
    headers = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if error.retryable:
        headers["Retry-After"] = str(error.retry_after_s or _DEFAULT_RETRY_AFTER_S)
    is_anthropic = path.startswith(_ANTHROPIC_PATH)
    body = anthropic_error_object(error) if is_anthropic else error_object(error)
    return _json_response(body, error.http_status, headers)


def http_error_response(error: web.HTTPException, method: str, path: str) -> web.Response:
    """For what aiohttp refuses by itself: an unknown path, a wrong method."""
    headers = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
    message = f"{error.reason}: {method} {path}"
    if path.startswith(_ANTHROPIC_PATH):
        body = _anthropic_error_object(error.status, message)
    else:
        body = _error_object(error.status, message, None, None)
    return _json_response(body, error.status, headers)


def from_validation(error: ValidationError) -> InvalidRequest:
    """The first thing that pydantic found wrong, under the name that the client knows."""
    first = error.errors(include_url=False)[0]
    param = _param(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in ("missing", "value_error"):
        message += f" (got {_shorten(first['input'])})"
    return InvalidRequest(f"{param}: {message}" if param else message, param=param)


def _error_object(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _code(error: RequestError) -> str | None:
    """OpenAI's code where it has one."""
    if isinstance(error, Unauthorized):
        return error.code
    if isinstance(error, RateLimited):
        return "rate_limit_exceeded"
    if isinstance(error, UnknownModel):
        return "model_not_found"
    if isinstance(error, ContextLengthExceeded):
        return "context_length_exceeded"
    return error.label


def _json_response(body: dict[str, Any], status: int, headers: dict[str, str]) -> web.Response:
    return web.Response(
        body=orjson.dumps(body), status=status, headers=headers, content_type="application/json"
    )


def _param(loc: Sequence[str | int]) -> str | None:
    """("prompt", "<texts>", 1) is prompt[1]: tags of unions are no part of the name, nor is what
    pydantic calls the key of an object."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<") and step != "[key]":
            path += f".{step}" if path else step
    return path or None


def _shorten(value: Any) -> str:
    text = repr(value[:_MAX_SHOWN_INPUT] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_SHOWN_INPUT else text[: _MAX_SHOWN_INPUT - 1] + "…"
