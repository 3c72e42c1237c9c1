"""Objects and events of Anthropic's /v1/messages.

A stream is a message that starts, content blocks one after the other (thoughts, text, calls), and
a message that stops. A block is closed by the first piece of another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson

from xllm.errors import RequestError
from xllm.protocol import FinishReason
from xllm.roles.api.errors import anthropic_error_object
from xllm.roles.api.format import Format, Usage
from xllm.roles.api.sample import Part

_STOP_REASONS = {
    FinishReason.LENGTH: "max_tokens",
    FinishReason.STOP: "end_turn",
    "tool_calls": "tool_use",
}


class MessagesFormat(Format):
    """One choice; `begin`, `more` and `end` are called in this order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._block: str | None = None
        """Which kind is open."""
        self._num_blocks = 0
        """That are closed."""
        self._has_calls = False
        self._end: Part | None = None

    def begin(self, num_choices: int, usage: Usage) -> bytes:
        message = self._message([], None, usage)
        message["usage"]["output_tokens"] = 0
        return _event("message_start", message=message)

    def more(self, index: int, part: Part) -> bytes:
        events = []
        if part.thoughts:
            events += self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            events.append(self._delta({"type": "thinking_delta", "thinking": part.thoughts}))
        if part.text:
            events += self._open("text", {"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": part.text}))
        for call in part.calls:
            if call.id is not None:
                block: dict[str, Any] = {
                    "type": "tool_use",
                    "id": _tool_id(call.id),
                    "name": call.name,
                    "input": {},
                }
                events += self._open(f"tool_use {call.index}", block)
                self._has_calls = True
            if call.arguments:
                delta = {"type": "input_json_delta", "partial_json": call.arguments}
                events.append(self._delta(delta))
        if part.finish_reason is not None:
            self._end = part
        return b"".join(events)

    def end(self, usage: Usage) -> bytes:
        assert self._end is not None
        events = self._close()
        delta = self._stop(self._end, self._has_calls)
        events.append(_event("message_delta", delta=delta, usage=_usage(usage)))
        events.append(_event("message_stop"))
        return b"".join(events)

    def fail(self, error: RequestError) -> bytes:
        return _event("error", **anthropic_error_object(error))

    def response(self, parts: Sequence[Part], usage: Usage) -> dict[str, Any]:
        [part] = parts
        blocks: list[dict[str, Any]] = []
        if part.thoughts:
            blocks.append({"type": "thinking", "thinking": part.thoughts, "signature": ""})
        if part.text:
            blocks.append({"type": "text", "text": part.text})
        blocks += [
            {
                "type": "tool_use",
                "id": _tool_id(call.id or ""),
                "name": call.name,
                "input": _arguments(call.arguments),
            }
            for call in part.calls
        ]
        return self._message(blocks, part, usage)

    def _message(
        self, blocks: list[dict[str, Any]], part: Part | None, usage: Usage
    ) -> dict[str, Any]:
        stop = {"stop_reason": None, "stop_sequence": None}
        if part is not None:
            stop = self._stop(part, bool(part.calls))
        return {
            "id": self._head["id"],
            "type": "message",
            "role": "assistant",
            "model": self._head["model"],
            "content": blocks,
            **stop,
            "usage": _usage(usage),
        }

    def _stop(self, part: Part, has_calls: bool) -> dict[str, Any]:
        assert part.finish_reason is not None
        reason = _STOP_REASONS[part.finish_reason]
        if has_calls and part.finish_reason != FinishReason.LENGTH:
            reason = "tool_use"
        elif part.stop is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": part.stop}

    def _open(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        if self._block == kind:
            return []
        events = self._close()
        self._block = kind
        events.append(_event("content_block_start", index=self._num_blocks, content_block=block))
        return events

    def _close(self) -> list[bytes]:
        if self._block is None:
            return []
        self._block = None
        self._num_blocks += 1
        return [_event("content_block_stop", index=self._num_blocks - 1)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._num_blocks, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts what came from a cache apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _tool_id(call_id: str) -> str:
    return f"toolu_{call_id.removeprefix('call_')}"


def _arguments(text: str) -> dict[str, Any]:
    """Of a call that was cut short: none."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}
