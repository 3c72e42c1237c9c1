"""What a process says about itself: log lines and metrics.

A log line is `event key=value ...`: the event's name is one word, values with spaces are quoted.
As text it stays like that, after time, level and logger; as JSON, event and keys become fields of
one object. Nothing here samples or sends: operators read stderr and scrape the operator port.

Every metric that xllm has is declared in `Metrics`; where vLLM has one of the same meaning, it has
vLLM's name after the prefix. Label values come from small closed sets.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time

import orjson
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

from xllm import __version__

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_VALUE = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s"']\S*|"""
_PAIR = re.compile(rf" (\w+)=({_VALUE})(?= |$)")
_EVENT = re.compile(rf"\w+(?: \w+=(?:{_VALUE})(?= |$))*")


def setup_logging(level: str = "info", fmt: str = "text") -> None:
    """Sends the log of this process to stderr; a second call replaces the first.

    `level` is for xllm's own loggers; other packages' lines show from WARNING on.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _StderrHandler):
            root.removeHandler(handler)
    stderr_handler = _StderrHandler()
    stderr_handler.setFormatter(JsonFormatter() if fmt == "json" else TextFormatter())
    root.addHandler(stderr_handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("xllm").setLevel(level.upper())
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """A type of its own, so that `setup_logging` never removes somebody else's handler."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)


