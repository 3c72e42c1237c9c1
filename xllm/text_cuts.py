"""Where a text may be cut so that its token ids are those of its parts, one after the other.

Before a special token: a tokenizer takes these out of a text before it looks at what is between
them. Chat templates put such tokens around each message.

    <|im_start|>system You are ...  |  <|im_end|> <|im_start|>user What is ...  |  <|im_end|> ...

Before the space or the line's end between two words, if the tokenizer splits text into words first,
as byte-level ones do with regular expressions: none of those known here has either elsewhere than
at the beginning of a word, or after other space and marks. A part goes to the first such place
after `PART_CHARS`, so texts that begin alike have the same parts until they differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken

from xllm.tokenizer import Tokenizer

MIN_PART_CHARS = 256
"""Looking for less than this costs about what tokenizing it does."""

PART_CHARS = 4096
"""Of a part that is cut between words, at least: a millisecond of tokenizing, which is what texts
that begin alike may lose where they differ."""

_BETWEEN_WORDS = re.compile(r"(?<=[^\W_])[ \n](?=[^\W_])")
"""Of letters and digits, which no tokenizer takes for space or marks."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

_WORD_PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_MARKS}|{_SPACE}",
    "qwen2": rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}|{_MARKS}|{_SPACE}",
    "o200k": rf"{_START}{_CAPITALS}*{_SMALL}+{_CONTRACTIONS}?"
    rf"|{_START}{_CAPITALS}+{_SMALL}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}",
    "deepseek3": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACE,
}
"""Of pre-tokenizers: each makes words of the whole text, with a space at most where they begin."""

_HARMLESS_PATTERNS = {r"\p{N}{1,3}", r"\p{N}", "[一-龥\u3040-ゟ゠-ヿ]+"}  # noqa: RUF001
"""These split something off that has no space in it, and leave the rest."""


class TextCuts:
    """Of one tokenizer. Any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens = tokenizer.added_tokens
        self._special = special_pattern(tokens)
        self.is_between_words = (
            _makes_words(tokenizer.pre_tokenizer)
            and tokenizer.normalizer in (None, {"type": "NFC"})
            and not any(_may_take_space(token) for token in tokens)
        )

    def parts(self, text: str) -> list[str]:
        """What `text` may be cut into: at least one."""
        return [part for section in self._sections(text) for part in self._words(section)]

    def _sections(self, text: str) -> Iterator[str]:
        start = 0
        if self._special is not None:
            for match in self._special.finditer(text, MIN_PART_CHARS):
                if match.start() - start >= MIN_PART_CHARS:
                    yield text[start : match.start()]
                    start = match.start()
        yield text[start:]

    def _words(self, section: str) -> Iterator[str]:
        start = 0
        if self.is_between_words:
            while len(section) - start >= PART_CHARS + MIN_PART_CHARS:
                match = _BETWEEN_WORDS.search(section, start + PART_CHARS)
                if match is None:
                    break
                yield section[start : match.start()]
                start = match.start()
        yield section[start:]


def special_pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """Finds the tokens that a text may be cut before; None if there are none.

    They are looked for in the raw text, take nothing of what is around them, and no other token
    can be found in their place.
    """
    tokens = list(tokens)
    hides = _Hiding([token.content for token in tokens])
    safe = [
        token.content
        for token in tokens
        if not (token.normalized or _looks_around(token))
        # Of the other kind, a token before this one asks whether a word goes on.
        and not (token.content[0].isalnum() or token.content[0].isspace())
        and not hides(token.content)
    ]
    return re.compile("|".join(map(re.escape, safe))) if safe else None


class _Hiding:
    """Whether a text can hold one of the tokens where the tokenizer finds another.

    A model may have a thousand of them, so not each is compared with each.
    """

    def __init__(self, contents: list[str]) -> None:
        self._ends = {content[start:] for content in contents for start in range(len(content))}
        self._all = "\0".join(contents)

    def __call__(self, content: str) -> bool:
        if any(content[:length] in self._ends for length in range(1, len(content))):
            return True
        return self._all.find(content, self._all.find(content) + 1) >= 0


def _may_take_space(token: AddedToken) -> bool:
    """Whether what is between two words may belong to it, or tell it something."""
    content = token.content
    has_space = " " in content or "\n" in content
    return _looks_around(token) or (has_space and not content.isspace())


def _looks_around(token: AddedToken) -> bool:
    return bool(token.lstrip or token.rstrip or token.single_word)


def _makes_words(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer, as tokenizer.json has it, splits before what is between two words,
    and within each half as if it were alone."""
    if pre_tokenizer is None:
        return False
    stages = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    if any(stage["type"] == "ByteLevel" for stage in stages[:-1]):
        return False  # what comes after it sees no spaces
    kinds = [_makes_words_of(stage) for stage in stages]
    return True in kinds and None not in kinds


def _makes_words_of(stage: Any) -> bool | None:
    """False: it only splits within words; None: nobody knows."""
    match stage["type"]:
        case "Digits":
            return False
        case "ByteLevel" if not stage["add_prefix_space"]:
            return bool(stage.get("use_regex", True))
        case "Split" if stage["behavior"] == "Isolated" and not stage["invert"]:
            regex = stage["pattern"].get("Regex")
            if regex in _WORD_PATTERNS.values():
                return True
            return False if regex in _HARMLESS_PATTERNS else None
    return None
