"""Encodes text by the words that it is made of, from a table of those met before. Pure.

Tokenizers cut a text into words first, by one regular expression, and each word's tokens depend on
the word alone. So a text whose words are known is looked up: a tenth of the time of encoding it.

    text   ──added tokens──>  pieces  ──regular expression──>  words  ──table──>  token ids

Only for tokenizers that work this way, with an expression that is known here: `make_word_encoder`.
The tokens are those of the tokenizer itself, which encodes each word once. Python's tables of
letters and numbers take the place of the tokenizer's: a text with a character that they lack, and
so may be new, is left to the tokenizer, as is one with many unknown words.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAX_WORDS = 1 << 16
MAX_WORD_CHARS = 256
MAX_LEARNED = 512
"""Unknown words of one text; with more of them the tokenizer is quicker."""
CHUNK_CHARS = 1 << 15
"""The regular expression keeps the interpreter to itself for so much text at a time, about 1 ms."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?<L>+| ?<N>+| ?<O>+|<S>+(?!<!S>)|<S>+"
_GPT2_DIGITS = r"<N>|'s|'t|'re|'ve|'m|'ll|'d| ?<L>+| ?<O>+|<S>+(?!<!SN>)|<S>+"
"""GPT-2's after each digit was made a word of its own, so what is before one is at an end."""
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + number_length
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|<!RLN>?<L>+|<N>" + number_length
    + r"| ?<O>+[\r\n]*|<S>*[\r\n]+|<S>+(?!<!S>)|<S>+"
    for number_length in ("", "{1,3}")
}  # fmt: skip
"""Of Qwen2 and Llama 3, as tokenizer.json has them, and as `_compile` understands them."""

_WHITESPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""White_Space of Unicode, which is not what `\\s` of `re` matches."""


class WordEncoder:
    """May be used on any thread."""

    def __init__(
        self,
        expression: str,
        encode_words: Callable[[list[str]], list[list[int]]],
        added_tokens: Mapping[str, int],
        around: tuple[Sequence[int], Sequence[int]],
        is_composed: bool,
    ) -> None:
        """`encode_words`: the tokenizer; `added_tokens`: what is cut out of a text first;
        `around`: what stands before and behind a text that wants special tokens; `is_composed`:
        the tokenizer brings texts into NFC."""
        self._find_ascii = _compile(expression, "A-Za-z", "0-9").findall
        self._find = _compile(expression, _members("L"), _members("N")).findall
        self._encode_words = encode_words
        self._words: dict[str, Sequence[int]] = {}
        self._added_tokens = dict(added_tokens)
        longest_first = sorted(added_tokens, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._before, self._behind = around
        self._is_composed = is_composed
        self._chars: set[str] = set()
        """Those of texts so far that may be cut."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """None: let the tokenizer do it."""
        find = self._find_ascii
        if not text.isascii():
            if not self._knows_all(text):
                return None
            if self._is_composed and not unicodedata.is_normalized("NFC", text):
                return None
            find = self._find
        ids: list[int] = list(self._before) if add_special_tokens else []
        pieces = self._added.split(text) if self._added_tokens else [text]
        for number, piece in enumerate(pieces):
            if number % 2:
                ids.append(self._added_tokens[piece])
                continue
            for start, end in _chunks(piece):
                found = self._look_up(find(piece, start, end))
                if found is None:
                    return None
                ids += found
        if add_special_tokens:
            ids += self._behind
        return ids

    def _knows_all(self, text: str) -> bool:
        new = set(text).difference(self._chars)
        if not all(map(_may_be_cut, new)):
            return False
        self._chars |= new
        return True

    def _look_up(self, words: list[str]) -> list[int] | None:
        for _ in range(2):
            try:
                return list(itertools.chain.from_iterable(map(self._words.__getitem__, words)))
            except KeyError:
                if not self._learn(words):
                    return None
        return None

    def _learn(self, words: list[str]) -> bool:
        """Whether all of them are known now."""
        unknown = list(set(words).difference(self._words))
        if not unknown:  # another thread was quicker
            return True
        if len(unknown) > MAX_LEARNED or max(map(len, unknown)) > MAX_WORD_CHARS:
            unknown = [word for word in unknown if len(word) <= MAX_WORD_CHARS][:MAX_LEARNED]
            is_complete = False
        else:
            is_complete = True
        if len(self._words) + len(unknown) > MAX_WORDS:
            # Another thread may be looking words up in the old table.
            self._words = {}
            is_complete = False
        for word, ids in zip(unknown, self._encode_words(unknown), strict=True):
            self._words[word] = tuple(ids)
        return is_complete


def make_word_encoder(
    config: Mapping[str, Any],
    encode: Callable[[list[str], bool], list[list[int]]],
) -> WordEncoder | None:
    """For the content of a tokenizer.json; None if it does not work by words that are known here.

    `encode`: texts to ids, with special tokens around them or not.
    """
    expression = _expression(config.get("pre_tokenizer"))
    normalizer = config.get("normalizer")
    added = config.get("added_tokens") or []
    if expression is None or normalizer not in (None, {"type": "NFC"}):
        return None
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return None
    if len({token["normalized"] for token in added}) > 1:  # looked for one kind after the other
        return None
    [plain], [whole] = encode(["a"], False), encode(["a"], True)
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if start is None:
        return None
    around = whole[:start], whole[start + len(plain) :]
    added_tokens = {token["content"]: token["id"] for token in added}
    return WordEncoder(
        expression,
        lambda words: encode(words, False),
        added_tokens,
        around,
        is_composed=normalizer is not None,
    )


def _expression(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    if pre_tokenizer is None:
        return None
    parts = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    *before, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last.get("use_regex", True):
        if not before:
            return _GPT2
        if len(before) == 1 and before[0] == {"type": "Digits", "individual_digits": True}:
            return _GPT2_DIGITS
        return None
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["invert"]:
        return None
    if before[0]["behavior"] != "Isolated":
        return None
    return _SPLITS.get(before[0]["pattern"].get("Regex", ""))


def _chunks(text: str) -> list[tuple[int, int]]:
    """Ranges of at most about `CHUNK_CHARS`, cut before a space that follows no whitespace: no
    word of any expression goes across."""
    bounds = [0]
    while len(text) - bounds[-1] > CHUNK_CHARS:
        cut = text.find(" ", bounds[-1] + CHUNK_CHARS)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.find(" ", cut + 1)
        if cut < 0:
            break
        bounds.append(cut)
    return list(itertools.pairwise([*bounds, len(text)]))


def _compile(expression: str, letters: str, numbers: str) -> re.Pattern[str]:
    """`letters` and `numbers`: as in a character class."""
    classes = {
        "L": f"[{letters}]",
        "N": f"[{numbers}]",
        "S": f"[{_WHITESPACE}]",
        "!S": f"[^{_WHITESPACE}]",
        "!SN": f"[^{_WHITESPACE}{numbers}]",
        "O": f"[^{_WHITESPACE}{letters}{numbers}]",
        "!RLN": f"[^\r\n{letters}{numbers}]",
    }
    for name, pattern in classes.items():
        expression = expression.replace(f"<{name}>", pattern)
    return re.compile(expression)


def _may_be_cut(char: str) -> bool:
    """Whether the expressions are right about it. Not about what this Python's Unicode does not
    know; and letters and numbers beyond the first plane would make each class a long search."""
    category = unicodedata.category(char)
    return category != "Cn" and (char < "\U00010000" or category[0] not in "LN")


@functools.cache
def _members(kind: str) -> str:
    """All of the first plane that are letters ("L") or numbers ("N"), as in a character class."""
    ranges = []
    start = 0
    categories = (unicodedata.category(chr(code))[0] for code in range(1 << 16))
    for found, run in itertools.groupby(categories):
        end = start + sum(1 for _ in run)
        if found == kind:
            ranges.append(f"\\u{start:04x}-\\u{end - 1:04x}")
        start = end
    return "".join(ranges)
