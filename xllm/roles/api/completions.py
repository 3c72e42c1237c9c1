"""Objects of /v1/completions; chunks of a stream look like the whole answer."""

from __future__ import annotations

from typing import Any

from xllm.roles.api.format import ChunkFormat
from xllm.roles.api.logprobs import completion_logprobs
from xllm.roles.api.sample import Part


class CompletionFormat(ChunkFormat):
    kind = chunk_kind = "text_completion"

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        return []

    def chunks(self, index: int, part: Part) -> list[dict[str, Any]]:
        return [self._chunk(self.choice(index, part))] if part else []

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        scores = part.scores if self._with_logprobs else None
        return {
            "index": index,
            "text": part.text,
            "logprobs": None if scores is None else completion_logprobs(scores, self._tokenizer),
            "finish_reason": part.finish_reason,
        }
