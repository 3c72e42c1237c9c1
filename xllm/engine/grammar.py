"""Grammars that outputs must match: which tokens may come next, computed beside the forward pass.

    event loop      submit ── compile ──> GrammarCompiler's thread       once per grammar, cached
    engine thread   step:  MaskWorker.begin ─┬─ forward pass ── wait ─── sample under the masks
    mask thread                              └─ each state: take in what was drawn, next mask

A `GrammarState` is a function of its sample's output tokens and of nothing else, as penalties are:
a request that was preempted goes on with it, one that comes from another worker with its output so
far replays that, and the samples of one request have one each.

Whoever has drawn a token says so by `append`, which costs nothing; the work is done by the mask
thread in the next step. llguidance lets go of the GIL while it works, the forward pass too.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from xllm.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

MAX_CACHED_GRAMMARS = 128
_WORD_BITS = 32
_BIAS_CACHE_BYTES = 32 << 20
_BIAS_OF_BYTE: npt.NDArray[np.float32] = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf
).astype(np.float32)
"""[256, 8]: of eight tokens whose bits are one byte of a mask."""


class BiasCache:
    """Masks as what is added to logits, for the mask thread alone.

    To add is fast; to fill by a mask takes 40 times as long, on the way from logits to token. To
    make what is added takes longer than to find the mask, but the same masks come again and again.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._max_entries = max(8, _BIAS_CACHE_BYTES // (4 * vocab_size))
        self._entries: OrderedDict[bytes, npt.NDArray[np.float32]] = OrderedDict()

    def of(self, bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
        """[V]: 0 where a bit is set, else -inf. Not to be changed."""
        key = bits.tobytes()
        bias = self._entries.get(key)
        if bias is not None:
            self._entries.move_to_end(key)
            return bias
        bias = _BIAS_OF_BYTE.take(bits.view(np.uint8), axis=0).reshape(-1)[: self.vocab_size]
        self._entries[key] = bias
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)
        return bias


class GrammarState:
    """How far one sample has come in its grammar. The engine's thread appends, the mask thread
    does all else; never at the same time, since a step waits for its masks."""

    __slots__ = ("_biases", "_bits", "_eos_token_ids", "_matcher", "_pending", "bias", "error")

    def __init__(
        self,
        matcher: LLMatcher,
        biases: BiasCache,
        mask_size: int,
        eos_token_ids: Sequence[int],
        output_ids: Sequence[int] = (),
    ) -> None:
        """mask_size: tokens that the matcher knows, all of the model's or more. output_ids: what
        was drawn already, perhaps elsewhere."""
        self._matcher = matcher
        self._biases = biases
        self._eos_token_ids = [i for i in eos_token_ids if i < biases.vocab_size]
        self._pending = list(output_ids)
        self._bits = np.zeros(-(-mask_size // _WORD_BITS), np.uint32)
        self.bias: npt.NDArray[np.float32] = np.zeros(biases.vocab_size, np.float32)
        """[V], to be added to the logits: 0 for a token that may come next, else -inf. As of the
        last `advance`, valid until the next. Not to be changed."""
        self.error = ""
        """Why the sample cannot go on."""

    def append(self, token_id: int) -> None:
        """The token was drawn."""
        self._pending.append(token_id)

    def advance(self, suppressed: Sequence[int] = ()) -> None:
        """Takes in what was appended, and sets `bias`.

        suppressed: tokens that should not be drawn yet; they are, where nothing else may be.
        """
        if self.error:
            return
        matcher, bits = self._matcher, self._bits
        pending, self._pending = self._pending, []
        if pending and not matcher.consume_tokens(pending):
            self.fail(matcher.get_error() or "the output does not match the grammar")
            return
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if matcher.is_error():
            self.fail(matcher.get_error())
            return
        if suppressed:
            before = bits.copy()
            for token_id in suppressed:
                bits[token_id // _WORD_BITS] &= ~np.uint32(1 << token_id % _WORD_BITS)
            if not bits.any():
                bits[:] = before
        if not bits.any():  # complete, for a tokenizer that knows no EOS
            if not self._eos_token_ids:
                self.fail("the output is complete, but the model has no token that ends it")
                return
            for token_id in self._eos_token_ids:
                bits[token_id // _WORD_BITS] |= np.uint32(1 << token_id % _WORD_BITS)
        self.bias = self._biases.of(bits)

    def fail(self, error: str) -> None:
        """Nothing may be drawn any more."""
        self.error = error
        self.bias = np.full_like(self.bias, -np.inf)


MaskWork = tuple[GrammarState, Sequence[int]]
"""A state to advance, and its suppressed tokens."""


class CompiledGrammar:
    """What new states are copied from."""

    def __init__(
        self,
        matcher: LLMatcher,
        biases: BiasCache,
        mask_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._matcher = matcher
        self._biases = biases
        self._mask_size = mask_size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()

    def new_state(self, output_ids: Sequence[int] = ()) -> GrammarState:
        with self._lock:
            matcher = self._matcher.deep_copy()
        return GrammarState(matcher, self._biases, self._mask_size, self._eos_token_ids, output_ids)


class GrammarCompiler:
    """Compiles grammars for one model, on a thread of its own."""

    def __init__(
        self, tokenizer_json: Callable[[], str], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        """tokenizer_json: the text of tokenizer.json, asked for with the first grammar."""
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._biases = BiasCache(vocab_size)
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    @classmethod
    def of_folder(
        cls, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> GrammarCompiler:
        """For the model in a Hugging Face folder."""
        path = folder / "tokenizer.json"
        return cls(lambda: path.read_text(encoding="utf-8"), vocab_size, eos_token_ids)

    def submit(self, grammar: str) -> Future[CompiledGrammar]:
        """The future raises InvalidRequest for what is no grammar."""
        return self._executor.submit(self._compile, grammar)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str) -> CompiledGrammar:
        from llguidance import LLMatcher

        if (known := self._compiled.get(grammar)) is not None:
            self._compiled.move_to_end(grammar)
            return known
        tokenizer = self._tokenizer or self._load_tokenizer()
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"the grammar is refused: {matcher.get_error()}", param="grammar")
        compiled = CompiledGrammar(matcher, self._biases, tokenizer.vocab_size, self._eos_token_ids)
        self._compiled[grammar] = compiled
        if len(self._compiled) > MAX_CACHED_GRAMMARS:
            self._compiled.popitem(last=False)
        return compiled

    def _load_tokenizer(self) -> LLTokenizer:
        """Takes a quarter of a second for 50,000 tokens."""
        from llguidance import LLTokenizer

        text, eos_token_ids = self._tokenizer_json(), self._eos_token_ids or None
        try:
            # The model's own vocabulary may be padded beyond the tokenizer's.
            tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos_token_ids)
        except ValueError:
            tokenizer = LLTokenizer(text, eos_token=eos_token_ids)
        self._tokenizer = tokenizer
        return tokenizer


class MaskWorker:
    """Computes the masks of a step on a thread of its own."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def begin(self, work: Sequence[MaskWork]) -> Future[None]:
        """Advances each state; nobody may touch them until the future is done."""
        return self._executor.submit(_advance_all, work)

    def close(self) -> None:
        self._executor.shutdown(wait=False)


def _advance_all(work: Sequence[MaskWork]) -> None:
    for state, suppressed in work:
        try:
            state.advance(suppressed)
        except Exception:  # foreign code: other requests of the step have nothing to do with it
            logger.exception("grammar_failed")
            state.fail("the grammar could not be followed")
