"""What a process counts and measures of itself, for the operator port's `/metrics`.

Every metric that xllm has is declared in `Metrics`; where vLLM has one of the same meaning, it has
vLLM's name after the prefix. Label values come from small closed sets; where one is known
beforehand, it is there with 0 from the start, so that the first increase is seen.
"""

from __future__ import annotations

import asyncio

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
from xllm.errors import REQUEST_ERRORS
from xllm.protocol import TIER_NAMES, FinishReason

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    *(2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0),
)
_LAG_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)
_ERROR_BUCKETS_S = (-4.0, -1.0, -0.25, -0.1, -0.025, 0.0, 0.025, 0.1, 0.25, 1.0, 4.0)
_BLOCK_AGE_BUCKETS_S = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_SAMPLE_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_ROUTE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)
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
        for label in REQUEST_ERRORS:
            self.request_errors.labels(label)
        for reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.request_success.labels(reason.value)
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
        self.request_time_per_output_token_seconds = Histogram(
            "xllm_request_time_per_output_token_seconds",
            "Mean gap between the tokens of each sample that has two.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.request_cached_tokens = Counter(
            "xllm_request_cached_tokens_total",
            "Prompt tokens that were not computed, by the tier that had them.",
            ["tier"],
            registry=registry,
        )
        for tier in TIER_NAMES:
            self.request_cached_tokens.labels(tier)
        self.tokenizer_cached_tokens = Counter(
            "xllm_tokenizer_cached_tokens_total",
            "Prompt tokens that were not tokenized, because an earlier prompt had the same text.",
            registry=registry,
        )
        self.request_params_n = Histogram(
            "xllm_request_params_n",
            "Samples asked for by each request.",
            buckets=_SAMPLE_BUCKETS,
            registry=registry,
        )
        self.request_params_max_tokens = Histogram(
            "xllm_request_params_max_tokens",
            "Output tokens that each request allows.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.http_requests = Counter(
            "xllm_http_requests_total",
            "Answers of the public API; paths that it does not have are `other`.",
            ["handler", "status"],
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
            "Request submitted to first scheduled, loading its blocks included.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.request_load_time_seconds = Histogram(
            "xllm_request_load_time_seconds",
            "Bringing up the blocks of requests that had some below the device.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.request_prefill_time_seconds = Histogram(
            "xllm_request_prefill_time_seconds",
            "First scheduled to first token.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.request_decode_time_seconds = Histogram(
            "xllm_request_decode_time_seconds",
            "First token to last.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.request_inference_time_seconds = Histogram(
            "xllm_request_inference_time_seconds",
            "First scheduled to last token.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.request_prefill_kv_computed_tokens = Histogram(
            "xllm_request_prefill_kv_computed_tokens",
            "Prompt tokens that were computed for each request.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.cache_config = Info(
            "xllm_cache_config", "Sizes that do not change while it runs.", registry=registry
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
        self.tier_queries = counter(
            "tier_queries", "Prompt tokens that no faster tier had, so that it was asked.", "tier"
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
        for reason in ("unanswered", "absent", "corrupt", "full", "failed"):
            self.store_failures.labels(reason)
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
        for tier in TIER_NAMES:
            self.tier_queries.labels(tier)
            self.tier_hits.labels(tier)
            self.peer_served_blocks.labels(tier)
            self.peer_served_bytes.labels(tier)
            if tier != TIER_NAMES[0]:
                self.tier_promotions.labels(tier)
                self.tier_transfer_bytes.labels(f"from_{tier}")
                self.tier_transfer_seconds.labels(f"from_{tier}")
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
        self.route_decisions = Counter(
            "xllm_route_decisions_total",
            "Attempts routed: what the chosen worker has or gets of the prompt, or `refused`.",
            ["policy", "outcome"],
            registry=registry,
        )
        self.route_matched_blocks = Counter(
            "xllm_route_matched_blocks_total",
            "Blocks of prompts that the chosen worker was known to hold, by tier.",
            ["tier"],
            registry=registry,
        )
        for tier in TIER_NAMES:
            self.route_matched_blocks.labels(tier)
        self.route_seconds = Histogram(
            "xllm_route_seconds",
            "What choosing a worker took.",
            buckets=_ROUTE_BUCKETS_S,
            registry=registry,
        )
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
