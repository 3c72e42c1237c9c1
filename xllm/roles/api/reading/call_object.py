"""One call written as a JSON object: {"name": ..., "arguments": {...}}, as its characters arrive.

The arguments are passed on as the model writes them, which is JSON already, as soon as the name is
known. Only the object's own level is looked at; inside a value, strings and brackets are counted.

    BEGIN -{-> KEY -"-> IN_KEY -"-> COLON -:-> VALUE ──> IN_VALUE ──> NEXT -}-> done
                 ^                                                     │
                 └──────────────────────,──────────────────────────────┘
"""

from __future__ import annotations

import enum
import json

_NAME_KEYS = frozenset({"name"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_SPACE = " \t\r\n"


class _State(enum.Enum):
    BEGIN = enum.auto()
    KEY = enum.auto()
    IN_KEY = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    IN_VALUE = enum.auto()
    NEXT = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class CallObject:
    """The state of one object; `push` until it is done or has failed."""

    def __init__(self) -> None:
        self._state = _State.BEGIN
        self._raw: list[str] = []
        """Of the key or value that is being read."""
        self._key = ""
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._arguments: list[str] = []
        """That were not taken."""
        self._has_arguments = False
        self.name: str | None = None

    @property
    def is_done(self) -> bool:
        return self._state is _State.DONE

    @property
    def has_failed(self) -> bool:
        """It is no such object."""
        return self._state is _State.FAILED

    @property
    def is_ready(self) -> bool:
        """The name is known, and arguments have begun to come, or there are none."""
        return self.name is not None and (self._has_arguments or self.is_done)

    def push(self, text: str) -> int:
        """How many characters were read: all, unless the object ends among them."""
        for count, char in enumerate(text):
            if self._state in (_State.DONE, _State.FAILED):
                return count
            self._step(char)
        return len(text)

    def take_arguments(self) -> str:
        """What has come of them since the last time; an object that is done has some."""
        taken = "".join(self._arguments)
        self._arguments.clear()
        if self.is_done and not self._has_arguments:
            self._has_arguments = True
            return taken + "{}"
        return taken

    def _step(self, char: str) -> None:
        state = self._state
        if state is _State.IN_VALUE:
            self._value_char(char)
        elif state is _State.IN_KEY:
            self._key_char(char)
        elif char in _SPACE:
            return
        elif state is _State.BEGIN:
            self._state = _State.KEY if char == "{" else _State.FAILED
        elif state is _State.KEY and char == '"':
            self._raw = [char]
            self._state = _State.IN_KEY
        elif state is _State.COLON and char == ":":
            self._state = _State.VALUE
        elif state is _State.VALUE:
            self._raw = []
            self._depth = 0
            self._state = _State.IN_VALUE
            self._value_char(char)
        elif state is _State.NEXT and char == ",":
            self._state = _State.KEY
        elif state in (_State.NEXT, _State.KEY) and char == "}":
            self._state = _State.DONE if self.name is not None else _State.FAILED
        else:
            self._state = _State.FAILED

    def _key_char(self, char: str) -> None:
        self._raw.append(char)
        if self._string_goes_on(char):
            return
        try:
            self._key = json.loads("".join(self._raw))
        except ValueError:
            self._state = _State.FAILED
            return
        self._state = _State.COLON

    def _string_goes_on(self, char: str) -> bool:
        """Of a string whose opening quote was read before."""
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            return False
        return True

    def _value_char(self, char: str) -> None:
        if self._in_string:
            self._keep(char)
            self._in_string = self._string_goes_on(char)
            if not self._in_string and self._depth == 0:
                self._end_value()
        elif char in ",}]" and self._depth == 0:  # ends a number or a word
            self._end_value()
            if self._state is _State.NEXT:
                self._step(char)
        elif char in _SPACE and self._depth == 0:
            self._end_value()
        else:
            self._keep(char)
            if char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._end_value()

    @property
    def _is_streamed(self) -> bool:
        return self._key in _ARGUMENT_KEYS and self._raw[:1] == ["{"]

    def _keep(self, char: str) -> None:
        self._raw.append(char)
        if self._is_streamed:
            self._has_arguments = True
            self._arguments.append(char)

    def _end_value(self) -> None:
        self._state = _State.NEXT
        if self._is_streamed:
            return
        try:
            value = json.loads("".join(self._raw))
        except (ValueError, RecursionError):
            self._state = _State.FAILED
            return
        if self._key in _NAME_KEYS:
            if isinstance(value, str) and value:
                self.name = value
            else:
                self._state = _State.FAILED
        elif self._key in _ARGUMENT_KEYS and isinstance(value, str):
            # Some models quote them once more.
            self._has_arguments = True
            self._arguments.append(value)
