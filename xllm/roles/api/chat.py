"""Objects of /v1/chat/completions.

A stream opens with the role of every choice, brings thoughts, calls of tools and text, and closes
each choice with a chunk of its own that has the finish_reason and no text. A call begins with its
id and name; its arguments follow in pieces.
"""

from __future__ import annotations

from typing import Any

from xllm.roles.api.format import ChunkFormat
from xllm.roles.api.logprobs import chat_logprobs
from xllm.roles.api.reading.calls import CallDelta
from xllm.roles.api.sample import Part


class ChatFormat(ChunkFormat):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        return [
            self._delta(index, {"role": "assistant", "content": ""}) for index in range(num_choices)
        ]

    def chunks(self, index: int, part: Part) -> list[dict[str, Any]]:
        chunks = []
        if part.thoughts:
            chunks.append(self._delta(index, {"reasoning_content": part.thoughts}))
        if part.text or part.scores:
            chunks.append(self._delta(index, {"content": part.text}, self._logprobs(part)))
        chunks += [self._delta(index, {"tool_calls": [_call_delta(call)]}) for call in part.calls]
        if part.finish_reason is not None:
            chunks.append(self._delta(index, {}, finish_reason=part.finish_reason))
        return chunks

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": part.text, "refusal": None}
        if part.thoughts:
            message["reasoning_content"] = part.thoughts
        if part.calls:
            message["content"] = part.text or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in part.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(part),
            "finish_reason": part.finish_reason,
        }

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        return self._chunk(
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        )

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        return chat_logprobs(part.scores, self._tokenizer) if self._with_logprobs else None


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
