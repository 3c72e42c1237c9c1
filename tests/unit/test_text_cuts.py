from __future__ import annotations

from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from tests.fakes import spm_tokenizer
from xllm import text_cuts
from xllm.text_cuts import MIN_PART_CHARS, PART_CHARS, TextCuts, special_pattern
from xllm.tokenizer import Tokenizer

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
TEXTS = [
    "It's the 1st of 12345 things, that we'd said   twice;\n\n  and then: 3.14 or x=y+1!",
    "the end of the line is the end of the end. it is 100 000 and a b c d e f g",
    "été là-bas où l'on a déjà vu ça, 日本語 と 漢字 がある, привет мир, нет да",
]


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


PRE_TOKENIZERS = {
    "byte_level": GPT2,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "deepseek3 with numbers and cjk": pre_tokenizers.Sequence(
        [
            *(split(pattern) for pattern in sorted(text_cuts._HARMLESS_PATTERNS)),
            *(split(text_cuts._WORD_PATTERNS["deepseek3"]), BYTES),
        ]
    ),
    **{
        name: pre_tokenizers.Sequence([split(pattern), BYTES])
        for name, pattern in text_cuts._WORD_PATTERNS.items()
    },
}


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """With as many merges as its pre-tokenizer lets it find."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|start|>"],
        show_progress=False,
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    return core


@cache
def tokenizer_named(name: str) -> tuple[Tokenizer, TextCuts]:
    core = trained(PRE_TOKENIZERS[name])
    core.normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer = Tokenizer(core)
    return tokenizer, TextCuts(tokenizer)


WORDS = [
    "the",
    "it's",
    "'s",
    "I'LL",
    "12",
    "1234567",
    "x²",
    "½",
    "été",
    "e\u0301",
    "日本",
    "の",
    "ÀB",
]
GAPS = [" ", "  ", "\n", " \n", "\t", "\u00a0", "\u3000", "\x1c", ", ", " -", "' ", "<|start|>", ""]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@given(
    pieces=st.lists(
        st.one_of(st.sampled_from(WORDS), st.sampled_from(GAPS), st.text(max_size=5)), max_size=40
    ),
    text=st.sampled_from(TEXTS),
)
def test_parts_have_the_tokens_of_the_whole(name: str, pieces: list[str], text: str) -> None:
    tokenizer, cuts = tokenizer_named(name)
    assert cuts.is_between_words
    for whole in ("".join(pieces), text + "".join(pieces) + text):
        # Everywhere, not only every so many characters.
        places = [match.start() for match in text_cuts._BETWEEN_WORDS.finditer(whole)]
        starts = [0, *places]
        parts = [whole[a:b] for a, b in zip(starts, [*places, len(whole)], strict=True)]
        ids = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]
        assert ids == tokenizer.encode(whole, add_special_tokens=False)


def test_texts_that_begin_alike_have_the_same_parts() -> None:
    _, cuts = tokenizer_named("llama3")
    one = "some words " * 500
    parts = cuts.parts(one)
    assert "".join(parts) == one
    assert all(PART_CHARS <= len(part) < PART_CHARS + 20 for part in parts[:-1])
    other = cuts.parts(one[: len(one) // 2] + "and now for something else " * 100)
    assert parts[: len(parts) // 2 - 1] == other[: len(parts) // 2 - 1]
    assert cuts.parts("y" * 10_000) == ["y" * 10_000]
    assert cuts.parts("") == [""]
    short = "a " * ((PART_CHARS + MIN_PART_CHARS) // 2 - 1)
    assert cuts.parts(short) == [short]


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        BYTES,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), GPT2]),
        pre_tokenizers.Sequence([split(r"\s+\S+\s"), GPT2]),
        pre_tokenizers.Sequence([BYTES, split(text_cuts._WORD_PATTERNS["llama3"])]),
        pre_tokenizers.Split(Regex(text_cuts._WORD_PATTERNS["gpt2"]), "removed"),
        pre_tokenizers.Split(Regex(text_cuts._WORD_PATTERNS["gpt2"]), "isolated", invert=True),
        pre_tokenizers.Split(" ", "merged_with_previous"),
    ],
)
def test_words_that_are_made_otherwise_are_left_alone(
    pre_tokenizer: pre_tokenizers.PreTokenizer,
) -> None:
    core = trained(GPT2)
    core.pre_tokenizer = pre_tokenizer
    assert not TextCuts(Tokenizer(core)).is_between_words


def test_so_are_texts_whose_spaces_are_looked_at_before() -> None:
    assert not TextCuts(spm_tokenizer()).is_between_words
    for normalizer in (normalizers.Lowercase(), normalizers.Replace(" ", "")):
        core = trained(GPT2)
        core.normalizer = normalizer
        assert not TextCuts(Tokenizer(core)).is_between_words
    for token in (
        AddedToken("two words", normalized=False),
        AddedToken("after ", normalized=False),
        AddedToken("two\nlines", normalized=False),
        AddedToken("<mask>", lstrip=True),
        AddedToken("<mask>", rstrip=True),
        AddedToken("<mask>", single_word=True),
    ):
        core = trained(GPT2)
        core.add_tokens([token])
        assert not TextCuts(Tokenizer(core)).is_between_words
    core = trained(GPT2)
    core.add_tokens([AddedToken("   ", normalized=True)])
    assert TextCuts(Tokenizer(core)).is_between_words


@pytest.mark.parametrize(
    "others",
    [
        [AddedToken("<s>", lstrip=True, normalized=False)],
        [AddedToken("<s>", rstrip=True, normalized=False)],
        [AddedToken("<s>", single_word=True, normalized=False)],
        [AddedToken("<s>", normalized=True)],
        [AddedToken("<s>", normalized=False), AddedToken("a<s>", normalized=False)],
        [AddedToken("<s>", normalized=False), AddedToken("<s><s>", normalized=False)],
        [AddedToken("<s>", normalized=False), AddedToken("a<", normalized=False)],
        [AddedToken("<s><", normalized=False)],
        [AddedToken("sos", normalized=False)],
    ],
)
def test_a_token_that_another_may_hide_is_no_place_to_cut(others: list[AddedToken]) -> None:
    pattern = special_pattern(others)
    assert pattern is None or not pattern.fullmatch(others[0].content)
