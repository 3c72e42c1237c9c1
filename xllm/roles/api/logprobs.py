"""Log-probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xllm.roles.api.sample import Score
from xllm.tokenizer import Tokenizer

_LEAST = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON cannot say."""


def chat_logprobs(scores: Iterable[Score], tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""
    content = []
    for score in scores:
        entry = _chat_entry(score.token_id, score.logprob or 0.0, tokenizer)
        entry["top_logprobs"] = [_chat_entry(i, p, tokenizer) for i, p in score.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(scores: Iterable[Score], tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of a plain completion; alternatives include the token itself."""
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    for score in scores:
        token = tokenizer.token_name(score.token_id)
        tokens.append(token)
        text_offset.append(score.offset)
        if score.logprob is None:
            token_logprobs.append(None)
            top_logprobs.append(None)
            continue
        logprob = max(score.logprob, _LEAST)
        top = {tokenizer.token_name(i): max(p, _LEAST) for i, p in score.top}
        token_logprobs.append(logprob)
        top_logprobs.append(top | {token: logprob})
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": text_offset,
    }


def _chat_entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_name(token_id),
        "logprob": max(logprob, _LEAST),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
