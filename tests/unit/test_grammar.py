"""What a grammar allows next, and that it is a function of the output alone."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests.fakes import tiny_core, tiny_tokenizer
from xllm.engine.grammar import GrammarCompiler, GrammarState, MaskWorker
from xllm.errors import InvalidRequest
from xllm.roles.api import grammars

EOS = 1
VOCAB = 320
"""Padded: the tokenizer has 300."""
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tiny_core, VOCAB, [EOS])
    yield compiler
    compiler.close()


def state_of(
    compiler: GrammarCompiler, grammar: str, output: str = "", *, is_complete: bool = False
) -> GrammarState:
    output_ids = TOKENIZER.encode(output, add_special_tokens=False) if output else []
    state = compiler.submit(grammar).result(10).new_state([*output_ids, *[EOS] * is_complete])
    state.advance()
    return state


def allowed(state: GrammarState) -> set[str]:
    return {TOKENIZER.token_name(int(i)) for i in np.flatnonzero(state.bias == 0)}


def test_what_may_come_follows_from_what_came(compiler: GrammarCompiler) -> None:
    grammar = grammars.regex_grammar("ab?[0-1]", param="x")
    state = state_of(compiler, grammar)
    assert allowed(state) == {"a"}
    assert state.bias.shape == (VOCAB,)
    state.append(TOKENIZER.encode("a")[0])
    state.advance()
    assert allowed(state) == {"b", "0", "1"}
    # Another worker that is sent the output is at the same place.
    assert allowed(state_of(compiler, grammar, "a")) == {"b", "0", "1"}
    assert allowed(state_of(compiler, grammar, "a1")) == {"<|end|>"}
    assert not state.error


def test_states_of_one_grammar_are_apart(compiler: GrammarCompiler) -> None:
    compiled = compiler.submit(grammars.choice_grammar(["ab", "cd"], param="x")).result(10)
    first, second = compiled.new_state(), compiled.new_state()
    first.append(TOKENIZER.encode("a")[0])
    for state in (first, second):
        state.advance()
    assert allowed(first) == {"b"}
    assert {"a", "c"} <= allowed(second)


def test_what_is_suppressed_is_allowed_where_nothing_else_is(compiler: GrammarCompiler) -> None:
    grammar = grammars.regex_grammar("a{1,2}", param="x")
    state = compiler.submit(grammar).result(10).new_state(TOKENIZER.encode("a"))
    state.advance(suppressed=[EOS])
    assert allowed(state) == {"a"}
    state.append(TOKENIZER.encode("a")[0])
    state.advance(suppressed=[EOS])
    assert allowed(state) == {"<|end|>"}


def test_an_output_that_does_not_match_is_an_error_that_stays(compiler: GrammarCompiler) -> None:
    state = state_of(compiler, grammars.regex_grammar("a", param="x"), "b")
    assert state.error
    assert np.isneginf(state.bias).all()
    state.advance()
    assert np.isneginf(state.bias).all()


def test_a_bad_grammar_is_refused_by_the_worker_too(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest, match="refused"):
        compiler.submit("start: nothing").result(10)


@pytest.mark.parametrize("is_thinking", [True, False])
def test_thoughts_come_before_the_answer(compiler: GrammarCompiler, is_thinking: bool) -> None:
    inner = grammars.choice_grammar(["yes"], param="x")
    grammar = grammars.checked(grammars.after_thoughts(inner, is_thinking=is_thinking), param="x")
    assert ("q" in allowed(state_of(compiler, grammar))) == is_thinking
    opening = "" if is_thinking else "<think>"
    assert "q" in allowed(state_of(compiler, grammar, f"{opening}yes or no?"))
    assert allowed(state_of(compiler, grammar, f"{opening}</think>\n\nyes")) == {"<|end|>"}
    if not is_thinking:
        assert allowed(state_of(compiler, grammar, "yes")) == {"<|end|>"}


def test_an_answer_or_calls(compiler: GrammarCompiler) -> None:
    answer = grammars.json_grammar({"const": 1}, param="x")
    calls = grammars.lark_grammar('start: "call" "!"', param="x")
    grammar = grammars.checked(grammars.either(answer, calls), param="x")
    for output in ("1", "call!"):
        assert EOS in np.flatnonzero(state_of(compiler, grammar, output).bias == 0)


def test_white_space_in_json_is_bounded(compiler: GrammarCompiler) -> None:
    grammar = grammars.json_grammar({"type": "array", "maxItems": 0}, param="x")
    assert not state_of(compiler, grammar, "[\n    ]").error
    assert state_of(compiler, grammar, "[" + " " * 17).error
    assert state_of(compiler, grammar, "[\n\n").error


@pytest.mark.parametrize(
    "refused",
    [
        lambda: grammars.json_grammar({"type": "nothing"}, param="p"),
        lambda: grammars.json_grammar("{", param="p"),
        lambda: grammars.json_grammar("[]", param="p"),
        lambda: grammars.json_grammar({"type": "string", "pattern": "a("}, param="p"),
        lambda: grammars.json_grammar({"$ref": "#/nowhere"}, param="p"),
        lambda: grammars.json_grammar({"not": {}}, param="p"),
        lambda: grammars.regex_grammar("a(", param="p"),
        lambda: grammars.regex_grammar("(?=a)", param="p"),
        lambda: grammars.choice_grammar([], param="p"),
        lambda: grammars.text_grammar("root ::= [", param="p"),
        lambda: grammars.text_grammar("start: nothing", param="p"),
        lambda: grammars.text_grammar("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, param="p"),
        lambda: grammars.regex_grammar("(" * 5000 + ")" * 5000, param="p"),
        lambda: grammars.regex_grammar("a" * (grammars.MAX_GRAMMAR_CHARS + 1), param="p"),
    ],
)
def test_what_is_no_grammar_is_refused_by_name(refused: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        refused()  # type: ignore[operator]
    assert caught.value.param == "p"
    assert "p" in caught.value.message
    assert len(caught.value.message) < 1000


def test_choices_are_taken_as_they_are(compiler: GrammarCompiler) -> None:
    for choice in ('"', "ä\n", "\\d", "/*"):
        grammar = grammars.choice_grammar([choice, "other"], param="x")
        assert allowed(state_of(compiler, grammar, choice)) == {"<|end|>"}
    assert json.loads(grammars.literal("ä")) == "ä"


def test_a_state_that_breaks_leaves_the_others_alone(compiler: GrammarCompiler) -> None:
    compiled = compiler.submit(grammars.choice_grammar(["ab"], param="x")).result(10)
    broken, good = compiled.new_state(["nonsense"]), compiled.new_state()  # type: ignore[list-item]
    worker = MaskWorker()
    try:
        worker.begin([(broken, ()), (good, ())]).result(10)
    finally:
        worker.close()
    assert broken.error
    assert np.isneginf(broken.bias).all()
    assert {"a"} <= allowed(good)
