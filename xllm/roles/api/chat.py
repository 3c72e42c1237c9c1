"""Objects of /v1/chat/completions.

A stream opens with the role of every choice, brings text, and closes each choice with a chunk of
its own that has the finish_reason and no text.
"""

from __future__ import annotations

from typing import Any

from xllm.roles.api.format import Format
from xllm.roles.api.logprobs import chat_logprobs
from xllm.roles.api.sample import Part


class ChatFormat(Format):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        return [
            self._delta(index, {"role": "assistant", "content": ""}) for index in range(num_choices)
        ]

    def chunks(self, index: int, part: Part) -> list[dict[str, Any]]:
        chunks = []
        if part.text or part.scores:
            chunks.append(self._delta(index, {"content": part.text}, self._logprobs(part)))
        if part.finish_reason is not None:
            chunks.append(self._delta(index, {}, finish_reason=part.finish_reason))
        return chunks

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": part.text, "refusal": None},
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
