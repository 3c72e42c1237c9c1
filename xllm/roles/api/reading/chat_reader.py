"""Reads one choice of a chat: parts of text become thoughts, calls and the answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from xllm.protocol import FinishReason
from xllm.roles.api.reading.calls import Reading, ToolReader
from xllm.roles.api.reading.thoughts import ThoughtSplitter
from xllm.roles.api.sample import Part

CallsEnd = Literal["tool_calls", "stop"]


@dataclass(slots=True)
class ChatReader:
    """Of either reader, None: nothing of the kind is looked for."""

    thoughts: ThoughtSplitter | None
    tools: ToolReader | None
    max_calls: int | None = None
    """Further ones are dropped; None: all are shown."""
    calls_end: CallsEnd = "tool_calls"
    """How a choice with calls ends: OpenAI says "stop" where the client has named the tool."""

    def read(self, part: Part) -> Part:
        """What of `part` may be shown; with its end, all that was held back."""
        thoughts, text = "", part.text
        if self.thoughts is not None:
            thoughts, text = self.thoughts.push(text)
            if part.finish_reason is not None:
                more_thoughts, more = self.thoughts.flush()
                thoughts, text = thoughts + more_thoughts, text + more
        reading = Reading(text)
        finish_reason = part.finish_reason
        if self.tools is not None:
            reading = self.tools.push(text)
            if finish_reason is not None:
                rest = self.tools.flush()
                reading.text += rest.text
                reading.calls += rest.calls
            if finish_reason == FinishReason.STOP and self.tools.num_calls:
                finish_reason = self.calls_end
        calls = reading.calls
        if self.max_calls is not None:
            calls = [call for call in calls if call.index < self.max_calls]
        return replace(
            part,
            text=reading.text,
            thoughts=thoughts,
            calls=calls,
            finish_reason=finish_reason,
        )
