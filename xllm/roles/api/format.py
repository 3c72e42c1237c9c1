"""What the two endpoints have in common when they put text into objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from xllm.roles.api.sample import Part
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
    """One endpoint's objects. Plain dicts, since each token makes one."""

    kind: ClassVar[str]
    """`object` of a whole answer."""
    chunk_kind: ClassVar[str]
    """`object` of a chunk."""

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
        self._head = {"id": response_id, "created": created, "model": model}
        # Where usage was asked for, every chunk but the last says null.
        self._tail = {"usage": None} if include_usage else {}

    @abstractmethod
    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Chunks that a stream begins with."""

    @abstractmethod
    def chunks(self, index: int, part: Part) -> list[dict[str, Any]]:
        """Chunks for what the choice at `index` got."""

    @abstractmethod
    def choice(self, index: int, part: Part) -> dict[str, Any]:
        """One choice of a whole answer."""

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        return {
            **self._head,
            "object": self.chunk_kind,
            "choices": [],
            "usage": usage.as_dict(),
        }

    def response(self, parts: Sequence[Part], usage: Usage) -> dict[str, Any]:
        """The whole answer; each part has a finish_reason."""
        return {
            **self._head,
            "object": self.kind,
            "choices": [self.choice(index, part) for index, part in enumerate(parts)],
            "usage": usage.as_dict(),
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [choice], **self._tail}
