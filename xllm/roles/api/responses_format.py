"""Objects and events of OpenAI's /v1/responses.

An answer is a list of items: thoughts, a message, calls. Whole or streamed, they come out of one
`_Items`, which opens an item with its first piece and closes it with the first piece of another.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import orjson

from xllm.errors import RequestError
from xllm.protocol import FinishReason
from xllm.roles.api.errors import error_object
from xllm.roles.api.format import Format, Usage
from xllm.roles.api.responses_requests import ResponsesRequest
from xllm.roles.api.sample import Part


class ResponsesFormat(Format):
    """One choice; `begin`, `more` and `end` are called in this order."""

    def __init__(self, *args: Any, request: ResponsesRequest, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._request = request
        self._items = _Items()
        self._finish_reason: str | None = None

    def begin(self, num_choices: int, usage: Usage) -> bytes:
        response = self._response("in_progress", None)
        self._items.emit("response.created", response=response)
        self._items.emit("response.in_progress", response=response)
        return self._items.take_events()

    def more(self, index: int, part: Part) -> bytes:
        self._items.add(part)
        self._finish_reason = part.finish_reason
        return self._items.take_events()

    def end(self, usage: Usage) -> bytes:
        status = self._status(self._finish_reason)
        self._items.close(status)
        self._items.emit(f"response.{status}", response=self._response(status, usage))
        return self._items.take_events()

    def fail(self, error: RequestError) -> bytes:
        response = self._response("failed", None)
        response["error"] = {"code": "server_error", "message": error.message}
        # The error by itself for clients that know no failed response.
        detail = error_object(error)["error"]
        self._items.emit("error", code=detail["code"], message=error.message, param=error.param)
        self._items.emit("response.failed", response=response)
        return self._items.take_events()

    def response(self, parts: Sequence[Part], usage: Usage) -> dict[str, Any]:
        [part] = parts
        self._items.add(part)
        status = self._status(part.finish_reason)
        self._items.close(status)
        return self._response(status, usage)

    def _status(self, finish_reason: str | None) -> str:
        return "incomplete" if finish_reason == FinishReason.LENGTH else "completed"

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        request = self._request
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        choice = request.tool_choice
        form = request.text and request.text.format
        return {
            "id": self._head["id"],
            "object": "response",
            "created_at": self._head["created"],
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._head["model"],
            "output": list(self._items.done),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {
                "format": form.model_dump(by_alias=True, exclude_none=True)
                if form
                else {"type": "text"}
            },
            "tool_choice": choice.model_dump()
            if choice is not None and not isinstance(choice, str)
            else choice or "auto",
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }


class _Items:
    """The items of one answer, and the events that tell of them."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._call: int | None = None
        self._text: list[str] = []
        """Of the open item."""
        self._events: list[bytes] = []
        self._num_events = 0

    def take_events(self) -> bytes:
        events = b"".join(self._events)
        self._events.clear()
        return events

    def emit(self, kind: str, **fields: Any) -> None:
        payload = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        self._events.append(b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps(payload)))

    def add(self, part: Part) -> None:
        if part.thoughts:
            self._begin("reasoning")
            self._more("response.reasoning_text.delta", part.thoughts, content_index=0)
        if part.text:
            self._begin("message")
            extra = {"content_index": 0, "logprobs": []}
            self._more("response.output_text.delta", part.text, **extra)
        for call in part.calls:
            if call.id is not None:
                self.close("completed")
                item = {"call_id": call.id, "name": call.name, "arguments": ""}
                self._begin("function_call", **item)
            if call.arguments:
                self._more("response.function_call_arguments.delta", call.arguments)

    def close(self, status: str) -> None:
        """The open item is complete, or was cut short."""
        item = self._open
        if item is None:
            return
        self._open = None
        text = "".join(self._text)
        place = {"item_id": item["id"], "output_index": len(self.done)}
        if item["type"] == "function_call":
            item = {**item, "arguments": text}
            self.emit(
                "response.function_call_arguments.done",
                **place,
                name=item["name"],
                arguments=text,
            )
        elif item["type"] == "reasoning":
            item = {**item, "content": [{"type": "reasoning_text", "text": text}]}
            self.emit("response.reasoning_text.done", **place, content_index=0, text=text)
        else:
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
            item = {**item, "content": [part]}
            extra = {**place, "content_index": 0}
            self.emit("response.output_text.done", **extra, text=text, logprobs=[])
            self.emit("response.content_part.done", **extra, part=part)
        item["status"] = status
        self.emit("response.output_item.done", output_index=len(self.done), item=item)
        self.done.append(item)

    def _begin(self, kind: str, **fields: Any) -> None:
        if self._open is not None and self._open["type"] == kind:
            return
        self.close("completed")
        self._text = []
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item: dict[str, Any] = {
            "id": f"{prefix}_{uuid.uuid4().hex}",
            "type": kind,
            "status": "in_progress",
            **fields,
        }
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        self._open = item
        self.emit("response.output_item.added", output_index=len(self.done), item=item)
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.emit(
                "response.content_part.added",
                item_id=item["id"],
                output_index=len(self.done),
                content_index=0,
                part=part,
            )

    def _more(self, kind: str, delta: str, **fields: Any) -> None:
        assert self._open is not None
        self._text.append(delta)
        place = {"item_id": self._open["id"], "output_index": len(self.done)}
        self.emit(kind, **place, **fields, delta=delta)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
