"""From logits to tokens: one row, one draw, whatever else is in the batch.

A row's randomness is a number in [0, 1) hashed from (seed, index, position), so the same request
draws the same token alone, in a batch, after preemption, and on another worker.

Tokens are drawn without sorting the vocabulary. With p = softmax(logits / temperature):

    min_p    drops what is less probable than min_p times the most probable token
    top_k    drops what is less probable than the k-th; equals of the k-th stay
    top_p    of what is left, renormalised, drops a token if those more probable than it already
             have top_p of the mass; equals stay or go together

The first two are thresholds. The third is rejection (as in FlashInfer's sampling kernels,
arXiv:2501.01005): draw x from p by its cumulative sum, in the order of token ids, and keep it if it
is inside. If not, nothing as improbable as x is inside either: drop all that, and draw again. Every
draw is from p over a superset of what is inside, so what is kept has exactly the distribution
asked for. At top_p = 0.95 one draw in twenty is repeated, at 0.1 about two or three follow. The
repetitions are further digits of the row's random number: the hash with the count of attempts.

Log-probabilities are those of the model: before penalties, bias and temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from xllm.engine.grammar import GrammarState
from xllm.protocol import SamplingParams, TokenLogprob

GREEDY_TEMPERATURE = 1e-5
"""Below it a draw is greedy: the quotients would overflow, and nothing else has any mass."""

_CHUNK = 256
"""Tokens whose probabilities are summed before the cumulative sum; then one chunk is searched."""

_MASK64 = (1 << 64) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15


class TokenHistory:
    """The distinct tokens of one sample and how often each was drawn, for its penalties. Whoever
    owns the sample appends what is drawn."""

    __slots__ = ("_counts", "_entries", "_ids")

    def __init__(
        self, vocab_size: int, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()
    ) -> None:
        distinct = sorted(set(prompt_ids))
        capacity = min(vocab_size, len(distinct) + 256)
        self._ids = np.zeros(capacity, np.int64)
        self._ids[: len(distinct)] = distinct
        self._counts = np.zeros(capacity, np.float32)
        """Of the token in `_ids` with the same index: 0 if only the prompt has it."""
        self._entries = {token_id: entry for entry, token_id in enumerate(distinct)}
        for token_id in output_ids:
            self.append(token_id)

    @staticmethod
    def is_needed(params: SamplingParams) -> bool:
        return (
            params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or params.repetition_penalty != 1.0
        )

    def append(self, token_id: int) -> None:
        entry = self._entries.setdefault(token_id, len(self._entries))
        if entry == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[entry] = token_id
        self._counts[entry] += 1

    def penalize(self, logits: torch.Tensor, params: SamplingParams) -> None:
        """Changes one row [V] in place.

        Presence and frequency penalties see the output, as OpenAI defines them; the repetition
        penalty sees the prompt too, as its paper (arXiv:1909.05858) and `transformers` do.
        """
        size = len(self._entries)
        ids = torch.from_numpy(self._ids[:size]).to(logits.device)
        counts = torch.from_numpy(self._counts[:size]).to(logits.device)
        values = logits[ids]
        factor = params.repetition_penalty
        values = torch.where(values > 0, values / factor, values * factor)
        values -= params.frequency_penalty * counts
        values -= params.presence_penalty * (counts > 0)
        logits[ids] = values


@dataclass(frozen=True, slots=True)
class Draw:
    """A row whose next token is wanted. With n > 1, the samples of one prompt are rows with the
    same entry in `Batch.logits_indices`."""

    params: SamplingParams
    index: int
    """Number of the sample within its request."""
    position: int
    """Number of the output token that is drawn, from 0."""
    suppressed: Sequence[int] = ()
    """Tokens that must not be drawn: EOS and stop ids below `min_tokens`."""
    history: TokenHistory | None = None
    """Given where `TokenHistory.is_needed`."""
    grammar: GrammarState | None = None
    """Its `bias` decides what may be drawn; it knows of what is `suppressed`, too."""


@dataclass(frozen=True, slots=True)
class Score:
    """A row whose next token is known, and only its log-probability is wanted."""

    token_id: int
    num_top: int


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What to do with each row of logits: one entry per entry of `Batch.logits_indices`."""

    rows: Sequence[Draw | Score]
    masks: Future[None] | None = None
    """To be waited for before the rows are sampled, where some have grammars."""

    def wait(self) -> None:
        if self.masks is not None:
            self.masks.result()


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One entry per row of the `SamplingBatch`, in its order."""

    token_ids: list[int]
    """The drawn token; of a `Score`, its own."""
    logprobs: list[TokenLogprob | None]
    """None where they were not asked for."""
    faulty_rows: frozenset[int] = field(default_factory=frozenset)
    """Rows whose logits were not finite, or whose grammar allows nothing; their token id means
    nothing."""


def sample(logits: torch.Tensor, batch: SamplingBatch) -> SampledTokens:
    """One token per row of logits [R, V] float32, which are changed in place."""
    rows = batch.rows
    assert logits.shape[0] == len(rows)
    raw_rows = [row for row, entry in enumerate(rows) if _num_top(entry) is not None]
    raw = logits[raw_rows] if raw_rows else logits[:0]
    for row, entry in enumerate(rows):
        if isinstance(entry, Draw):
            _adjust(logits[row], entry)
    # A row's maximum is NaN if any of its logits is, and infinite if one is or all are suppressed.
    faulty = frozenset((~torch.isfinite(logits.amax(dim=1))).nonzero().flatten().tolist())
    token_ids = _choose(logits, rows, faulty)
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    if raw_rows:
        num_tops = [_num_top(rows[row]) or 0 for row in raw_rows]
        found = _logprobs(raw, [token_ids[row] for row in raw_rows], num_tops)
        for row, logprob in zip(raw_rows, found, strict=True):
            logprobs[row] = logprob
    return SampledTokens(token_ids, logprobs, faulty)


def uniform(seed: int, index: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1) with 53 random bits, of which each argument changes about half
    (splitmix64's finalizer over one word after the other)."""
    state = seed & _MASK64
    for word in (index, position, attempt):
        state = _mix64(state) ^ word
    return (_mix64(state) >> 11) * 2.0**-53


