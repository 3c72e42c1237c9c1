"""The OpenAPI document, from the same models that validate requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from xllm import __version__
from xllm.roles.api import (
    anthropic_requests,
    requests,
    responses,
    responses_requests,
    translated_answers,
)

_REF = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    method: str
    path: str
    summary: str
    response: type[BaseModel]
    requests: tuple[type[BaseModel], ...] = ()
    """Alternatives for the body."""
    errors: tuple[int, ...] = ()
    streams: bool = False
    error_response: type[BaseModel] = responses.ErrorResponse


_BODY_ERRORS = (400, 404, 413, 503)
_GENERATION_ERRORS = (*_BODY_ERRORS, 429, 500, 504)

_OPERATIONS = (
    _Operation(
        method="post",
        path="/v1/chat/completions",
        summary="Continue a conversation",
        requests=(requests.ChatCompletionRequest,),
        response=responses.ChatCompletionResponse,
        errors=_GENERATION_ERRORS,
        streams=True,
    ),
    _Operation(
        method="post",
        path="/v1/completions",
        summary="Continue one or several prompts",
        requests=(requests.CompletionRequest,),
        response=responses.CompletionResponse,
        errors=_GENERATION_ERRORS,
        streams=True,
    ),
    _Operation(
        method="post",
        path="/v1/responses",
        summary="Continue a conversation, in OpenAI's newer form",
        requests=(responses_requests.ResponsesRequest,),
        response=translated_answers.ResponsesResponse,
        errors=_GENERATION_ERRORS,
        streams=True,
    ),
    _Operation(
        method="post",
        path="/v1/messages",
        summary="Continue a conversation, in Anthropic's form",
        requests=(anthropic_requests.MessagesRequest,),
        response=translated_answers.MessagesResponse,
        errors=_GENERATION_ERRORS,
        streams=True,
        error_response=translated_answers.MessagesErrorResponse,
    ),
    _Operation(
        method="post",
        path="/v1/messages/count_tokens",
        summary="How many tokens such a conversation has",
        requests=(anthropic_requests.CountTokensRequest,),
        response=translated_answers.CountTokensResponse,
        errors=_BODY_ERRORS,
        error_response=translated_answers.MessagesErrorResponse,
    ),
    _Operation(
        method="get",
        path="/v1/models",
        summary="Models that are served",
        response=responses.ModelListResponse,
    ),
    _Operation(
        method="get",
        path="/v1/models/{model}",
        summary="One model",
        response=responses.ModelObject,
        errors=(404, 503),
    ),
    _Operation(
        method="post",
        path="/tokenize",
        summary="Token ids of a prompt or of a conversation",
        requests=(requests.TokenizeTextRequest, requests.TokenizeChatRequest),
        response=responses.TokenizeResponse,
        errors=_BODY_ERRORS,
    ),
    _Operation(
        method="post",
        path="/detokenize",
        summary="Text of token ids",
        requests=(requests.DetokenizeRequest,),
        response=responses.DetokenizeResponse,
        errors=_BODY_ERRORS,
    ),
    _Operation(
        method="get",
        path="/health",
        summary="Whether a request could be served now",
        response=responses.HealthResponse,
        errors=(503,),
    ),
)


def openapi_document() -> dict[str, Any]:
    """OpenAPI 3.1 of every endpoint but itself."""
    paths: dict[str, Any] = {}
    models: set[type[BaseModel]] = set()
    for operation in _OPERATIONS:
        models.update((*operation.requests, operation.response, operation.error_response))
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation)
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(model, "validation") for model in ordered], ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {"title": "xllm", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


_EVENT = {
    "description": "A server-sent event: a chunk as JSON, or [DONE].",
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}


def _describe(operation: _Operation) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(operation.response)}}
    if operation.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer.", "content": content}}
        | {
            str(status): {
                "description": "An error.",
                "content": {"application/json": {"schema": _ref(operation.error_response)}},
            }
            for status in operation.errors
        },
    }
    if operation.requests:
        schemas = [_ref(model) for model in operation.requests]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    if "{model}" in operation.path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return described


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model.__name__)}
