"""One sample on its way out: token deltas become text, cut at stop strings, with their scores.

Text of a token may wait: for the rest of a character, or because it may begin a stop string. Its
log-probability waits with it, so that every chunk scores the tokens whose text it brings. Offsets
are in characters of the sample's text, an echoed prompt included.

    decoded   |----------------------------|
    emitted   |-------------------|          the matcher holds the rest back
    pending                  |-token-|       shown once its last character is
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from xllm.protocol import FinishReason, TokenDelta, TokenLogprob
from xllm.roles.api.reading.calls import CallDelta
from xllm.stop_matcher import StopMatcher
from xllm.tokenizer import IncrementalDecoder, Tokenizer


class Score(NamedTuple):
    """One token's log-probability and the alternatives'; None for the first token of a prompt."""

    token_id: int
    offset: int
    logprob: float | None
    top: Sequence[tuple[int, float]]


@dataclass(slots=True)
class Part:
    """What a delta added to what the client sees."""

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    finish_reason: str | None = None
    """A `FinishReason`, or what a reader has made of it."""
    thoughts: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    stop: str | None = None
    """With the end: the stop string that was found."""

    def __bool__(self) -> bool:
        return bool(self.text or self.scores or self.finish_reason or self.thoughts or self.calls)


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What a request asks of the text, the same for all its samples."""

    stops: Sequence[str] = ()
    min_tokens: int = 0
    """Stop strings count only after so many tokens."""
    with_scores: bool = False
    skip_special_tokens: bool = True
    kept_tokens: Sequence[str] = ()
    """Special tokens that are shown all the same, to whoever reads the text."""


class Sample:
    """State of one sample; `push` each of its deltas in order."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: TextOptions,
        *,
        echo_text: str = "",
        echo_ids: Sequence[int] = (),
    ) -> None:
        """`echo_text` goes in front of the output; `echo_ids` are its tokens, for their scores."""
        self._tokenizer = tokenizer
        self._options = options
        self._decoder = IncrementalDecoder(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            kept_tokens=options.kept_tokens,
        )
        self._matcher = StopMatcher(options.stops)
        self._echo_text = echo_text
        self._echo_ids = echo_ids
        self._num_decoded = self._num_emitted = len(echo_text)
        self._pending: deque[tuple[int, Score]] = deque()
        """Scores whose text is not all emitted, with the offset where it ends."""
        self._has_begun = False
        self.num_tokens = 0
        """Output tokens so far, the one that stopped it included."""
        self.finish_reason: FinishReason | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def push(self, delta: TokenDelta) -> Part:
        """What the client may see now. Deltas after the end (of a text stop) add nothing."""
        if self.finished:
            return Part()
        part = Part()
        if not self._has_begun:
            self._has_begun = True
            part.text = self._echo_text
            if delta.prompt_logprobs is not None:
                part.scores += self._prompt_scores(delta.prompt_logprobs)
        token_ids = delta.token_ids
        num_before = self.num_tokens
        self.num_tokens += len(token_ids)
        if delta.stop_token_id is not None:
            token_ids = token_ids[:-1]
        logprobs: Sequence[TokenLogprob] = delta.logprobs or ()
        text = ""
        if num_exempt := max(self._options.min_tokens - num_before, 0):
            text = self._decode(token_ids[:num_exempt], logprobs)
            token_ids, logprobs = token_ids[num_exempt:], logprobs[num_exempt:]
        shown, stopped = self._matcher.push(self._decode(token_ids, logprobs))
        text += shown
        if stopped:
            self.finish_reason = FinishReason.STOP
        elif delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            text += self._finish_text()
        self._num_emitted += len(text)
        part.text += text
        part.scores += self._take_scores()
        part.finish_reason = self.finish_reason
        part.stop = self._matcher.stopped
        return part

    def _decode(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> str:
        if not self._options.with_scores or not logprobs:
            return self._decoder.push(token_ids)
        text = ""
        for token_id, logprob in zip(token_ids, logprobs, strict=False):
            score = Score(token_id, self._num_decoded, logprob.logprob, logprob.top)
            piece = self._decoder.push((token_id,))
            self._num_decoded += len(piece)
            self._pending.append((self._num_decoded, score))
            text += piece
        return text

    def _finish_text(self) -> str:
        """The end is near: what waits is shown, unless it completes a stop string."""
        text, stopped = self._matcher.push(self._decoder.flush())
        if stopped:
            self.finish_reason = FinishReason.STOP
            return text
        return text + self._matcher.flush()

    def _take_scores(self) -> list[Score]:
        """Scores of tokens whose text is out.

        A token that only begins a character has no text of its own: it goes with what follows.
        After a stop string the tokens that begin before the cut are taken, the others dropped.
        """
        taken = []
        emitted = self._num_emitted
        while self._pending:
            end, score = self._pending[0]
            cut = self._matcher.stopped is not None
            is_out = score.offset < emitted if cut else end <= emitted and score.offset < emitted
            if not is_out and (cut or not self.finished):
                break
            taken.append(score)
            self._pending.popleft()
        return taken

    def _prompt_scores(self, logprobs: Sequence[TokenLogprob | None]) -> list[Score]:
        decoder = IncrementalDecoder(
            self._tokenizer, at_start=True, skip_special_tokens=self._options.skip_special_tokens
        )
        scores = []
        offset = 0
        for token_id, logprob in zip(self._echo_ids, logprobs, strict=True):
            if logprob is None:
                scores.append(Score(token_id, offset, None, ()))
            else:
                scores.append(Score(token_id, offset, logprob.logprob, logprob.top))
            offset += len(decoder.push((token_id,)))
        return scores
