"""Calls of tools in recorded answers, whole and in pieces of every size."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.roles.api.reading.call_object import CallObject
from xllm.roles.api.reading.calls import Reading, Tool, ToolReader, join_calls
from xllm.roles.api.reading.hermes import HermesReader
from xllm.roles.api.reading.llama import LlamaReader
from xllm.roles.api.reading.pythonic import PythonicReader

TOOLS = [
    Tool("get_weather", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool("now", {"type": "object", "properties": {}}),
]
PARIS = {"city": "Paris"}
Calls = list[tuple[str, object]]

# As the models write them: Qwen 2.5 and 3, Hermes 3, Llama 3.1 and 3.2, Llama 4.
ANSWERS: list[tuple[type[ToolReader], str, str, Calls]] = [
    (
        HermesReader,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [("get_weather", PARIS)],
    ),
    (
        HermesReader,
        "I will look.\n\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "now", "arguments": {}}\n</tool_call>',
        "I will look.",
        [("get_weather", PARIS), ("now", {})],
    ),
    # Arguments first; no closing tag before the next call, nor at the end.
    (
        HermesReader,
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}\n'
        '<tool_call>{"name":"now"}',
        "",
        [("get_weather", PARIS), ("now", {})],
    ),
    # Arguments quoted once more, null, and with brackets and quotes in strings.
    (
        HermesReader,
        r'<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}</tool_call>'
        '<tool_call>{"name": "now", "arguments": null}</tool_call>'
        r'<tool_call>{"name": "f", "arguments": {"a": ["}", "\"]", '
        '{"b": "</tool_call>"}]}, "id": 1}</tool_call>',
        "",
        [
            ("get_weather", PARIS),
            ("now", {}),
            ("f", {"a": ["}", '"]', {"b": "</tool_call>"}]}),
        ],
    ),
    (HermesReader, "2 < 3, a <tool, no call.\n", "2 < 3, a <tool, no call.\n", []),
    (HermesReader, "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    (HermesReader, '<tool_call>{"name": 3}', '<tool_call>{"name": 3}', []),
    (HermesReader, "an end <tool_c", "an end <tool_c", []),
    (HermesReader, '<tool_call>\n{"na', '<tool_call>\n{"na', []),
    (
        LlamaReader,
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        "",
        [("get_weather", PARIS)],
    ),
    (
        LlamaReader,
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": '
        '"Paris"}}; {"name": "now", "parameters": {}}',
        "",
        [("get_weather", PARIS), ("now", {})],
    ),
    (LlamaReader, '{"answer": 42}', '{"answer": 42}', []),
    (LlamaReader, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    (LlamaReader, "It is {warm}.", "It is {warm}.", []),
    (LlamaReader, '{"name": "get_w', '{"name": "get_w', []),
    (LlamaReader, "<|python_tag|>", "<|python_tag|>", []),
    (
        PythonicReader,
        "[get_weather(city='Paris'), now()]",
        "",
        [("get_weather", PARIS), ("now", {})],
    ),
    (
        PythonicReader,
        "<|python_start|>[get_weather(city=\"a)]'\", x=[1, {'b': None}], ok=true)]<|python_end|>",
        "",
        [("get_weather", {"city": "a)]'", "x": [1, {"b": None}], "ok": True})],
    ),
    (PythonicReader, "[1] says so", "[1] says so", []),
    (PythonicReader, "[]", "[]", []),
    (PythonicReader, "[exec(a=1)]", "[exec(a=1)]", []),
    (PythonicReader, "[now(1)]", "[now(1)]", []),
    (PythonicReader, "[now(a={1})]", "[now(a={1})]", []),
    (PythonicReader, "Hello [now()]", "Hello [now()]", []),
    (
        PythonicReader,
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        "",
        [("get_weather", PARIS)],
    ),
]


def read(reader: ToolReader, pieces: Iterator[str] | list[str]) -> tuple[str, Calls]:
    readings = [reader.push(piece) for piece in pieces]
    readings.append(reader.flush())
    calls = join_calls([delta for reading in readings for delta in reading.calls])
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls) == reader.num_calls
    return "".join(reading.text for reading in readings), [
        (call.name or "", json.loads(call.arguments)) for call in calls
    ]


@pytest.mark.parametrize(("reader", "answer", "text", "calls"), ANSWERS)
def test_an_answer_is_read_the_same_in_pieces_of_any_size(
    reader: type[ToolReader], answer: str, text: str, calls: Calls
) -> None:
    for size in (1, 2, 3, 7, 16, len(answer)):
        pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
        assert read(reader(TOOLS), pieces) == (text, calls), size


@pytest.mark.parametrize("reader", [HermesReader, LlamaReader, PythonicReader])
@given(data=st.data())
def test_no_text_breaks_a_reader_or_is_read_differently_in_pieces(
    reader: type[ToolReader], data: st.DataObject
) -> None:
    words = [
        "<tool_call>",
        "</tool_call>",
        '{"name": "now"',
        ', "arguments": ',
        "{}",
        "}",
        "[",
        "]",
    ]
    words += ["now(", ")", '"', "\\", "x", " ", "\n", "; ", "<|python_tag|>", "ä", "<", ",", ":"]
    answer = data.draw(st.lists(st.sampled_from(words), max_size=12))

    def shown(pieces: list[str]) -> tuple[str, list[tuple[str | None, str]]]:
        one = reader(TOOLS)
        readings: list[Reading] = [one.push(piece) for piece in pieces] + [one.flush()]
        calls = join_calls([delta for reading in readings for delta in reading.calls])
        text = "".join(reading.text for reading in readings)
        return text, [(call.name, call.arguments) for call in calls]

    assert shown(list("".join(answer))) == shown(["".join(answer)])


def test_a_call_begins_with_its_arguments_which_come_in_pieces() -> None:
    reader = HermesReader(TOOLS)
    assert reader.push('<tool_call>{"name": "get_weather", "argum') == Reading()
    pieces = [reader.push(piece) for piece in ('ents": {"ci', 'ty": "P', 'aris"}', "}</tool_call>")]
    assert [call.name for call in pieces[0].calls] == ["get_weather", None]
    assert [call.arguments for piece in pieces for call in piece.calls] == [
        "",
        '{"ci',
        'ty": "P',
        'aris"}',
    ]


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=8,
        ),
        max_size=4,
    ),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_arguments_are_what_was_written(
    arguments: dict[str, object], name_first: bool, indent: int | None
) -> None:
    fields = {"name": "f", "arguments": arguments, "x": [1, "}"]}
    if not name_first:
        fields = dict(reversed(fields.items()))
    text = json.dumps(fields, indent=indent)
    call = CallObject()
    assert call.push(text + "rest") == len(text)
    assert call.is_done
    assert call.name == "f"
    assert json.loads(call.take_arguments()) == arguments
    assert call.take_arguments() == ""
