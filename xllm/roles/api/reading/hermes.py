"""The notation of Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

import json
from collections.abc import Sequence

from xllm.roles.api import grammars
from xllm.roles.api.reading.call_object import CallObject
from xllm.roles.api.reading.calls import Reading, Tool, ToolReader, held_back

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


class HermesReader(ToolReader):
    markers = (OPEN, CLOSE)

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools)
        self._held = ""
        self._call: CallObject | None = None
        """The one that is being read."""
        self._raw = ""
        """What was read of it, while it may still turn out to be none."""
        self._is_begun = False
        """The client knows of the call."""
        self._is_closing = False
        """Between the object's end and `</tool_call>`."""

    def push(self, text: str) -> Reading:
        reading = Reading()
        rest = self._held + text
        self._held = ""
        while rest:
            if self._call is not None:
                rest = self._read_call(rest, reading)
            elif self._is_closing:
                rest = self._read_close(rest)
            else:
                rest = self._read_text(rest, reading)
        return reading

    def flush(self) -> Reading:
        reading = Reading()
        if self._call is not None and not self._is_begun:
            reading.text = self._raw
        elif self._call is None and not self._is_closing:
            reading.text = self._held if self.num_calls == 0 else self._held.rstrip()
        self._held = ""
        return reading

    def _read_text(self, text: str, reading: Reading) -> str:
        """Up to a call; white space before it is no part of the text. Returns the rest."""
        at = text.find(OPEN)
        if at >= 0:
            reading.text += text[:at].rstrip()
            self._call, self._raw, self._is_begun = CallObject(), OPEN, False
            return text[at + len(OPEN) :]
        keep = held_back(text, OPEN)
        end = len(text[: len(text) - keep].rstrip())
        reading.text += text[:end]
        self._held = text[end:]
        return ""

    def _read_call(self, text: str, reading: Reading) -> str:
        call = self._call
        assert call is not None
        count = call.push(text)
        if not self._is_begun:
            self._raw += text[:count]
            if call.is_ready:
                assert call.name is not None
                reading.calls.append(self._begin_call(call.name))
                self._is_begun = True
        if self._is_begun and (arguments := call.take_arguments()):
            reading.calls.append(self._more(arguments))
        if call.has_failed:
            self._give_up(reading)
        if call.is_done:
            self._call = None
            self._is_closing = True
        return text[count:]

    def _give_up(self, reading: Reading) -> None:
        """It is no call: shown as it is, unless the client knows of a call already."""
        self._call = None
        if self._is_begun:
            self._is_closing = True
        else:
            reading.text += self._raw

    def _read_close(self, text: str) -> str:
        """What else stands in front of the next tag is dropped."""
        close, open_ = text.find(CLOSE), text.find(OPEN)
        if close >= 0 and (open_ < 0 or close < open_):
            self._is_closing = False
            return text[close + len(CLOSE) :]
        if open_ >= 0:
            self._is_closing = False
            return text[open_:]
        self._held = text[len(text) - max(held_back(text, CLOSE), held_back(text, OPEN)) :]
        return ""

    @classmethod
    def lark(cls, tools: Sequence[Tool], max_calls: int) -> str:
        names = [f"call_{i}" for i in range(len(tools))]
        more = f' ("\\n" call){{0,{max_calls - 1}}}' if max_calls > 1 else ""
        lines = [
            f"start: call{more}",
            f'call: "{OPEN}\\n" ({" | ".join(names)}) "\\n{CLOSE}"',
        ]
        for name, tool in zip(names, tools, strict=True):
            head = grammars.literal(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
            lines.append(f'{name}: {head} {grammars.inline_json(tool.strict_parameters)} "}}"')
        return "\n".join(lines) + "\n"
