"""How the answer to one chat is read, and what it is held to while it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xllm.config import ApiConfig
from xllm.roles.api import grammars
from xllm.roles.api.prompts import Prompt
from xllm.roles.api.reading import thoughts
from xllm.roles.api.reading.calls import MAX_CALLS, Tool, ToolReader
from xllm.roles.api.reading.chat_reader import ChatReader
from xllm.roles.api.reading.notations import notation_of
from xllm.roles.api.reading.thoughts import ThoughtSplitter
from xllm.roles.api.requests import ChatCompletionRequest
from xllm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingPlan:
    grammar: str = ""
    new_reader: Callable[[], ChatReader] | None = None
    """None: the answer is its text."""
    kept_tokens: tuple[str, ...] = ()
    """Special tokens that the readers have to see."""


def plan_reading(
    body: ChatCompletionRequest, prompt: Prompt, tokenizer: Tokenizer, config: ApiConfig
) -> ReadingPlan:
    """May take a while: schemas are compiled. Raises: InvalidRequest."""
    tools, forced = body.offered_tools, body.forced_tools()
    notation = notation_of(tokenizer, config.tool_call_parser) if tools else None
    grammar = _grammar(body, notation, tools, forced)
    thinks = config.reasoning_parser != "none"
    is_thinking = False
    if thinks:
        text = prompt.text or ""
        always = config.reasoning_parser.startswith("deepseek")
        is_thinking = thoughts.is_opened_by(text, always_thinks=always)
        if grammar and not text.rstrip().endswith(thoughts.CLOSE):
            grammar = grammars.after_thoughts(grammar, is_thinking=is_thinking)
    if notation is None and not thinks:
        return ReadingPlan(grammar=grammar)

    def new_reader() -> ChatReader:
        return ChatReader(
            ThoughtSplitter(is_thinking=is_thinking) if thinks else None,
            notation(tools) if notation is not None else None,
            max_calls=1 if body.parallel_tool_calls is False else None,
            calls_end="stop" if body.names_a_tool else "tool_calls",
        )

    markers = notation.markers if notation is not None else ()
    return ReadingPlan(
        grammar=grammar,
        new_reader=new_reader,
        kept_tokens=(*markers, *(thoughts.MARKERS if thinks else ())),
    )


def _grammar(
    body: ChatCompletionRequest,
    notation: type[ToolReader] | None,
    tools: list[Tool],
    forced: list[Tool],
) -> str:
    """Of the answer without thoughts; empty: it is free. Raises: InvalidRequest."""
    max_calls = 1 if body.parallel_tool_calls is False or body.names_a_tool else MAX_CALLS
    if notation is not None and forced:
        return grammars.lark_grammar(notation.lark(forced, max_calls), param="tools")
    answer = body.answer_grammar() or ""
    if notation is not None and answer:
        calls = grammars.lark_grammar(notation.lark(tools, max_calls), param="tools")
        return grammars.either(answer, calls)
    return answer
