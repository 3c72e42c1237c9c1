"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Iterable


class StopMatcher:
    """Cuts a stream of text before the first stop string, wherever its pieces are divided.

    The stop string that is complete first wins, of those the longest. Text is held back only while
    it may still be the beginning of a stop string. One Knuth-Morris-Pratt automaton per stop
    string: its state is the length of the longest end of the text that begins the stop string, so
    the largest state is exactly what must be held back.
    """

    __slots__ = ("_failures", "_held", "_states", "_stops", "stopped")

    def __init__(self, stops: Iterable[str]) -> None:
        # Longest first, so that of several complete at once the longest is found first.
        self._stops = sorted(filter(None, stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.stopped: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was found: then nothing follows."""
        if not self._stops:
            return text, False
        buffer = self._held + text
        states = self._states
        for end, char in enumerate(text, start=len(self._held) + 1):
            for i, stop in enumerate(self._stops):
                state = states[i]
                while state and stop[state] != char:
                    state = self._failures[i][state - 1]
                state += stop[state] == char
                if state == len(stop):
                    self._held = ""
                    self.stopped = stop
                    return buffer[: end - state], True
                states[i] = state
        keep = len(buffer) - max(states)
        self._held = buffer[keep:]
        return buffer[:keep], False

    def flush(self) -> str:
        """The end of the text: what was held back is no stop string after all."""
        held, self._held = self._held, ""
        return held


def _failure_table(pattern: str) -> list[int]:
    """Entry i: length of the longest proper prefix of `pattern[:i + 1]` that is also its suffix."""
    table = [0] * len(pattern)
    state = 0
    for i in range(1, len(pattern)):
        while state and pattern[i] != pattern[state]:
            state = table[state - 1]
        state += pattern[i] == pattern[state]
        table[i] = state
    return table
