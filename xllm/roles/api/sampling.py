"""From a request's fields to `SamplingParams`: defaults filled in, checked against the model."""

from __future__ import annotations

import secrets
from typing import TypeVar

import numpy as np

from xllm.errors import InvalidRequest
from xllm.protocol import ModelCard, SamplingParams
from xllm.roles.api.errors import ContextLengthExceeded
from xllm.roles.api.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest
from xllm.tokenizer import SamplingDefaults

_COMPLETION_MAX_TOKENS = 16
"""OpenAI's default of /v1/completions; a chat may use the rest of the context."""
_SEED_BITS = 63

T = TypeVar("T")


def choose_seed(requested: int | None) -> int:
    """63 bits: the client's own, or drawn here, so that a retry elsewhere draws the same tokens."""
    return secrets.randbits(_SEED_BITS) if requested is None else requested % (1 << _SEED_BITS)


def sampling_params(
    request: GenerationRequest,
    *,
    seed: int,
    num_prompt_tokens: int,
    defaults: SamplingDefaults,
    card: ModelCard,
) -> SamplingParams:
    """How to continue one prompt of the request.

    Raises: InvalidRequest; ContextLengthExceeded with both numbers.
    """
    max_tokens = _max_tokens(request, num_prompt_tokens, card)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens ({min_tokens}) must not be over max_tokens ({max_tokens})",
            param="min_tokens",
        )
    stop_token_ids = request.stop_token_ids or []
    check_vocabulary(stop_token_ids, card, param="stop_token_ids")
    logit_bias = {int(key): value for key, value in (request.logit_bias or {}).items()}
    check_vocabulary(list(logit_bias), card, param="logit_bias")
    top_p = _either(request.top_p, defaults.top_p)
    top_k = max(_either(request.top_k, defaults.top_k), 0)
    if top_p == 0:  # the smallest set with a probability of 0 or more: the likeliest token
        top_p, top_k = 1.0, 1
    echoes = isinstance(request, CompletionRequest) and request.echo
    return SamplingParams(
        temperature=_either(request.temperature, defaults.temperature),
        top_p=top_p,
        top_k=top_k,
        min_p=_either(request.min_p, defaults.min_p),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_either(request.repetition_penalty, defaults.repetition_penalty),
        logit_bias=logit_bias,
        logprobs=request.num_logprobs,
        prompt_logprobs=request.num_logprobs if echoes else None,
    )


def check_vocabulary(token_ids: list[int], card: ModelCard, *, param: str) -> None:
    """Raises: InvalidRequest if an id is none of the model's."""
    if not token_ids:
        return
    try:
        ids = np.array(token_ids, dtype=np.int64)  # one pass, of a prompt that may be very long
        extremes = (int(ids.min()), int(ids.max()))
    except OverflowError:
        extremes = (min(token_ids), max(token_ids))
    for token_id in extremes:
        if not 0 <= token_id < card.vocab_size:
            raise InvalidRequest(
                f"{param}: token id {token_id} is outside the vocabulary of {card.model_id}, "
                f"0 to {card.vocab_size - 1}",
                param=param,
            )


def _max_tokens(request: GenerationRequest, num_prompt_tokens: int, card: ModelCard) -> int:
    is_chat = isinstance(request, ChatCompletionRequest)
    param = "messages" if is_chat else "prompt"
    limit = f"This model's maximum context length is {card.max_model_len} tokens"
    room = card.max_model_len - num_prompt_tokens
    requested = request.requested_max_tokens
    if room < (1 if requested is None else min(requested, 1)):
        raise ContextLengthExceeded(
            f"{limit}, but the {param} has {num_prompt_tokens} tokens, which leaves no room for "
            f"an answer. Please shorten the {param}.",
            param=param,
        )
    if requested is None:
        return room if is_chat else min(_COMPLETION_MAX_TOKENS, room)
    if requested > room:
        raise ContextLengthExceeded(
            f"{limit}. However, you requested {num_prompt_tokens + requested} tokens "
            f"({num_prompt_tokens} in the {param}, {requested} for the completion). Please reduce "
            f"the length of the {param} or the completion.",
            param="max_completion_tokens" if request.max_completion_tokens else "max_tokens",
        )
    if requested == 0 and is_chat:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    return requested


def _either(value: T | None, default: T) -> T:
    return default if value is None else value
