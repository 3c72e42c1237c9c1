"""From what a request says of its answer's form to the grammar that a worker holds it to.

Whatever is wrong with a schema, a regex or a grammar is found here, before a worker hears of it.
JSON is written with little white space, since a model that may write any amount of it sometimes
does: between two tokens at most a line break with its indentation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, grammar_from

from xllm.errors import InvalidRequest

MAX_GRAMMAR_CHARS = 1 << 20
MAX_CHOICES = 4096
_MAX_SHOWN_ERROR = 500

JSON_STYLE: dict[str, Any] = {"whitespace_pattern": r"\n? {0,16}"}
_THOUGHTS = r"""thoughts: end /\n{0,4}/
end[lazy]: /(.|\n)*/ "</think>"
"""
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def json_grammar(schema: Mapping[str, Any] | str, *, param: str) -> str:
    """JSON that a schema describes. Raises: InvalidRequest."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=JSON_STYLE)  # type: ignore[arg-type]
    except ValueError as error:
        raise InvalidRequest(f"{param} is no JSON schema: {error}", param=param) from error
    return checked(grammar, param=param)


def regex_grammar(regex: str, *, param: str) -> str:
    """A text that the whole of a regular expression matches. Raises: InvalidRequest."""
    return checked(LLMatcher.grammar_from_regex(regex), param=param)


def choice_grammar(choices: Sequence[str], *, param: str) -> str:
    """One of some texts. Raises: InvalidRequest."""
    if not choices or len(choices) > MAX_CHOICES:
        raise InvalidRequest(f"{param} must have 1 to {MAX_CHOICES} texts", param=param)
    lark = "start: " + " | ".join(map(literal, choices))
    return checked(LLMatcher.grammar_from_lark(lark), param=param)


def text_grammar(grammar: str, *, param: str) -> str:
    """A grammar in Lark's or in GBNF's notation. Raises: InvalidRequest."""
    try:
        lark = grammar_from("grammar", grammar)
    except ValueError as error:
        raise InvalidRequest(
            f"{param} is no grammar: {_shorten(str(error))}", param=param
        ) from error
    return checked(lark, param=param)


def lark_grammar(lark: str, *, param: str) -> str:
    """Our own. Raises: InvalidRequest for a schema in it."""
    return checked(LLMatcher.grammar_from_lark(lark), param=param)


def literal(text: str) -> str:
    """`text` as a string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def inline_json(schema: Mapping[str, Any]) -> str:
    """A rule's part in a Lark grammar: JSON that a schema describes."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})


def after_thoughts(grammar: str, *, is_thinking: bool) -> str:
    """`grammar` for what follows `</think>`. `is_thinking`: the prompt has opened the thoughts;
    else the answer may do without any."""
    thoughts = "thoughts" if is_thinking else '("<think>" thoughts)?'
    lark = f"start: {thoughts} @answer\n" + _THOUGHTS
    return _combined(lark, answer=grammar)


def either(answer: str, calls: str) -> str:
    """One grammar or the other."""
    return _combined("start: @answer | @calls\n", answer=answer, calls=calls)


def _combined(lark: str, **parts: str) -> str:
    """A grammar whose `lark` refers to others by name. These have one entry each: what a client
    writes itself may have several, of which only the first is known by its new name."""
    grammars: list[dict[str, Any]] = [{"name": "start", "lark_grammar": lark}]
    for name, part in parts.items():
        entries = _entries(part)
        grammars += [{**entries[0], "name": name}, *entries[1:]]
    return json.dumps({"grammars": grammars})


def _entries(grammar: str) -> list[dict[str, Any]]:
    if grammar.lstrip().startswith("{"):
        entries: list[dict[str, Any]] = json.loads(grammar)["grammars"]
        return entries
    return [{"lark_grammar": grammar}]


def checked(grammar: str, *, param: str) -> str:
    """Raises: InvalidRequest if it is no grammar, or one that takes too much to follow."""
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"{param} makes a grammar of over {MAX_GRAMMAR_CHARS} characters", param=param
        )
    if error := _error_of(grammar):
        raise InvalidRequest(f"{param} is refused: {_shorten(error)}", param=param)
    return grammar


@lru_cache(maxsize=256)
def _error_of(grammar: str) -> str:
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return messages[0] if is_error else ""


def _shorten(error: str) -> str:
    return error if len(error) <= _MAX_SHOWN_ERROR else error[: _MAX_SHOWN_ERROR - 1] + "…"
