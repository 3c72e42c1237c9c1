"""What a model thinks, told from what it answers."""

from __future__ import annotations

import pytest

from xllm.protocol import FinishReason
from xllm.roles.api.reading.calls import Tool
from xllm.roles.api.reading.chat_reader import ChatReader
from xllm.roles.api.reading.hermes import HermesReader
from xllm.roles.api.reading.thoughts import ThoughtSplitter, is_opened_by
from xllm.roles.api.sample import Part


@pytest.mark.parametrize(
    ("is_thinking", "answer", "thoughts", "text"),
    [
        (False, "<think>\nhm </thin>\n</think>\n\nYes.\n", "hm </thin>", "Yes.\n"),
        (False, "Yes, <think> is a tag.", "", "Yes, <think> is a tag."),
        (False, "\n\n<think>a</think>b", "a", "b"),
        (False, "<think>never closed \n", "never closed", ""),
        (False, "<thi", "", "<thi"),
        (False, "", "", ""),
        (True, "\nhm\n\nso\n</think>\n\nYes.", "hm\n\nso", "Yes."),
        (True, "<think>\nhm</think>Yes. </think>", "hm", "Yes. </think>"),
        (True, "cut sho", "cut sho", ""),
    ],
)
def test_thoughts_come_apart_in_pieces_of_any_size(
    is_thinking: bool, answer: str, thoughts: str, text: str
) -> None:
    for size in (1, 2, 5, len(answer) or 1):
        splitter = ThoughtSplitter(is_thinking=is_thinking)
        pieces = [splitter.push(answer[i : i + size]) for i in range(0, len(answer), size)]
        pieces.append(splitter.flush())
        assert tuple("".join(column) for column in zip(*pieces, strict=True)) == (thoughts, text)


def test_who_has_opened_the_thoughts() -> None:
    assert is_opened_by("...assistant\n<think>\n", always_thinks=False)
    assert not is_opened_by("...assistant\n", always_thinks=False)
    assert is_opened_by("...assistant\n", always_thinks=True)
    assert not is_opened_by("...assistant\n<think>\n\n</think>\n\n", always_thinks=True)


@pytest.mark.parametrize(
    ("reason", "calls_end", "expected"),
    [
        (FinishReason.STOP, "tool_calls", "tool_calls"),
        (FinishReason.STOP, "stop", "stop"),
        (FinishReason.LENGTH, "tool_calls", "length"),
    ],
)
def test_a_chat_is_read_for_thoughts_and_then_for_calls(
    reason: FinishReason, calls_end: str, expected: str
) -> None:
    reader = ChatReader(
        ThoughtSplitter(is_thinking=True),
        HermesReader([Tool("f", {})]),
        calls_end=calls_end,  # type: ignore[arg-type]
    )
    first = reader.read(Part("<tool_call> is a tag</think>\nSo:\n<tool_call>{"))
    assert (first.thoughts, first.text, first.calls) == ("<tool_call> is a tag", "So:", [])
    last = reader.read(Part('"name": "f"}</tool_call>', finish_reason=reason))
    assert [(call.name, call.arguments) for call in last.calls] == [("f", ""), (None, "{}")]
    assert last.finish_reason == expected
