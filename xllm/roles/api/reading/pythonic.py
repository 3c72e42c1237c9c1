"""The notation of Llama 4 and of the small Llama 3.2: [get_weather(city="Paris"), now()].

A call is passed on when it is complete. Forced calls are written as Llama 3 does, since a JSON
schema says what JSON looks like, not Python; so an answer that begins with a brace is read as that.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

from xllm.roles.api.reading.calls import CallDelta, Reading, Tool, ToolReader
from xllm.roles.api.reading.llama import LlamaReader

OPEN, CLOSE = "<|python_start|>", "<|python_end|>"
_CLOSING = {")": "(", "]": "[", "}": "{"}


class PythonicReader(ToolReader):
    markers = (OPEN, CLOSE)

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools)
        self._tools = tools
        self._json: LlamaReader | None = None
        self._held = ""
        """From the beginning of the answer or of the present call."""
        self._prefix = ""
        """What stood before the first call."""
        self._is_text = False
        self._is_list = False
        """Its bracket was read."""
        self._has_ended = False
        self._scanned = 0
        self._open: list[str] = []
        self._quote = ""
        self._is_escaped = False

    def push(self, text: str) -> Reading:
        if self._json is not None:
            return self._with_json(self._json.push(text))
        if self._is_text:
            return Reading(text)
        if self._has_ended:
            return Reading()
        self._held += text
        if not self._is_list and not self._has_begun():
            return self._as_text() if self._is_text else self._as_json()
        return self._read_calls()

    def flush(self) -> Reading:
        if self._json is not None:
            return self._with_json(self._json.flush())
        held, self._held = self._held, ""
        return Reading("" if self.num_calls else held)

    def _has_begun(self) -> bool:
        """Whether the list has; if not, it may still come, or the answer is something else."""
        begin = self._held.lstrip()
        if begin.startswith(OPEN):
            begin = begin[len(OPEN) :].lstrip()
        elif OPEN.startswith(begin):
            return False
        if not begin:
            return False
        if begin[0] == "{":
            self._json = LlamaReader(self._tools)
        elif begin[0] != "[":
            self._is_text = True
        else:
            self._is_list = True
            self._prefix = self._held[: len(self._held) - len(begin) + 1]
            self._held = begin[1:]
        return self._is_list

    def _as_json(self) -> Reading:
        if self._json is None:
            return Reading()
        held, self._held = self._held, ""
        return self._with_json(self._json.push(held.removeprefix(OPEN)))

    def _with_json(self, reading: Reading) -> Reading:
        assert self._json is not None
        self.num_calls = self._json.num_calls
        return reading

    def _as_text(self) -> Reading:
        held, self._held = self._held, ""
        return Reading(held)

    def _read_calls(self) -> Reading:
        reading = Reading()
        while self._scanned < len(self._held) and not self._has_ended:
            char = self._held[self._scanned]
            self._scanned += 1
            if not self._is_call_end(char):
                continue
            call, self._held = self._held[: self._scanned], self._held[self._scanned :]
            self._scanned = 0
            deltas = self._parse(call.lstrip(" \t\r\n,"))
            if deltas is None:
                self._is_text = self.num_calls == 0
                self._has_ended = True
                if self._is_text:
                    reading.text = self._prefix + call + self._held
                self._held = ""
                return reading
            reading.calls += deltas
        return reading

    def _is_call_end(self, char: str) -> bool:
        """At a closing parenthesis that belongs to the list's own level; notes the list's end."""
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char in "([{":
            self._open.append(char)
        elif char == "]" and not self._open:
            self._has_ended = True
            is_call = bool(self._held[: self._scanned - 1].strip(" \t\r\n,"))
            return is_call or self.num_calls == 0  # which does not parse, and is shown as it is
        elif char in _CLOSING:
            if not self._open or self._open.pop() != _CLOSING[char]:
                return True  # nonsense, which does not parse
            return char == ")" and not self._open
        return False

    def _parse(self, text: str) -> list[CallDelta] | None:
        """None: it is no call of a tool."""
        try:
            node = ast.parse(text, mode="eval").body
            if not isinstance(node, ast.Call) or node.args or not _is_name(node.func):
                return None
            name = ast.unparse(node.func)
            values = {item.arg: _value(item.value) for item in node.keywords if item.arg}
            arguments = json.dumps(values, ensure_ascii=False, allow_nan=False)
        except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
            return None
        if name not in self.tool_names:
            return None
        return [self._begin_call(name), self._more(arguments)]

    @classmethod
    def lark(cls, tools: Sequence[Tool], max_calls: int) -> str:
        return LlamaReader.lark(tools, max_calls)


def _is_name(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _value(node: ast.expr) -> Any:
    """Raises: ValueError."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    return ast.literal_eval(node)
