"""What endpoints have in common when they put text into objects, and these into a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from xllm.errors import RequestError
from xllm.roles.api.errors import error_object
from xllm.roles.api.sample import Part
from xllm.roles.api.sse import DONE, event
from xllm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all samples of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cached_tokens_by_tier: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "cached_tokens_by_tier": self.cached_tokens_by_tier,
            },
        }


class Format(ABC):
    """One answer of one endpoint. Plain dicts, since each token makes one.

    Either `response`, or `begin`, `more` as often as there is something, and `end` or `fail`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        response_id: str,
        created: int,
        model: str,
        with_logprobs: bool,
        include_usage: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._include_usage = include_usage
        self._head = {"id": response_id, "created": created, "model": model}

    @abstractmethod
    def begin(self, num_choices: int, usage: Usage) -> bytes:
        """What a stream begins with, as of the first token."""

    @abstractmethod
    def more(self, index: int, part: Part) -> bytes:
        """Events for what the choice at `index` got."""

    @abstractmethod
    def end(self, usage: Usage) -> bytes:
        """What a stream ends with, when all its choices have ended."""

    @abstractmethod
    def fail(self, error: RequestError) -> bytes:
        """What a stream ends with that cannot go on."""

    @abstractmethod
    def response(self, parts: Sequence[Part], usage: Usage) -> dict[str, Any]:
        """The whole answer; each part has a finish_reason."""


class ChunkFormat(Format):
    """OpenAI's older endpoints: a stream of chunks that look like each other."""

    kind: ClassVar[str]
    """`object` of a whole answer."""
    chunk_kind: ClassVar[str]
    """`object` of a chunk."""

    @abstractmethod
    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Chunks that a stream begins with."""

    @abstractmethod
    def chunks(self, index: int, part: Part) -> list[dict[str, Any]]:
        """Chunks for what the choice at `index` got."""

    @abstractmethod
    def choice(self, index: int, part: Part) -> dict[str, Any]:
        """One choice of a whole answer."""

    def begin(self, num_choices: int, usage: Usage) -> bytes:
        return b"".join(map(event, self.opening(num_choices)))

    def more(self, index: int, part: Part) -> bytes:
        return b"".join(map(event, self.chunks(index, part)))

    def end(self, usage: Usage) -> bytes:
        return (event(self._usage_chunk(usage)) if self._include_usage else b"") + DONE

    def fail(self, error: RequestError) -> bytes:
        """Without a `[DONE]`."""
        return event(error_object(error))

    def response(self, parts: Sequence[Part], usage: Usage) -> dict[str, Any]:
        return {
            **self._head,
            "object": self.kind,
            "choices": [self.choice(index, part) for index, part in enumerate(parts)],
            "usage": usage.as_dict(),
        }

    def _usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {
            **self._head,
            "object": self.chunk_kind,
            "choices": [],
            "usage": usage.as_dict(),
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        # Where usage was asked for, every chunk but the last says null.
        tail = {"usage": None} if self._include_usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": [choice], **tail}