def _utc_time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO xllm.roles.worker event key=value`, then any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        # A client chooses some of the values: a line break in one must not forge a second line.
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        line = f"{_utc_time(record)} {record.levelname} {record.name} {message}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


class JsonFormatter(logging.Formatter):
    """One object per line: time, level, logger, event and its keys; traceback as `exception`.

    A message that is not of the form `event key=value ...` is whole under `message`.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        fields: dict[str, str] = {}
        if _EVENT.fullmatch(message):
            event, _, _ = message.partition(" ")
            fields = {key: _unquote(value) for key, value in _PAIR.findall(message)}
            fields["event"] = event
        else:
            fields["message"] = message
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        fields |= {
            "time": _utc_time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS).decode()


def _unquote(value: str) -> str:
    if value[:1] in ("'", '"'):
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value


_LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    *(2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0),
)
_LAG_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)
_ERROR_BUCKETS_S = (-4.0, -1.0, -0.25, -0.1, -0.025, 0.0, 0.025, 0.1, 0.25, 1.0, 4.0)
_BLOCK_AGE_BUCKETS_S = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_TOKEN_BUCKETS = tuple(float(4**exponent) for exponent in range(10))


class Metrics:
    """Every metric of one process, in a registry of its own.

    A role renders only the concerns it has, so that a master does not report an empty KV cache;
    the others' objects exist and can be fed all the same. All methods of the metric objects are
    thread-safe, a call costs about a microsecond.
    """

    def __init__(
        self, *, api: bool = True, engine: bool = True, cluster: bool = True, routing: bool = True
    ) -> None:
        self._registry = CollectorRegistry()
        self._declare_process(self._registry)
        self._declare_api(self._registry if api else None)
        self._declare_engine(self._registry if engine else None)
        self._declare_tiers(self._registry if engine else None)
        self._declare_cluster(self._registry if cluster else None)
        self._declare_routing(self._registry if routing else None)
        self._declare_index_upload(self._registry if engine and cluster else None)
        self._declare_etcd_size(self._registry if routing else None)

    def render(self) -> bytes:
        """The exposition that Prometheus scrapes, of `METRICS_CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def num_api_requests(self) -> float:
        """The value of `api_requests_in_flight`."""
        return next(iter(self.api_requests_in_flight.collect())).samples[0].value

    def _declare_process(self, registry: CollectorRegistry) -> None:
        ProcessCollector(registry=registry)
        self.build_info = Info("xllm_build", "Version of xllm.", registry=registry)
        self.build_info.info({"version": __version__})
        self.event_loop_lag_seconds = Histogram(
            "xllm_event_loop_lag_seconds",
            "How late the event loop woke up a timer.",
            buckets=_LAG_BUCKETS_S,
            registry=registry,
        )

    def _declare_api(self, registry: CollectorRegistry | None) -> None:
        """The public HTTP API, as its clients see it."""
        self.api_requests_in_flight = Gauge(
            "xllm_api_requests_in_flight",
            "Accepted requests of the public API that have not ended.",
            registry=registry,
        )
        self.request_success = Counter(
            "xllm_request_success_total",
            "Samples that ended as they should.",
            ["finished_reason"],
            registry=registry,
        )
        self.request_errors = Counter(
            "xllm_request_errors_total",
            "Requests answered with an error, by the error's label.",
            ["label"],
            registry=registry,
        )
        self.client_disconnects = Counter(
            "xllm_client_disconnects_total",
            "Requests whose client went away before their end.",
            registry=registry,
        )
        self.time_to_first_token_seconds = Histogram(
            "xllm_time_to_first_token_seconds",
            "Request received to first token.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_latency_seconds = Histogram(
            "xllm_inter_token_latency_seconds",
            "Each gap between tokens of one sample.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.e2e_request_latency_seconds = Histogram(
            "xllm_e2e_request_latency_seconds",
            "Request received to last token.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.request_prompt_tokens = Histogram(
            "xllm_request_prompt_tokens",
            "Prompt tokens of each request.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.request_generation_tokens = Histogram(
            "xllm_request_generation_tokens",
            "Output tokens of each request.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )

    def _declare_engine(self, registry: CollectorRegistry | None) -> None:
        """The engine of one worker and its device cache."""
        self.num_requests_running = Gauge(
            "xllm_num_requests_running", "Requests in the running batch.", registry=registry
        )
        self.num_requests_waiting = Gauge(
            "xllm_num_requests_waiting", "Requests that wait to be admitted.", registry=registry
        )
        self.kv_cache_usage_perc = Gauge(
            "xllm_kv_cache_usage_perc",
            "Device blocks that running requests hold, of all: 0 to 1.",
            registry=registry,
        )
        self.kv_cache_blocks = Gauge(
            "xllm_kv_cache_blocks", "Blocks of the device cache.", registry=registry
        )
        self.prompt_tokens = Counter(
            "xllm_prompt_tokens_total", "Prompt tokens, cached ones included.", registry=registry
        )
        self.generation_tokens = Counter(
            "xllm_generation_tokens_total", "Output tokens.", registry=registry
        )
        self.prefix_cache_queries = Counter(
            "xllm_prefix_cache_queries_total",
            "Prompt tokens looked up in the prefix cache.",
            registry=registry,
        )
        self.prefix_cache_hits = Counter(
            "xllm_prefix_cache_hits_total",
            "Prompt tokens found in the prefix cache.",
            registry=registry,
        )
        self.num_preemptions = Counter(
            "xllm_num_preemptions_total", "Requests put back for want of blocks.", registry=registry
        )
        self.step_seconds = Histogram(
            "xllm_step_seconds",
            "One engine step, by what was in it: prefill, decode or mixed.",
            ["phase"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.iteration_tokens = Histogram(
            "xllm_iteration_tokens_total",
            "Rows of each engine step.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.request_queue_time_seconds = Histogram(
            "xllm_request_queue_time_seconds",
            "Request submitted to first scheduled.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )

    def _declare_tiers(self, registry: CollectorRegistry | None) -> None:
        """Blocks by tier: device, host, disk, and remote for those of peers and the store."""

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"xllm_{name}_total", documentation, labels, registry=registry)

        def histogram(name: str, documentation: str) -> Histogram:
            buckets = _BLOCK_AGE_BUCKETS_S
            return Histogram(
                f"xllm_{name}_seconds", documentation, ["tier"], buckets=buckets, registry=registry
            )

        self.tier_blocks = Gauge(
            "xllm_tier_blocks", "Blocks that a tier can hold.", ["tier"], registry=registry
        )
        self.tier_blocks_used = Gauge(
            "xllm_tier_blocks_used", "Blocks that it holds.", ["tier"], registry=registry
        )
        self.tier_hits = counter("tier_hits", "Prompt tokens that were found there.", "tier")
        self.tier_promotions = counter(
            "tier_promotions", "Blocks brought from there to the device.", "tier"
        )
        self.tier_demotions = counter("tier_demotions", "Blocks stored there.", "tier")
        self.tier_evictions = counter("tier_evictions", "Blocks that gave way to others.", "tier")
        self.tier_transfer_bytes = counter(
            "tier_transfer_bytes",
            "Moved, by direction: from_ or to_ and a tier (remote: peers) or store.",
            "transfer",
        )
        self.tier_transfer_seconds = counter(
            "tier_transfer_seconds", "What moving took, by direction.", "transfer"
        )
        self.tier_load_timeouts = counter(
            "tier_load_timeouts", "Loads that were not waited for to their end."
        )
        self.tier_stores_dropped = counter(
            "tier_stores_dropped", "Blocks not stored below, for want of room or time."
        )
        self.tier_checksum_failures = counter(
            "tier_checksum_failures", "Blocks that came back damaged, and were thrown away."
        )
        self.tier_detachments = counter(
            "tier_detachments", "Times the disk failed and was left alone for a while."
        )
        self.store_attached = Gauge(
            "xllm_store_attached", "1: the shared store is there.", registry=registry
        )
        self.store_known_blocks = Gauge(
            "xllm_store_known_blocks",
            "Blocks that are in the shared store as far as this worker knows.",
            registry=registry,
        )
        self.store_detachments = counter(
            "store_detachments", "Times the shared store could not be had, or was lost."
        )
        self.store_asks = counter(
            "store_asks", "Prompts for which the shared store was asked what it has."
        )
        self.store_ask_seconds = counter("store_ask_seconds", "What asking it took.")
        self.store_failures = counter(
            "store_failures",
            "Blocks (unanswered: prompts) that the shared store did not bring or take, by reason.",
            "reason",
        )
        self.peer_failures = counter(
            "peer_failures",
            "Times a peer failed as a source of blocks and was avoided for a while.",
        )
        self.peers_avoided = Gauge(
            "xllm_peers_avoided", "Peers that are not asked for blocks now.", registry=registry
        )
        self.peer_blocks_absent = counter(
            "peer_blocks_absent", "Blocks that a peer was asked for and did not have."
        )
        self.peer_blocks_corrupt = counter(
            "peer_blocks_corrupt", "Blocks that came damaged from a peer."
        )
        self.peer_served_blocks = counter(
            "peer_served_blocks", "Blocks sent to peers, by the tier they came from.", "tier"
        )
        self.peer_served_bytes = counter(
            "peer_served_bytes", "Bytes sent to peers, by the tier they came from.", "tier"
        )
        self.peer_serve_misses = counter(
            "peer_serve_misses", "Blocks that peers asked for and were not here."
        )
        self.kv_block_lifetime_seconds = histogram(
            "kv_block_lifetime", "Age of evicted blocks: time in their tier."
        )
        self.kv_block_idle_before_evict_seconds = histogram(
            "kv_block_idle_before_evict", "Time since the last use of evicted blocks."
        )
        self.kv_block_reuse_gap_seconds = histogram(
            "kv_block_reuse_gap", "Time between two uses of a block."
        )

    def _declare_cluster(self, registry: CollectorRegistry | None) -> None:
        """Membership, and what is sent to workers."""
        self.workers = Gauge(
            "xllm_workers",
            "Known workers, by state; connecting: registered, but not reached from here.",
            ["state"],
            registry=registry,
        )
        self.worker_streams_lost = Counter(
            "xllm_worker_streams_lost_total",
            "Connections to workers that closed or went silent.",
            registry=registry,
        )
        self.requests_routed = Counter(
            "xllm_requests_routed_total", "Requests sent to a worker.", registry=registry
        )
        self.requests_resubmitted = Counter(
            "xllm_requests_resubmitted_total",
            "Requests sent to another worker after theirs was lost, left or refused them.",
            registry=registry,
        )
        self.etcd_connected = Gauge(
            "xllm_etcd_connected", "1 while this process's lease is alive.", registry=registry
        )
        self.lease_epochs = Counter(
            "xllm_lease_epochs_total", "Leases this process has had.", registry=registry
        )
        self.watch_resyncs = Counter(
            "xllm_watch_resyncs_total", "Times a watch started over.", registry=registry
        )

    def _declare_routing(self, registry: CollectorRegistry | None) -> None:
        """A master's copy of the cache index, and how well it estimates by it."""

        def gauge(name: str, documentation: str) -> Gauge:
            return Gauge(f"xllm_{name}", documentation, registry=registry)

        def counter(name: str, documentation: str) -> Counter:
            return Counter(f"xllm_{name}_total", documentation, registry=registry)

        self.index_blocks = gauge("index_blocks", "Blocks that some worker is known to hold.")
        self.index_copies = gauge("index_copies", "The same, once per worker and tier.")
        self.index_workers_without_events = gauge(
            "index_workers_without_events",
            "Workers that publish no blocks, so that only their load is known.",
        )
        self.index_batches = counter("index_batches", "Batches of events applied.")
        self.index_bytes = counter("index_bytes", "Values of the index read from etcd.")
        self.index_gaps = counter("index_gaps", "Times a worker's blocks were read anew.")
        self.index_late_batches = counter(
            "index_late_batches", "Batches of an epoch that was over: ignored."
        )
        self.index_bad_values = counter("index_bad_values", "Values that could not be read.")
        self.route_fetches = counter(
            "route_fetches", "Requests sent with blocks to fetch from another worker."
        )
        self.hot_prefixes_assigned = counter(
            "hot_prefixes_assigned", "Prefixes that a worker was told to fetch ahead of requests."
        )
        self.ttft_estimate_error_seconds = Histogram(
            "xllm_ttft_estimate_error_seconds",
            "Measured time to first token less what was estimated, by worker that is here.",
            ["worker"],
            buckets=_ERROR_BUCKETS_S,
            registry=registry,
        )

    def _declare_etcd_size(self, registry: CollectorRegistry | None) -> None:
        """What a master watches of etcd."""
        self.etcd_db_bytes = Gauge(
            "xllm_etcd_db_bytes",
            "Size of etcd's file, which may not be over the quota.",
            registry=registry,
        )
        self.etcd_db_in_use_bytes = Gauge(
            "xllm_etcd_db_in_use_bytes", "What of it is in use.", registry=registry
        )
        self.etcd_quota_bytes = Gauge(
            "xllm_etcd_quota_bytes", "etcd refuses writes beyond it.", registry=registry
        )
        self.is_leader = Gauge("xllm_is_leader", "1 on the master that leads.", registry=registry)

    def _declare_index_upload(self, registry: CollectorRegistry | None) -> None:
        """What a worker tells the cluster of its blocks."""
        self.index_published_blocks = Gauge(
            "xllm_index_published_blocks",
            "Blocks that the index was told of, counted once per tier.",
            registry=registry,
        )
        self.index_pending_blocks = Gauge(
            "xllm_index_pending_blocks",
            "Blocks of which the index has yet to be told that they came or went.",
            registry=registry,
        )
        self.index_upload_puts = Counter(
            "xllm_index_upload_puts_total", "Writes to etcd for the index.", registry=registry
        )
        self.index_upload_bytes = Counter(
            "xllm_index_upload_bytes_total", "Bytes of these writes.", registry=registry
        )


async def measure_event_loop_lag(metrics: Metrics, *, period_s: float = 0.1) -> None:
    """Feeds `event_loop_lag_seconds` until cancelled: a task of whoever owns the loop."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + period_s
        await asyncio.sleep(period_s)
        metrics.event_loop_lag_seconds.observe(max(0.0, loop.time() - due))
