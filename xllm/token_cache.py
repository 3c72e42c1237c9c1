"""Token ids of text that was tokenized before: each turn of a conversation sends all of it again,
and many prompts begin with the same document.

What is kept are the ids of parts of texts (`text_cuts.py`), which are the same in every text.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from threading import Lock
from weakref import ref

from xllm.text_cuts import TextCuts
from xllm.tokenizer import Tokenizer

MAX_BYTES = 32 << 20
"""About eight million tokens."""

_ENTRY_BYTES = 200
"""Of the dictionary and its objects, besides the ids."""


class TokenCache:
    """The last parts that one tokenizer has encoded. Any thread.

    It does not keep the tokenizer, so that it can be kept by it.
    """

    def __init__(self, tokenizer: Tokenizer, max_bytes: int = MAX_BYTES) -> None:
        self._tokenizer = ref(tokenizer)
        self._cuts = TextCuts(tokenizer)
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = Lock()
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()
        """By a digest of tenant and text; the least recently used first."""

    def encode(
        self, text: str, salt: str, add_special_tokens: bool = False
    ) -> tuple[list[int], int]:
        """As `Tokenizer.encode`; and how many ids were known.

        `salt` names the tenant: how long this takes shows nobody what others have sent.
        """
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "whoever encodes has it"
        around = tokenizer.tokens_around if add_special_tokens else ((), ())
        parts = self._cuts.parts(text)
        if around is None or len(parts) == 1:
            return tokenizer.encode(text, add_special_tokens), 0
        keys = [_key(part, salt) for part in parts]
        known = self._look_up(keys)
        unknown = [part for part, ids in zip(parts, known, strict=True) if ids is None]
        # In one call, because each gives up the interpreter's lock and has to get it back.
        encoded = iter(tokenizer.encode_all(unknown, add_special_tokens=False))
        before, after = around
        whole = list(before)
        num_known = 0
        for key, ids in zip(keys, known, strict=True):
            if ids is not None:
                whole += ids
                num_known += len(ids)
            else:
                new = next(encoded)
                whole += new
                self._keep(key, new)
        whole += after
        return whole, num_known

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def _look_up(self, keys: Sequence[bytes]) -> list[array[int] | None]:
        with self._lock:
            for key in keys:
                if key in self._ids:
                    self._ids.move_to_end(key)
            return [self._ids.get(key) for key in keys]

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


def _key(part: str, salt: str) -> bytes:
    digest = sha256(f"{len(salt)}:{salt}".encode("utf-8", "surrogatepass"))
    digest.update(part.encode("utf-8", "surrogatepass"))
    return digest.digest()