def _mix64(state: int) -> int:
    state = (state + _GOLDEN64) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def _num_top(entry: Draw | Score) -> int | None:
    return entry.num_top if isinstance(entry, Score) else entry.params.logprobs


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_TEMPERATURE or params.top_k == 1


def _adjust(logits: torch.Tensor, entry: Draw) -> None:
    """Penalties, bias and suppression of one row [V], in place."""
    if entry.history is not None:
        entry.history.penalize(logits, entry.params)
    if entry.params.logit_bias:
        token_ids = torch.tensor(list(entry.params.logit_bias), device=logits.device)
        bias = torch.tensor(list(entry.params.logit_bias.values()), device=logits.device)
        logits.index_add_(0, token_ids, bias.to(logits.dtype))
    if entry.grammar is not None:
        logits += torch.from_numpy(entry.grammar.bias).to(logits.device)
    elif entry.suppressed:
        logits[list(entry.suppressed)] = -torch.inf


def _choose(
    logits: torch.Tensor, rows: Sequence[Draw | Score], faulty: frozenset[int]
) -> list[int]:
    token_ids = [entry.token_id if isinstance(entry, Score) else 0 for entry in rows]
    greedy: list[int] = []
    drawn: list[int] = []
    for row, entry in enumerate(rows):
        if isinstance(entry, Draw) and row not in faulty:
            (greedy if _is_greedy(entry.params) else drawn).append(row)
    if greedy:
        # argmax returns the first of equals: the lowest token id.
        for row, token_id in zip(
            greedy, _select(logits, greedy).argmax(dim=1).tolist(), strict=True
        ):
            token_ids[row] = token_id
    if drawn:
        entries = [entry for row in drawn if isinstance(entry := rows[row], Draw)]
        for row, token_id in zip(drawn, _draw(_select(logits, drawn), entries), strict=True):
            token_ids[row] = token_id
    return token_ids


