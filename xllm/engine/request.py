"""State of one sample of one request, while the engine has it.

    WAITING ──admit──> RUNNING ──last token──> FINISHED
       ^  │            ^  │
       │  └─> LOADING ─┘  │          while blocks come up from lower tiers
       └─────preempt──────┘          its committed blocks stay in the cache

A sequence's tokens are its prompt and then its output, in one list:

    token_ids   [ 0 ............ prompt_len ............ num_tokens )
                  prompt         output
    KV exists   [ 0 ........................ num_computed_tokens )
    named       [ 0 ... len(block_hashes) * block_size )       hashes of full blocks, lazily

A running sequence with `num_tokens - num_computed_tokens == 1` decodes, with more it prefills; a
preempted one prefills its output again, too.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from xllm.cache.tier import TierName
from xllm.protocol import (
    BlockHash,
    FetchRange,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenLogprob,
)

if TYPE_CHECKING:
    from xllm.cache.loads import LoadSpan, LoadTicket
    from xllm.engine.sampler import TokenHistory


class SequenceState(enum.Enum):
    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One sample: tokens, blocks and progress. Changed by `Scheduler` and `KVCache` only."""

    __slots__ = (
        "arrival",
        "block_hashes",
        "block_table",
        "cached_by_tier",
        "cached_tokens",
        "children",
        "finish_reason",
        "group",
        "history",
        "index",
        "is_begun",
        "load",
        "loads",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_written_tokens",
        "pending_hashes",
        "prompt_len",
        "prompt_logprobs",
        "salt",
        "sampling",
        "state",
        "token_ids",
        "trace",
    )

    def __init__(self, request: GenerateRequest, index: int, arrival: float) -> None:
        self.group: Final = request
        self.index: Final = index
        self.arrival: Final = arrival
        self.sampling: Final[SamplingParams] = request.sampling
        self.salt: Final = request.salt
        self.prompt_len: Final = len(request.prompt_ids)
        self.token_ids: Final[list[int]] = [*request.prompt_ids, *request.output_ids]
        self.state = SequenceState.WAITING
        self.finish_reason: FinishReason | None = None
        self.is_begun = False
        """It has been in a step."""
        self.num_computed_tokens = 0
        self.num_written_tokens = 0
        """Leading tokens whose KV was found in the cache when the sequence was admitted: their
        slots are not written, even where a row runs again."""
        self.cached_tokens: dict[TierName, int] | None = None
        """Prompt tokens that were not computed, by the tier that had them; set by the first
        admission."""
        self.cached_by_tier: dict[TierName, int] = {}
        """The same of the present admission, as far as it has come."""
        self.load: LoadTicket | None = None
        """While LOADING."""
        self.loads: list[LoadSpan] = []
        """Of all admissions; the samples of a request share it."""
        self.trace = ""
        """Whose children the spans of fetches are."""
        self.block_table: list[int] = []
        self.block_hashes: list[BlockHash] = []
        self.num_committed_blocks = 0
        self.pending_hashes: list[BlockHash] = []
        """Names that this sequence has promised to compute: see `KVCache.match`."""
        self.children: list[Sequence] = []
        """Samples that start from this one's prefill (n > 1), until it has ended."""
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        """Of the prompt tokens scored so far, where they are wanted; the first has none."""
        self.history: TokenHistory | None = None
        """Where a penalty needs it; made at the first draw."""

    @property
    def request_id(self) -> str:
        return self.group.request_id

    @property
    def attempt(self) -> int:
        return self.group.attempt

    @property
    def fetch(self) -> list[FetchRange]:
        return self.group.fetch

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        return (
            self.state is SequenceState.RUNNING
            and self.num_remaining_tokens == 1
            and self.num_output_tokens > 0
        )

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.sampling.prompt_logprobs is not None

    @property
    def uses_prefix_cache(self) -> bool:
        """Whoever wants the log-probabilities of the prompt has to compute all of it."""
        return self.sampling.prompt_logprobs is None
