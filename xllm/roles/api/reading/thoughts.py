"""What a reasoning model thinks before it answers: <think> ... </think> at the beginning.

Templates of some models open the thoughts in the prompt already, so that the answer begins in the
middle of them.
"""

from __future__ import annotations

from typing import Final

from xllm.roles.api.reading.calls import held_back

OPEN, CLOSE = "<think>", "</think>"
MARKERS: Final = (OPEN, CLOSE)


def is_opened_by(prompt_text: str, *, always_thinks: bool) -> bool:
    """Whether an answer to this prompt begins in the middle of thoughts.

    `always_thinks`: a model that opens its thoughts without saying so (DeepSeek R1), unless the
    prompt has closed them.
    """
    end = prompt_text.rstrip()
    return end.endswith(OPEN) or (always_thinks and not end.endswith(CLOSE))


class ThoughtSplitter:
    """Divides a text, piece by piece, into (thoughts, answer)."""

    def __init__(self, *, is_thinking: bool) -> None:
        self._is_thinking = is_thinking
        self._may_open = True
        """Nothing but white space has come."""
        self._skips_space = is_thinking
        """After a tag."""
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        rest = self._held + text
        self._held = ""
        thoughts = ""
        if self._may_open:
            rest = self._read_open(rest)
        if self._is_thinking and rest:
            thoughts, rest = self._read_thoughts(rest)
        return thoughts, self._without_space(rest)

    def flush(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._is_thinking else ("", held)

    def _read_open(self, text: str) -> str:
        """`<think>` may stand in front, also where the prompt has it."""
        begin = text.lstrip()
        if OPEN.startswith(begin) and len(begin) < len(OPEN):
            self._held = text
            return ""
        self._may_open = False
        if not begin.startswith(OPEN):
            return text
        self._is_thinking = self._skips_space = True
        return begin[len(OPEN) :]

    def _read_thoughts(self, text: str) -> tuple[str, str]:
        text = self._without_space(text)
        at = text.find(CLOSE)
        if at >= 0:
            self._is_thinking = False
            self._skips_space = True
            return text[:at].rstrip(), text[at + len(CLOSE) :]
        end = len(text[: len(text) - held_back(text, CLOSE)].rstrip())
        self._held = text[end:]
        return text[:end], ""

    def _without_space(self, text: str) -> str:
        if self._skips_space and text:
            text = text.lstrip()
            self._skips_space = not text
        return text