def _select(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits if len(rows) == logits.shape[0] else logits[rows]


def _draw(logits: torch.Tensor, entries: list[Draw]) -> list[int]:
    """[r, V] -> r token ids."""
    device = logits.device
    params = [entry.params for entry in entries]
    inverse = torch.tensor([1.0 / p.temperature for p in params], device=device)
    # Padded with zeros to whole chunks.
    vocab_size = logits.shape[1]
    probs = torch.softmax(logits * inverse.unsqueeze(1), dim=1)
    probs = F.pad(probs, (0, -vocab_size % _CHUNK)) if vocab_size % _CHUNK else probs
    _drop_min_p(probs, [p.min_p for p in params])
    _drop_top_k(probs, [p.top_k for p in params], vocab_size)
    cdf = _ChunkedCdf(probs)
    # Not below a tiny share, so that the most probable token is always inside.
    limits = [max(p.top_p, 1e-30) * mass for p, mass in zip(params, cdf.masses(), strict=True)]
    token_ids = [0] * len(entries)
    pending = list(range(len(entries)))
    attempt = 0
    while pending:
        uniforms = [
            uniform(params[row].seed, entries[row].index, entries[row].position, attempt)
            for row in pending
        ]
        rejected: list[int] = []
        for row, token_id in zip(pending, cdf.invert(pending, uniforms), strict=True):
            token_ids[row] = token_id
            if params[row].top_p < 1.0:
                likelier = F.threshold(probs[row], float(probs[row, token_id]), 0.0)
                if float(likelier.sum()) >= limits[row]:
                    cdf.replace_row(row, likelier)
                    rejected.append(row)
        pending = rejected
        attempt += 1
    return token_ids


def _drop_min_p(probs: torch.Tensor, min_ps: list[float]) -> None:
    if any(min_ps):
        floors = torch.tensor(min_ps, device=probs.device) * probs.amax(dim=1)
        probs.masked_fill_(probs < floors.unsqueeze(1), 0.0)


def _drop_top_k(probs: torch.Tensor, top_ks: list[int], vocab_size: int) -> None:
    cut = [row for row, top_k in enumerate(top_ks) if 0 < top_k < vocab_size]
    if not cut:
        return
    ranks = torch.tensor([top_ks[row] - 1 for row in cut], device=probs.device)
    likeliest = _select(probs, cut).topk(int(ranks.max()) + 1, dim=1).values
    floors = torch.zeros(probs.shape[0], device=probs.device)
    floors[cut] = likeliest.gather(1, ranks.unsqueeze(1)).squeeze(1)
    probs.masked_fill_(probs < floors.unsqueeze(1), 0.0)


class _ChunkedCdf:
    """Inverts the cumulative sums of rows probs [r, V], V a multiple of the chunk, in two steps:
    over the sums of chunks, then within one chunk. Shares memory with `probs`."""

    def __init__(self, probs: torch.Tensor) -> None:
        self._chunks = probs.view(probs.shape[0], -1, _CHUNK)
        self._sums = self._chunks.sum(dim=2)

    def masses(self) -> list[float]:
        masses: list[float] = self._sums.sum(dim=1).tolist()
        return masses

    def replace_row(self, row: int, probs: torch.Tensor) -> None:
        self._chunks[row] = probs.view(-1, _CHUNK)
        self._sums[row] = self._chunks[row].sum(dim=1)

    def invert(self, rows: list[int], uniforms: list[float]) -> list[int]:
        """Per row, the token where its cumulative sum passes the uniform's share of the whole.
        Never one of probability zero."""
        device = self._chunks.device
        at = torch.tensor(rows, device=device)
        shares = torch.tensor(uniforms, dtype=torch.float64, device=device).unsqueeze(1)
        ends = self._sums[at].cumsum(dim=1, dtype=torch.float64)
        targets = shares * ends[:, -1:]
        chunk = _first_beyond(ends, targets)
        inner_ends = self._chunks[at, chunk.squeeze(1)].cumsum(dim=1, dtype=torch.float64)
        before = ends.gather(1, chunk) - inner_ends[:, -1:]
        token_ids = chunk * _CHUNK + _first_beyond(inner_ends, targets - before)
        return token_ids.squeeze(1).tolist()


def _first_beyond(ends: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The first index at which ends [r, n], ascending, is above the target [r, 1]; where rounding
    has put the target past the end, the last index that added anything."""
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(ends, targets, right=True), last)


def _logprobs(raw: torch.Tensor, token_ids: list[int], num_tops: list[int]) -> list[TokenLogprob]:
    """Of each row of raw [r, V]: its token, and as many of the likeliest as asked for."""
    normalizers = torch.logsumexp(raw, dim=1, keepdim=True)
    chosen = torch.tensor(token_ids, device=raw.device).unsqueeze(1)
    logprobs = (raw.gather(1, chosen) - normalizers).squeeze(1).tolist()
    values, indices = raw.topk(min(max(num_tops), raw.shape[1]), dim=1)
    top_values, top_ids = (values - normalizers).tolist(), indices.tolist()
    return [
        TokenLogprob(
            token_ids[row],
            logprobs[row],
            list(zip(top_ids[row][:num_top], top_values[row][:num_top], strict=True)),
        )
        for row, num_top in enumerate(num_tops)
    ]
