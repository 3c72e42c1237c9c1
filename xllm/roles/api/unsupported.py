"""Fields that clients may send and that change the answer, but are not supported yet.

Ignoring one would answer another question than the one that was asked, so each is refused by name,
unless its value asks for nothing. A feature that comes takes its entry out of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from xllm.errors import InvalidRequest

_Harmless = Callable[[Any, Mapping[str, Any]], bool]


def _falsy(value: Any, body: Mapping[str, Any]) -> bool:
    return not value


_UNSUPPORTED: dict[str, _Harmless] = {
    "tools": lambda value, body: not value or "prompt" not in body,  # they are for chats
    "functions": lambda value, body: not value or body.get("function_call") == "none",
    "function_call": lambda value, body: value in ("none", "auto"),
    "modalities": lambda value, body: value == ["text"],
    "best_of": lambda value, body: value == (body.get("n") or 1),
    **dict.fromkeys(
        (
            "structural_tag",
            "audio",
            "prediction",
            "web_search_options",
            "suffix",
            "use_beam_search",
            "prompt_logprobs",
            "prompt_embeds",
            "truncate_prompt_tokens",
            "logits_processors",
            "allowed_token_ids",
            "bad_words",
            "include_stop_str_in_output",
            "chat_template",
            "documents",
        ),
        _falsy,
    ),
}


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Raises: InvalidRequest that names the first such field of `body`."""
    for name in _UNSUPPORTED.keys() & body.keys():
        value = body[name]
        if value is not None and not _UNSUPPORTED[name](value, body):
            raise InvalidRequest(f"{name} is not supported yet", param=name)
