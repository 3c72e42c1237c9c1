"""Calls of tools as they come out of a text: what every notation's reader has in common."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

MAX_CALLS = 16
"""That a grammar lets a model make in one answer."""
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call."""

    name: str
    parameters: Mapping[str, Any]
    """Its JSON schema."""

    @property
    def strict_parameters(self) -> Mapping[str, Any]:
        """Where the schema does not say, arguments that it does not name are not made up."""
        if self.parameters.get("type", "object") != "object":
            return self.parameters
        return {"type": "object", "additionalProperties": False, **self.parameters}


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What was added to a call. The first of each brings `id` and `name`, the others arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Reading:
    """What a piece of text turned out to be."""

    text: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ToolReader(ABC):
    """Reads one sample's text, piece by piece; holds back what may be the beginning of a call."""

    markers: ClassVar[tuple[str, ...]] = ()
    """Texts that tell the notation, which must reach the reader even where they are special
    tokens."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tool_names = frozenset(tool.name for tool in tools)
        self.num_calls = 0

    @abstractmethod
    def push(self, text: str) -> Reading: ...

    @abstractmethod
    def flush(self) -> Reading:
        """The end of the text: what was held back."""

    @classmethod
    @abstractmethod
    def lark(cls, tools: Sequence[Tool], max_calls: int) -> str:
        """The grammar of 1 to `max_calls` calls of these tools."""

    def _begin_call(self, name: str) -> CallDelta:
        index = self.num_calls
        self.num_calls += 1
        return CallDelta(index, f"call_{uuid.uuid4().hex[:24]}", name)

    def _more(self, arguments: str) -> CallDelta:
        """Of the call that was begun last."""
        return CallDelta(self.num_calls - 1, arguments=arguments)


def join_calls(deltas: Sequence[CallDelta]) -> list[CallDelta]:
    """The whole calls that the deltas of one answer make."""
    calls: list[CallDelta] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        if delta.id is not None:
            calls.append(delta)
            arguments.append([])
        arguments[delta.index].append(delta.arguments)
    return [
        replace(call, arguments="".join(pieces))
        for call, pieces in zip(calls, arguments, strict=True)
    ]


def held_back(text: str, marker: str) -> int:
    """How many characters at the end of `text` may begin `marker`."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0
