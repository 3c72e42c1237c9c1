from __future__ import annotations

import gc
from weakref import WeakKeyDictionary

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from tests.fakes import spm_tokenizer, tiny_core, tiny_tokenizer
from xllm.text_cuts import MIN_PART_CHARS, PART_CHARS
from xllm.token_cache import TokenCache
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
    cache.encode("y" * MIN_PART_CHARS + rest, "x")
    cache.encode("y" * (MIN_PART_CHARS + 1) + rest, "")
    known = len(TINY.encode(rest, add_special_tokens=False))
    assert cache.encode("xy" + "y" * (MIN_PART_CHARS - 1) + rest, "")[1] == known


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


def test_a_text_that_begins_as_another_did_is_known_that_far() -> None:
    cache = TokenCache(TINY)
    document = "".join(f"Sentence {i} of a document that many ask about. " for i in range(100))
    assert cache.encode(document + "First question?", "")[1] == 0
    second = document + "Another one, which is longer?"
    ids, num_known = cache.encode(second, "")
    assert ids == TINY.encode(second)
    kept = document[: len(document) - PART_CHARS - MIN_PART_CHARS]
    assert num_known >= len(TINY.encode(kept))


def test_what_stands_around_a_text_is_added_once() -> None:
    core = tokenizers.Tokenizer.from_str(tiny_core())
    start, end = core.token_to_id("<|start|>"), core.token_to_id("<|end|>")
    core.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", start), ("<|end|>", end)]
    )
    tokenizer = Tokenizer(core)
    cache = TokenCache(tokenizer)
    for _ in range(2):
        ids, num_known = cache.encode(LONG * 10, "", add_special_tokens=True)
        assert ids == tokenizer.encode(LONG * 10)
        assert (ids[0], ids[-1]) == (start, end)
        assert cache.encode(LONG * 10, "")[0] == ids[1:-1]
    assert num_known == len(ids) - 2


def test_a_short_text_is_tokenized_as_it_is() -> None:
    cache = TokenCache(TINY)
    assert cache.encode(LONG, "") == (TINY.encode(LONG, add_special_tokens=False), 0)
    assert cache.num_bytes == 0
