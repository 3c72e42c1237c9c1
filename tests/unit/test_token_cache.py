from __future__ import annotations

import gc
from weakref import WeakKeyDictionary

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from tests.fakes import spm_tokenizer, tiny_tokenizer
from xllm.token_cache import MIN_SECTION_CHARS, TokenCache, _cut_pattern
from xllm.tokenizer import Tokenizer

TINY = tiny_tokenizer()


def with_first_space() -> Tokenizer:
    """As Llama 2's: a space before the first word of a text, and only there."""
    words = {"▁": 0, "▁a": 1, "a": 2, "b": 3, "▁b": 4, "<unk>": 5}
    core = tokenizers.Tokenizer(models.BPE(words, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.add_special_tokens([AddedToken("<|im_start|>", normalized=False, special=True)])
    return Tokenizer(core)


def with_prefix_and_case() -> Tokenizer:
    words = {char: i for i, char in enumerate("▁abcdefghijklmnopqrstuvwxyz<unk>|_")}
    core = tokenizers.Tokenizer(models.BPE(words, [], unk_token="<"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend("▁")])
    core.add_special_tokens([AddedToken("<|im_start|>", normalized=False, special=True)])
    core.add_tokens([AddedToken("hello", normalized=True, single_word=True, lstrip=True)])
    core.add_tokens([AddedToken("<s>", normalized=False, rstrip=True)])
    return Tokenizer(core)


TOKENIZERS = {
    "byte_level": TINY,
    "sentencepiece": spm_tokenizer(),
    "first_space": with_first_space(),
    "prefix_and_case": with_prefix_and_case(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    pieces=st.lists(
        st.one_of(
            st.sampled_from(
                ["<|im_start|>", "<|start|>", "<|end|>", "hello", " hello ", "<s>", "<", "|>"]
            ),
            st.sampled_from(["a" * 300, " b a" * 70, "A hello" * 40, "\n" * 257, "</s>"]),
            st.text(max_size=10),
        ),
        max_size=20,
    )
)
def test_what_is_put_together_is_what_the_tokenizer_says(name: str, pieces: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    cache = TokenCache(tokenizer)
    text = "".join(pieces)
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert cache.encode(text, "")[0] == expected
    ids, num_known = cache.encode(text, "")
    assert ids == expected
    assert num_known in (0, len(expected))


def turn(role: str, text: str) -> str:
    return f"<|start|>{role}\n{text}<|end|>\n"


LONG = "All that was said before. " * 20


def test_the_next_turn_of_a_conversation_tokenizes_only_what_is_new() -> None:
    cache = TokenCache(TINY)
    first = turn("system", LONG) + turn("user", LONG + "?") + "<|start|>assistant\n"
    ids, num_known = cache.encode(first, "")
    assert num_known == 0
    second = first + "Yes.<|end|>\n" + turn("user", "And now?") + "<|start|>assistant\n"
    ids, num_known = cache.encode(second, "")
    assert ids == TINY.encode(second, add_special_tokens=False)
    assert num_known > len(ids) * 0.8


def test_a_message_is_known_in_another_conversation() -> None:
    cache = TokenCache(TINY)
    cache.encode(turn("system", LONG) + turn("user", "A " + LONG), "")
    _, num_known = cache.encode(turn("system", LONG) + turn("user", "B " + LONG), "")
    assert num_known >= len(TINY.encode(LONG, add_special_tokens=False))


def test_tenants_share_nothing() -> None:
    cache = TokenCache(TINY)
    text = turn("system", LONG) + turn("user", LONG)
    cache.encode(text, "one")
    assert cache.encode(text, "two")[1] == 0
    assert cache.encode(text, "one")[1] > 0


def test_a_salt_cannot_pass_for_a_part_of_the_text() -> None:
    cache = TokenCache(TINY)
    rest = "<|start|>" + LONG
    cache.encode("y" * MIN_SECTION_CHARS + rest, "x")
    cache.encode("y" * (MIN_SECTION_CHARS + 1) + rest, "")
    known = len(TINY.encode(rest, add_special_tokens=False))
    assert cache.encode("xy" + "y" * (MIN_SECTION_CHARS - 1) + rest, "")[1] == known


def test_memory_is_bounded_and_what_is_used_stays() -> None:
    cache = TokenCache(TINY, max_bytes=20_000)
    kept = turn("system", LONG) + turn("user", LONG)
    cache.encode(kept, "")
    for i in range(100):
        cache.encode(turn("system", f"{i} {LONG}") + turn("user", LONG), "")
        assert cache.num_bytes <= 20_000
        assert cache.encode(kept, "")[1] > 0


def test_a_tokenizer_goes_with_its_model() -> None:
    tokenizer = with_first_space()
    caches = WeakKeyDictionary({tokenizer: TokenCache(tokenizer)})
    assert len(caches) == 1
    del tokenizer
    gc.collect()
    assert not caches


def test_what_does_not_fit_at_all_is_not_kept() -> None:
    cache = TokenCache(TINY, max_bytes=100)
    text = turn("system", LONG) + turn("user", LONG)
    for _ in range(2):
        assert cache.encode(text, "") == (TINY.encode(text, add_special_tokens=False), 0)
    assert cache.num_bytes == 0


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
    pattern = _cut_pattern(others)
    assert pattern is None or not pattern.fullmatch(others[0].content)


def test_a_text_without_special_tokens_is_tokenized_as_it_is() -> None:
    cache = TokenCache(TINY)
    assert cache.encode(LONG, "") == (TINY.encode(LONG, add_special_tokens=False), 0)
    assert cache.num_bytes == 0
