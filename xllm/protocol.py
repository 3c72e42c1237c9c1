"""What processes say to each other: the messages, not how they travel.

Everything here is frozen and carries no behaviour beyond (de)serialisation and sums of its own
fields. Messages on the
token stream (`roles/stream.py`) are msgpack; values in etcd are JSON.

A request is fully described by `GenerateRequest`: prompt, output so far, sampling, seed. So any
worker can continue it, and a resubmission after a worker died is the same message with
`output_ids` filled and `attempt + 1`.
"""

from __future__ import annotations

import enum
from typing import Any, NewType, TypeVar

import msgspec

BlockHash = NewType("BlockHash", bytes)
"""16 bytes that name a full block by its content: see `cache/block_hash.py`."""

WorkerId = NewType("WorkerId", str)
MasterId = NewType("MasterId", str)

Epoch = NewType("Epoch", int)
"""One lease of a worker: the etcd lease id, 63 random bits; only ever compared for equality."""

PROTOCOL_VERSION = 1
"""Of the token stream. A new one is for what an older process would take for something else: fields
may be added without it, at the end of an array and anywhere in an object."""

MAX_N = 128
"""Samples of one request."""

PEER = "peer"
"""The key of a fetch from a peer in `WorkerLoad.tier_block_s`."""

TIER_NAMES = ("device", "host", "disk", "remote")
"""From fast to slow: `cache/tier.py` has them as an enum."""


T = TypeVar("T")


