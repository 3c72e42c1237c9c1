"""Looking words up gives what the tokenizer gives, for each way in which texts are cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from xllm import word_encoder
from xllm.tokenizer import Tokenizer
from xllm.word_encoder import WordEncoder, make_word_encoder

_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BEGINNING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"


def _split(expression: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


WAYS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": _split(_BEGINNING + _END),
    "llama3": _split(_BEGINNING + "{1,3}" + _END),
}
CORPUS = [
    "the quick brown fox's 12 345 jumps,  over!! the\n\nlazy dog\r\n  and don't we'll  ",
    "naïve café Привет мир 日本語 ²½ Ⅷ x = {'a': [1, 2]};\t\treturn   x  1",
] * 3


def make_core(way: str) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = WAYS[way]
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<bos>", "<|end|>", "<|end|>|"],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    if way == "qwen2":
        core.normalizer = normalizers.NFC()
    if way == "llama3":
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    return core


CORES = {way: make_core(way) for way in WAYS}
TOKENIZERS = {way: Tokenizer(core) for way, core in CORES.items()}

_CONTRACTIONS = ["'s", "'S", "'ll", "'\u017f"]
_ADDED = ["<|end|>", "<|end|>|", "<bos>"]
PIECES = st.sampled_from([*_CONTRACTIONS, *_ADDED, "the", " ", "  ", "\n", "\r\n", "1", "23"])
# Letters, marks, numbers of all kinds, whitespace to `re` alone and to Unicode alone, emoji.
_MARKED = "aZé\u0301\u017fßЖ日ｱ\u0661²½Ⅷ\u3007_'!-{🦊\u200d\U0001f1e6"
CHARS = st.text(_MARKED + " \t\n\r\x0b\x1c\x1f\x85\xa0\u2028\u3000", max_size=8)
TEXTS = st.lists(PIECES | CHARS | st.text(max_size=4), max_size=8).map("".join)


@pytest.mark.parametrize("way", WAYS)
@given(text=TEXTS, special=st.booleans())
def test_the_same_tokens_as_the_tokenizer(way: str, text: str, special: bool) -> None:
    expected = CORES[way].encode(text, add_special_tokens=special).ids
    assert TOKENIZERS[way].encode(text, special) == expected


@pytest.mark.parametrize("way", WAYS)
def test_known_words_are_looked_up(way: str) -> None:
    asked: list[list[str]] = []

    def encode(texts: list[str], special: bool) -> list[list[int]]:
        asked.append(texts)
        return [e.ids for e in CORES[way].encode_batch(texts, add_special_tokens=special)]

    encoder = make_word_encoder(json.loads(CORES[way].to_str()), encode)
    assert encoder is not None
    text = "".join(CORPUS) + "<|end|>" + CORPUS[0]
    expected = CORES[way].encode(text).ids
    assert encoder.encode(text, True) == expected
    asked.clear()
    assert encoder.encode(text, True) == expected
    assert not asked


def test_long_texts_are_cut_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_encoder, "CHUNK_CHARS", 5)
    for way, tokenizer in TOKENIZERS.items():
        for text in (*CORPUS, " " * 40, "a" * 40, "a b" * 9, "\n b  c \x1c d" * 9):
            assert tokenizer.encode(text) == CORES[way].encode(text).ids


def test_what_is_too_much_to_learn_is_left_to_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(word_encoder, "MAX_LEARNED", 3)
    monkeypatch.setattr(word_encoder, "MAX_WORDS", 8)
    monkeypatch.setattr(word_encoder, "MAX_WORD_CHARS", 20)
    encoder = _encoder("gpt2")
    assert encoder.encode("a b c d", False) is None
    assert encoder.encode("a b c d", False) is not None, "three were learned, the rest now"
    assert encoder.encode("x" * 21, False) is None
    assert encoder.encode("e f g", False) is not None
    assert encoder.encode("h i", False) is None, "the table is full, and begins anew"
    assert encoder.encode("h i", False) == CORES["gpt2"].encode("h i").ids


def test_a_character_that_is_newer_than_our_tables_is_left_to_the_tokenizer() -> None:
    assert _encoder("gpt2").encode("a\U000e0fff", False) is None


def test_what_is_not_composed_is_left_to_the_tokenizer() -> None:
    assert _encoder("qwen2").encode("e\u0301", False) is None
    assert _encoder("qwen2").encode("é", False) is not None


def test_other_tokenizers_have_none() -> None:
    def refused(change: dict[str, Any]) -> bool:
        config = json.loads(CORES["gpt2"].to_str()) | change
        return make_word_encoder(config, lambda texts, special: [[7]] * len(texts)) is None

    assert not refused({})
    assert refused({"pre_tokenizer": None})
    assert refused({"pre_tokenizer": {"type": "Whitespace"}})
    assert refused({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}})
    assert refused({"normalizer": {"type": "Lowercase"}})
    core = make_core("gpt2")
    core.add_tokens([AddedToken("word", single_word=True)])
    assert refused(json.loads(core.to_str()))


def _encoder(way: str) -> WordEncoder:
    core = CORES[way]
    encoder = make_word_encoder(
        json.loads(core.to_str()),
        lambda texts, special: [
            e.ids for e in core.encode_batch(texts, add_special_tokens=special)
        ],
    )
    assert encoder is not None
    return encoder
