"""Token ids of text that was tokenized before: each turn of a conversation sends all of it again.

A tokenizer takes its special tokens out of a text before it looks at what is between them. So the
ids of a text that is cut before a special token are those of its parts, one after the other, and
a part has the same ids in every text. Chat templates put such tokens around each message.

    <|im_start|>system You are ...  |  <|im_end|> <|im_start|>user What is ...  |  <|im_end|> ...
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256
from threading import Lock
from weakref import ref

from tokenizers import AddedToken

from xllm.tokenizer import Tokenizer

MIN_SECTION_CHARS = 256
"""Looking for less than this costs about what tokenizing it does."""

MAX_BYTES = 32 << 20
"""About eight million tokens."""

_ENTRY_BYTES = 200
"""Of the dictionary and its objects, besides the ids."""


class TokenCache:
    """The last sections that one tokenizer has encoded. Any thread.

    It does not keep the tokenizer, so that it can be kept by it.
    """

    def __init__(self, tokenizer: Tokenizer, max_bytes: int = MAX_BYTES) -> None:
        self._tokenizer = ref(tokenizer)
        self._cut = _cut_pattern(tokenizer.added_tokens)
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = Lock()
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()
        """By a digest of tenant and text; the least recently used first."""

    def encode(self, text: str, salt: str) -> tuple[list[int], int]:
        """As `Tokenizer.encode` without special tokens around; and how many ids were known.

        `salt` names the tenant: how long this takes shows nobody what others have sent.
        """
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "whoever encodes has it"
        sections = self._sections(text)
        if len(sections) == 1:
            return tokenizer.encode(text, add_special_tokens=False), 0
        ids: list[int] = []
        num_known = 0
        for section in sections:
            key = _key(section, salt)
            with self._lock:
                known = self._ids.get(key)
                if known is not None:
                    self._ids.move_to_end(key)
            if known is not None:
                ids += known
                num_known += len(known)
            else:
                encoded = tokenizer.encode(section, add_special_tokens=False)
                ids += encoded
                self._keep(key, encoded)
        return ids, num_known

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def _sections(self, text: str) -> list[str]:
        if self._cut is None:
            return [text]
        sections = []
        start = 0
        for match in self._cut.finditer(text, MIN_SECTION_CHARS):
            if match.start() - start >= MIN_SECTION_CHARS:
                sections.append(text[start : match.start()])
                start = match.start()
        sections.append(text[start:])
        return sections

    def _keep(self, key: bytes, encoded: list[int]) -> None:
        ids = array("i", encoded)
        with self._lock:
            if key in self._ids:
                return
            self._ids[key] = ids
            self._num_bytes += _size(ids)
            while self._num_bytes > self._max_bytes:
                _, oldest = self._ids.popitem(last=False)
                self._num_bytes -= _size(oldest)


def _size(ids: array[int]) -> int:
    return _ENTRY_BYTES + len(ids) * ids.itemsize


def _key(section: str, salt: str) -> bytes:
    digest = sha256(f"{len(salt)}:{salt}".encode("utf-8", "surrogatepass"))
    digest.update(section.encode("utf-8", "surrogatepass"))
    return digest.digest()


def _cut_pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """Finds the tokens that a text may be cut before; None if there are none.

    They are looked for in the raw text, take nothing of what is around them, and no other token
    can be found in their place.
    """
    tokens = list(tokens)
    safe = [
        token.content
        for token in tokens
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        # Of the other kind, a token before this one asks whether a word goes on.
        and not (token.content[0].isalnum() or token.content[0].isspace())
        and not any(_hides(other.content, token.content) for other in tokens)
    ]
    return re.compile("|".join(map(re.escape, safe))) if safe else None


def _hides(other: str, content: str) -> bool:
    """Whether a text can hold `content` where the tokenizer finds `other`."""
    if other != content and content in other:
        return True
    return any(other.endswith(content[:length]) for length in range(1, len(content)))