def decode_json(value: bytes, kind: type[T]) -> T:
    """A value of etcd, whose fields that `kind` does not have are passed over.

    Raises: ValueError, whatever is wrong with it.
    """
    try:
        return msgspec.json.decode(value, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    """Cancelled by its owner; never shown to a client."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn. Text stop strings are not here: whoever detokenizes handles them."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    seed: int = 0
    """Always set by whoever accepts the request, so that a retry draws the same tokens."""
    max_tokens: int = 16
    """Output tokens in all, those in `GenerateRequest.output_ids` included. 0: score the prompt."""
    min_tokens: int = 0
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    """Beside the model's own EOS ids, which `ignore_eos` disables."""
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    logprobs: int | None = None
    """None: no log-probabilities. N: the drawn token's and the N most likely."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for each prompt token. Not None also means: no prefix-cache lookup."""


class FetchRange(msgspec.Struct, frozen=True, array_like=True):
    """Blocks [first, first + count) of a prompt that a peer holds, and where it serves them.

    A hint of whoever routed: a peer that has them no longer costs their computation, nothing else.
    """

    worker_id: WorkerId
    address: str
    """`WorkerInfo.block_address`."""
    first: int
    count: int


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt and `n` samples of its continuation, numbered `index` .. `index + n - 1`."""

    request_id: str
    model_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    attempt: int = 0
    n: int = 1
    index: int = 0
    output_ids: list[int] = msgspec.field(default_factory=list)
    """What an earlier attempt already produced (only with n = 1): output, not prompt."""
    salt: str = ""
    """Separates tenants in every cache: part of the root of the block hashes."""
    priority: int = 0
    """Lower is more urgent."""
    fetch: list[FetchRange] = msgspec.field(default_factory=list)
    """What this attempt's worker had better fetch than compute."""
    traceparent: str = ""
    """Whose children the worker's spans are: `tracing.py`. Empty: nobody's."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token, and the alternatives at its position, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class PhaseSeconds(msgspec.Struct, frozen=True, array_like=True):
    """What one worker's part of a request took, one after the other."""

    queue: float
    """Waiting, loading not included."""
    load: float
    """Bringing up blocks from below the device, or from a peer."""
    prefill: float
    decode: float
    """From the first token to the last."""


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one engine step added to one sample of one request.

    `offset` is the number of output tokens before `token_ids`: a receiver drops what it already
    has. The delta with a `finish_reason` is the last one of its sample.
    """

    request_id: str
    attempt: int
    index: int
    offset: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The EOS or stop token that ended the sample; it is in `token_ids` too, as last."""
    logprobs: list[TokenLogprob] | None = None
    """One per entry of `token_ids`, when asked for."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """In the first delta, when asked for: one per prompt token, None for the first."""
    cached_tokens: int = 0
    """Prompt tokens that were not computed; the same in every delta of a sample."""
    cached_tokens_by_tier: dict[str, int] = msgspec.field(default_factory=dict)
    """The same, by the tier that had them; in the first delta of a sample and attempt."""
    phases: PhaseSeconds | None = None
    """With the `finish_reason`; not from a worker of an older version."""


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a client and the HTTP layer have to know of a served model."""

    model_id: str
    max_model_len: int
    """Prompt plus output, in tokens."""
    vocab_size: int
    created: int
    """Unix seconds."""


class TokenizerFiles(msgspec.Struct, frozen=True):
    """The files of a model folder that the HTTP layer needs, by name, unparsed.

    tokenizer.json always; tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
    generation_config.json where the folder has them.
    """

    files: dict[str, bytes]


class WorkerState(enum.StrEnum):
    READY = "ready"
    DRAINING = "draining"


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's registration: the value of `workers/{worker_id}`, on its lease."""

    worker_id: WorkerId
    epoch: Epoch
    address: str
    """host:port of the token stream."""
    operator_address: str
    """host:port of health and metrics."""
    block_address: str = ""
    """host:port where peers fetch blocks; empty: it serves none."""
    model: ModelCard
    fingerprint: str
    """Of the weights' contents and the KV-relevant config: `engine/weights.py`."""
    block_size: int
    kv_dtype: str
    device_blocks: int
    block_bytes: int
    state: WorkerState = WorkerState.READY
    protocol_version: int = PROTOCOL_VERSION
    started_at: float = 0.0
    """Unix seconds; for people, never compared."""


class Watermark(msgspec.Struct, frozen=True, array_like=True):
    """What a load report already knows of one master's requests: the rest, that master adds."""

    session: int
    """The connection that is counted: `frames.Hello.session`; counts start at 0 with each."""
    received: int
    ended: int


class PrefillCost(msgspec.Struct, frozen=True, array_like=True):
    """What computing prompt tokens costs a worker, fitted to its own steps.

    `num_tokens` after a context of `start`:
    step_s + token_s * num_tokens + pair_s * (num_tokens * start + num_tokens**2 / 2) seconds.
    """

    step_s: float
    token_s: float
    pair_s: float

    def seconds(self, start: int, num_tokens: int) -> float:
        pairs = num_tokens * (start + num_tokens / 2)
        return self.step_s + self.token_s * num_tokens + self.pair_s * pairs


class TierUsage(msgspec.Struct, frozen=True, array_like=True):
    """Blocks."""

    used: int
    total: int


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's load: the value of `load/{worker_id}`, on its lease, at most once per
    `LeaderWord.load_period_s`."""

    epoch: Epoch
    waiting_requests_num: int = 0
    running_requests_num: int = 0
    waiting_tokens_num: int = 0
    """Prompt tokens that are admitted or queued but not computed yet."""
    gpu_cache_usage_perc: float = 0.0
    """0 to 1. The field's name, also on a CPU."""
    prefill_tokens_per_s: float = 0.0
    """Measured; 0 when nothing was measured yet."""
    decode_step_s: float = 0.0
    queue_s: float = 0.0
    """Seconds until a prompt that comes now begins to be computed, by the worker's own costs."""
    prefill_cost: PrefillCost | None = None
    """Measured; None when nothing was measured yet."""
    tier_block_s: dict[str, float] = msgspec.field(default_factory=dict)
    """Seconds per block brought to the device, measured: by name of the tier, or "peer"."""
    eviction_age_s: dict[str, float] = msgspec.field(default_factory=dict)
    """By tier that is full: since the last use of the block that it would evict next."""
    tiers: dict[str, TierUsage] = msgspec.field(default_factory=dict)
    """How full each tier is that the worker has."""
    moved_blocks: dict[str, int] = msgspec.field(default_factory=dict)
    """Since the worker's start, by way, of those that ever moved: `from_` or `to_` and a tier's
    name, "peer" for other workers'."""
    index_pending_blocks: int = 0
    """What it holds or lost and could not tell the index yet, for want of budget."""
    watermarks: dict[str, Watermark] = msgspec.field(default_factory=dict)
    """By `MasterId`."""


class MasterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A master's registration: the value of `masters/{master_id}`, on its lease."""

    master_id: MasterId
    http_address: str
    operator_address: str
    started_at: float = 0.0


class UploadShare(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one worker may write to etcd for the index, its load reports aside."""

    puts_per_s: float
    bytes_per_s: float
    max_blocks: int = 0
    """That it may publish, counted once per tier; 0: no limit."""


class LeaderWord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the leader has decided for the cluster: the value of `leader`, on its lease."""

    master_id: MasterId
    share: UploadShare | None = None
    """Of a worker that is not in `wanting`; None: not decided yet, everybody keeps what it has."""
    wanting: list[WorkerId] = msgspec.field(default_factory=list)
    """Workers with more to say than their share allows."""
    wanting_share: UploadShare | None = None
    """Of each of these."""
    load_period_s: float = 1.0
    """Between two load reports of a worker, at least."""

    def share_of(self, worker_id: WorkerId) -> UploadShare | None:
        return self.wanting_share if worker_id in self.wanting else self.share


class CommandKind(enum.StrEnum):
    LOOKUP = "lookup"
    CLEAR = "clear"
    PIN = "pin"
    UNPIN = "unpin"
    MOVE = "move"
    DRAIN = "drain"


class CommandState(enum.StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    """Claimed by its worker: it is executed at most once, whatever happens."""
    DONE = "done"
    FAILED = "failed"


class Command(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an operator wants of one worker: the value of `commands/{worker_id}/{command_id}`, on a
    lease of its own. The worker writes its state and outcome into the same key."""

    command_id: str
    worker_id: WorkerId
    epoch: Epoch
    """The run of the worker that is meant; a later one does not execute it."""
    kind: CommandKind
    master_id: MasterId
    created_at: float
    """Unix seconds, as `ended_at`."""
    tier: str | None = None
    """Of clear; None: all tiers."""
    blocks: bytes = b""
    """Names of a prompt's full blocks, 16 bytes each: tokens do not go through etcd. In JSON this
    is base64."""
    ttl_s: float = 0.0
    """Of pin."""
    timeout_s: float | None = None
    """Of drain; None: the worker's own."""
    fetch: list[FetchRange] = msgspec.field(default_factory=list)
    """Of move: from whom to get which of `blocks`."""
    state: CommandState = CommandState.PENDING
    outcome: dict[str, Any] = msgspec.field(default_factory=dict)
    error: str = ""
    """Why it FAILED."""
    ended_at: float = 0.0
