"""The default model's tokenizer gives what transformers gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.golden.prompts import _code, _numbers, _prose, _unicode
from xllm.text_cuts import PART_CHARS, TextCuts
from xllm.tokenizer import IncrementalDecoder, Tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "tokenizer_golden.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(default_model_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(default_model_folder)


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: case["text"])
def test_texts(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    ids = tokenizer.encode(case["text"])
    assert ids == case["ids"]
    assert tokenizer.decode(ids) == case["decoded"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == case["decoded_with_special"]
    decoder = IncrementalDecoder(tokenizer, at_start=True)
    assert "".join(decoder.push([i]) for i in ids) + decoder.flush() == case["decoded"]


@pytest.mark.parametrize("case", GOLDEN["conversations"])
def test_conversations(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    prompt = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True)
    assert prompt == case["prompt"]
    assert tokenizer.encode(prompt, add_special_tokens=False) == case["ids"]


@pytest.mark.parametrize("pieces", [_prose, _code, _unicode, _numbers])
def test_a_text_has_the_tokens_of_its_parts(
    tokenizer: Tokenizer, pieces: Callable[[int], Iterator[str]]
) -> None:
    text = "".join(islice(pieces(1), 2000))
    cuts = TextCuts(tokenizer)
    assert cuts.is_between_words
    parts = cuts.parts(text)
    assert len(parts) > len(text) / PART_CHARS / 2
    ids = tokenizer.encode_all(parts, add_special_tokens=False)
    assert [i for part in ids for i in part] == tokenizer.encode(text)


def test_the_end_of_an_answer(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_name(i) for i in tokenizer.eos_token_ids] == ["<|im_end|>"]
