"""Reading a request's body: bounded, in time, JSON, valid.

Between two steps of a long body the event loop gets on with other requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from aiohttp import web
from pydantic import ValidationError

from xllm.errors import BodyTooLarge, InvalidRequest
from xllm.roles.api import long_json
from xllm.roles.api.base_model import ApiModel
from xllm.roles.api.errors import from_validation
from xllm.roles.api.requests import ChatCompletionRequest
from xllm.roles.api.unsupported import refuse_unsupported

_READ_TIMEOUT_S = 60.0

M = TypeVar("M", bound=ApiModel)


async def read_json(request: web.Request, max_bytes: int) -> dict[str, Any]:
    """The object in the body.

    Raises: BodyTooLarge, without reading on; InvalidRequest if it is no JSON object.
    """
    too_large = f"the body is over the {max_bytes} bytes that this server accepts"
    if (request.content_length or 0) > max_bytes:
        raise BodyTooLarge(too_large)
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            raw = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise BodyTooLarge(too_large) from error
    except TimeoutError as error:
        raise InvalidRequest(f"the body took over {_READ_TIMEOUT_S:.0f} s to arrive") from error
    except web.RequestPayloadError as error:
        raise InvalidRequest(f"the body cannot be read: {error}") from error
    if len(raw) <= long_json.LONG_BODY_BYTES:
        return parse_json(raw)
    try:
        body = _object(await long_json.loads(raw))
    except orjson.JSONDecodeError as error:
        raise _not_json(error) from error
    await asyncio.sleep(0)
    return body


def parse_json(raw: bytes) -> dict[str, Any]:
    """Raises: InvalidRequest if it is no JSON object."""
    try:
        return _object(orjson.loads(raw))
    except orjson.JSONDecodeError as error:
        raise _not_json(error) from error


def _not_json(error: orjson.JSONDecodeError) -> InvalidRequest:
    return InvalidRequest(f"the body is not valid JSON: {error}")


def _object(body: Any) -> dict[str, Any]:
    """Raises: InvalidRequest."""
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return body


_EXTRAS = frozenset(
    {
        *("top_k", "min_p", "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
        *("skip_special_tokens", "chat_template_kwargs", "cache_salt", "priority"),
        *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    }
)
"""Fields of our own and vLLM's that any kind of request may have."""


def as_chat_request(
    fields: dict[str, Any], extras: Mapping[str, Any] | None
) -> ChatCompletionRequest:
    """What another kind of request was translated to; `extras`: its fields that nobody there knew.

    Raises: InvalidRequest.
    """
    known = {name: value for name, value in (extras or {}).items() if name in _EXTRAS}
    return validate(ChatCompletionRequest, {**known, **fields})


def validate(model: type[M], body: dict[str, Any]) -> M:
    """Raises: InvalidRequest."""
    refuse_unsupported(body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        refusal = from_validation(error)
    # Not `from error`: that one knows our frames, by what a validator raised, and the garbage
    # collector does not see it do so. Whoever kept the refusal in one of these kept all for ever.
    raise refusal
