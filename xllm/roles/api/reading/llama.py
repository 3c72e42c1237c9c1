"""The notation of Llama 3: the whole answer is {"name": ..., "parameters": {...}}, several of them
with a semicolon between; `<|python_tag|>` may stand in front.

An answer that begins in another way is a text, as is an object that calls no tool of the request.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence

from xllm.roles.api import grammars
from xllm.roles.api.reading.call_object import CallObject
from xllm.roles.api.reading.calls import Reading, Tool, ToolReader

TAG = "<|python_tag|>"


class _State(enum.Enum):
    BETWEEN = enum.auto()
    """Before the first call, and after each."""
    CALL = enum.auto()
    TEXT = enum.auto()
    LOST = enum.auto()
    """In the middle of a call that the client knows, it was none."""


class LlamaReader(ToolReader):
    markers = (TAG,)

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools)
        self._state = _State.BETWEEN
        self._held = ""
        """Nothing of it was shown."""
        self._call = CallObject()
        self._is_begun = False
        """The client knows of the call."""

    def push(self, text: str) -> Reading:
        reading = Reading()
        rest = text
        while rest and self._state is not _State.LOST:
            if self._state is _State.TEXT:
                reading.text += rest
                break
            if self._state is _State.BETWEEN:
                rest = self._read_between(self._held + rest)
            else:
                rest = self._read_call(rest, reading)
            reading.text += self._take_text()
        return reading

    def flush(self) -> Reading:
        reading = Reading()
        if self._state is _State.CALL:
            reading.text = "" if self._is_begun else self._held
        elif self.num_calls == 0:
            reading.text = self._held
        self._held = ""
        return reading

    def _take_text(self) -> str:
        """What was held, once it is known to be no call."""
        if self._state is not _State.TEXT:
            return ""
        held, self._held = self._held, ""
        return held

    def _read_between(self, text: str) -> str:
        self._held = text
        begin = text.lstrip(" \t\r\n;," if self.num_calls else None)
        if begin.startswith(TAG):
            begin = begin[len(TAG) :].lstrip()
        elif TAG.startswith(begin):
            return ""
        if not begin:
            return ""
        if begin[0] != "{":
            self._state = _State.TEXT
            return ""
        self._state = _State.CALL
        self._call, self._is_begun = CallObject(), False
        self._held = text[: len(text) - len(begin)]
        return begin

    def _read_call(self, text: str, reading: Reading) -> str:
        call = self._call
        count = call.push(text)
        if not self._is_begun:
            self._held += text[:count]
            is_call = call.name is None or call.name in self.tool_names
            if not is_call or (call.has_failed and not call.is_ready):
                self._state = _State.TEXT
                return text[count:]
            if call.is_ready:
                assert call.name is not None
                reading.calls.append(self._begin_call(call.name))
                self._is_begun = True
                self._held = ""
        if self._is_begun and (arguments := call.take_arguments()):
            reading.calls.append(self._more(arguments))
        if call.is_done:
            self._state = _State.BETWEEN
        elif call.has_failed:
            self._state = _State.LOST
        return text[count:]

    @classmethod
    def lark(cls, tools: Sequence[Tool], max_calls: int) -> str:
        names = [f"call_{i}" for i in range(len(tools))]
        more = f' ("; " call){{0,{max_calls - 1}}}' if max_calls > 1 else ""
        lines = [f"start: call{more}", f"call: {' | '.join(names)}"]
        for name, tool in zip(names, tools, strict=True):
            head = grammars.literal(f'{{"name": {json.dumps(tool.name)}, "parameters": ')
            lines.append(f'{name}: {head} {grammars.inline_json(tool.strict_parameters)} "}}"')
        return "\n".join(lines) + "\n"
