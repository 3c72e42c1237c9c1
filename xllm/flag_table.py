"""Every flag of each role: its meaning, unit and range, grouped by concern.

A flag has the name and the default of its field in `config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xllm.config import (
    DEFAULT_ETCD_ADDR,
    ApiConfig,
    EngineConfig,
    EtcdConfig,
    HostConfig,
    IndexConfig,
    LogConfig,
    MasterConfig,
    RoutingConfig,
    SecurityConfig,
    WorkerConfig,
)
from xllm.flag_types import (
    ADVERTISED_HOST,
    BOOLEAN,
    ETCD_ADDRESSES,
    FILE,
    FOLDER,
    HOST,
    MODEL,
    NAME,
    SIZE,
    TOKENIZER_FOLDER,
    FlagType,
    choice,
    decimal,
    integer,
    pattern,
)
from xllm.telemetry import LOG_FORMATS, LOG_LEVELS

ROLES = ("master", "worker")


@dataclass(frozen=True, slots=True)
class Flag:
    """`config` has a field `name`, which carries the default; None: not part of a config."""

    config: type[Any] | None
    name: str
    type: FlagType
    help: str
    default: str | None = None
    """Shown in `--help` where the field's own default does not tell."""


@dataclass(frozen=True, slots=True)
class Concern:
    title: str
    flags: tuple[Flag, ...]


_PORT = integer("PORT", 0, 65535)
_TOKENS = integer("TOKENS", 1)
_TOKENS_OR_AUTO = integer("TOKENS", 0)

_PROCESS = Concern(
    "process",
    (
        Flag(None, "role", choice(*ROLES), "What this process is.", "required"),
        Flag(None, "flagfile", FILE, "Read more flags from this file, one a line.", "none"),
        Flag(None, "help", BOOLEAN, "Show the flags; with --role, those of one role."),
        Flag(None, "version", BOOLEAN, "Show the version."),
    ),
)

BOTH_CONCERNS: tuple[Concern, ...] = (
    _PROCESS,
    Concern(
        "etcd",
        (
            Flag(
                EtcdConfig,
                "etcd_addr",
                ETCD_ADDRESSES,
                "Where etcd is; with http:// or https:// before it if you like. Without this flag"
                " a master starts an etcd of its own there if none answers.",
                DEFAULT_ETCD_ADDR,
            ),
            Flag(
                EtcdConfig,
                "etcd_namespace",
                pattern("NAME", r"[\w.-]+", "letters, digits, '.', '_' and '-'"),
                "Separates clusters that share an etcd.",
            ),
            Flag(
                EtcdConfig,
                "lease_ttl",
                decimal("SECONDS", 2, 600),
                "A process that is silent for so long is gone.",
            ),
            Flag(
                EtcdConfig,
                "etcd_ca",
                FILE,
                "Authorities that etcd's certificate may come from; turns TLS on.",
                "those that gRPC knows, for https:// addresses",
            ),
            Flag(EtcdConfig, "etcd_cert", FILE, "Our certificate, for etcd; turns TLS on.", "none"),
            Flag(EtcdConfig, "etcd_key", FILE, "The key of --etcd_cert.", "none"),
            Flag(EtcdConfig, "etcd_user", NAME, "For an etcd with authentication.", "none"),
            Flag(
                EtcdConfig,
                "etcd_password_file",
                FILE,
                "The password of --etcd_user.",
                "the environment variable XLLM_ETCD_PASSWORD",
            ),
        ),
    ),
    Concern(
        "addresses",
        (
            Flag(HostConfig, "host", HOST, "The address to bind; 0.0.0.0 is all of them."),
            Flag(
                HostConfig,
                "advertise_host",
                ADVERTISED_HOST,
                "The address that others reach this process at.",
                "--host, or where that is 0.0.0.0 the source address of the route to etcd",
            ),
        ),
    ),
    Concern(
        "log",
        (
            Flag(LogConfig, "log_level", choice(*LOG_LEVELS), "The least level that is written."),
            Flag(LogConfig, "log_format", choice(*LOG_FORMATS), "The form of a line on stderr."),
        ),
    ),
    Concern(
        "limits of the public API (a worker's with --enable_service_routing=false)",
        (
            Flag(
                ApiConfig,
                "max_concurrent_requests",
                integer("REQUESTS", 1),
                "More at once are refused with 429.",
            ),
            Flag(ApiConfig, "max_body_size", SIZE, "A longer request body is refused with 413."),
        ),
    ),
    Concern(
        "who may use the public API",
        (
            Flag(
                ApiConfig,
                "api_keys_file",
                FILE,
                "Lines of NAME:KEY [requests_per_minute=N] [tokens_per_minute=N]; read again on"
                " SIGHUP. Requests need one of the keys, and share cached prefixes only with those"
                " of the same name.",
                "none: everybody may",
            ),
            Flag(
                ApiConfig,
                "share_cache_across_keys",
                BOOLEAN,
                "Let requests of all keys share cached prefixes.",
            ),
            Flag(
                ApiConfig,
                "requests_per_minute",
                integer("REQUESTS", 0, 10**12),
                "Of each key whose line does not say; more get 429. 0: no limit.",
            ),
            Flag(
                ApiConfig,
                "tokens_per_minute",
                integer("TOKENS", 0, 10**12),
                "Likewise, of prompts and answers together.",
            ),
        ),
    ),
    Concern(
        "security (docs/security.md)",
        (
            Flag(
                SecurityConfig,
                "cluster_secret_file",
                FILE,
                "At least 32 characters that all processes of the cluster know, and prove to each"
                " other that they do; and what they write to etcd.",
                "none: whoever reaches a port may speak",
            ),
            Flag(
                SecurityConfig,
                "operator_key_file",
                FILE,
                "The key for the operator port, as in `Authorization: Bearer KEY`; read again on"
                " SIGHUP.",
                "none: the operator port is on loopback only",
            ),
            Flag(
                SecurityConfig,
                "operator_host",
                HOST,
                "The address that the operator port binds.",
                "--host with --operator_key_file, else loopback",
            ),
            Flag(
                SecurityConfig,
                "tls_cert",
                FILE,
                "Certificate, with its chain, of this process on all of its ports; read again on"
                " SIGHUP.",
                "none: no TLS",
            ),
            Flag(SecurityConfig, "tls_key", FILE, "The key of --tls_cert.", "none"),
            Flag(
                SecurityConfig,
                "tls_ca",
                FILE,
                "The authority that signs the certificates of this cluster's processes and of"
                " nobody else: they show them to each other.",
                "none",
            ),
        ),
    ),
)

_INDEX_CONCERN = Concern(
    "the index of all caches, in etcd",
    (
        Flag(
            IndexConfig,
            "max_upload_puts_per_s",
            integer("PUTS", 10),
            "What all workers together may write to etcd, load reports included.",
        ),
        Flag(
            IndexConfig,
            "max_upload_bytes_per_s",
            SIZE,
            "Likewise, in bytes.",
        ),
        Flag(
            IndexConfig,
            "max_index_blocks",
            integer("BLOCKS", 1000),
            "Of more blocks, counted once per worker and tier, the most used are published: each"
            " takes some 250 bytes on every master.",
        ),
        Flag(
            IndexConfig,
            "etcd_compact",
            BOOLEAN,
            "Compact the history of an etcd that no master has started, every 10 s. Without it,"
            " somebody else has to, or etcd fills up.",
        ),
    ),
)

MASTER_CONCERNS: tuple[Concern, ...] = (
    Concern(
        "ports",
        (
            Flag(MasterConfig, "http_server_port", _PORT, "The public API; 0 is any free port."),
            Flag(
                MasterConfig,
                "rpc_server_port",
                _PORT,
                "Health, metrics and administration, for operators; 0 is any free port.",
            ),
        ),
    ),
    Concern(
        "requests",
        (
            Flag(
                MasterConfig,
                "tokenizer_path",
                TOKENIZER_FOLDER,
                "The tokenizer of every model.",
                "obtained from the workers",
            ),
            Flag(
                MasterConfig,
                "load_balance_policy",
                choice("CAR", "RR", "LEAST_LOAD", "SLO_AWARE"),
                "How a worker is picked: the one with the least estimated time to first token, by"
                " the blocks that it holds; in turns; the one with the fewest requests; or CAR"
                " among those that keep the targets, and 429 if nobody does.",
            ),
            Flag(
                RoutingConfig,
                "target_ttft",
                integer("MILLISECONDS", 1, 3_600_000),
                "Time to first token that SLO_AWARE keeps; a request with a priority below 0"
                " waits longer instead of being refused.",
            ),
            Flag(
                RoutingConfig,
                "target_tpot",
                integer("MILLISECONDS", 1, 3_600_000),
                "Time per output token that SLO_AWARE keeps.",
            ),
            Flag(
                RoutingConfig,
                "enable_peer_fetch",
                BOOLEAN,
                "Have workers fetch blocks from each other where that is quicker than computing.",
            ),
            Flag(
                RoutingConfig,
                "max_request_retries",
                integer("TIMES", 0, 100),
                "How often a request goes on elsewhere after its worker was lost.",
            ),
            Flag(
                RoutingConfig,
                "max_queue_time",
                decimal("SECONDS", 0.1, 86400),
                "A request that would wait longer on every worker is refused with 429; some 16"
                " may wait on each in any case.",
            ),
            Flag(
                MasterConfig,
                "drain_timeout",
                decimal("SECONDS", 0, 86400),
                "What running requests get to end after SIGTERM.",
            ),
        ),
    ),
    _INDEX_CONCERN,
)

WORKER_CONCERNS: tuple[Concern, ...] = (
    Concern(
        "model",
        (
            Flag(
                EngineConfig,
                "model",
                MODEL,
                "A Hugging Face folder, or a model on the Hub.",
                "SmolLM2-135M-Instruct, downloaded once",
            ),
            Flag(
                EngineConfig,
                "model_id",
                NAME,
                "What clients call the model.",
                "the folder's name or the Hub id",
            ),
            Flag(
                EngineConfig,
                "device",
                pattern("auto|cpu|cuda[:N]", r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
                "Where it runs; auto is the first GPU, or the CPU.",
            ),
            Flag(
                EngineConfig,
                "dtype",
                choice("auto", "bfloat16", "float32"),
                "Numbers of weights and cache; auto is bfloat16 where the device has it.",
            ),
            Flag(
                EngineConfig,
                "num_threads",
                integer("THREADS", 0, 4096),
                "Threads that compute on a CPU; 0 is one per core.",
            ),
        ),
    ),
    Concern(
        "KV cache",
        (
            Flag(EngineConfig, "block_size", integer("TOKENS", 1, 1024), "Tokens of a block."),
            Flag(
                EngineConfig,
                "max_cache_size",
                SIZE,
                "KV cache on the device, such as 4GiB or 512M. 0: on a CPU the smaller of 4 GiB"
                " and a quarter of the available memory, on a GPU by --max_memory_utilization.",
            ),
            Flag(
                EngineConfig,
                "max_memory_utilization",
                decimal("SHARE", 0.05, 1),
                "Share of a GPU's memory for weights and cache.",
            ),
            Flag(
                EngineConfig,
                "enable_prefix_cache",
                BOOLEAN,
                "Reuse the blocks of earlier prompts with the same beginning.",
            ),
            Flag(
                EngineConfig,
                "host_blocks_factor",
                decimal("FACTOR", 0, 1000),
                "Blocks in host memory for each block on the device; 0 is no host tier.",
                "2 on a GPU, 0 on a CPU, whose device memory is host memory",
            ),
            Flag(
                EngineConfig,
                "host_cache_size",
                SIZE,
                "Host memory for blocks, instead of --host_blocks_factor.",
            ),
            Flag(
                EngineConfig,
                "disk_cache_dir",
                FOLDER,
                "Where blocks outlive the process; one worker a folder.",
                "none: no disk tier",
            ),
            Flag(
                EngineConfig,
                "disk_cache_size",
                SIZE,
                "Disk space for blocks, taken at once and never exceeded.",
            ),
            Flag(
                EngineConfig,
                "disk_write_policy",
                choice("write_through", "write_through_selective", "write_back"),
                "Which blocks go to disk: all; those used a second time; those that host or"
                " device are about to evict.",
            ),
            Flag(
                EngineConfig,
                "eviction_policy",
                choice("lru", "graded"),
                "What host and disk evict: the least recently used, or that with a bonus for"
                " blocks that were used often.",
            ),
            Flag(
                EngineConfig,
                "prefetch_timeout",
                integer("MILLISECONDS", 0, 3_600_000),
                "How long a request waits for blocks from host and disk before it computes what"
                " has not arrived; 0: no longer than computing all of them would take, and tiers"
                " slower than computing are not read.",
            ),
            Flag(
                WorkerConfig,
                "enable_peer_fetch",
                BOOLEAN,
                "Fetch blocks from other workers where that is quicker than computing them, and"
                " serve them theirs.",
            ),
            Flag(
                WorkerConfig,
                "enable_cache_upload",
                BOOLEAN,
                "Tell masters, through etcd, which blocks this worker holds.",
            ),
        ),
    ),
    Concern(
        "batches",
        (
            Flag(
                EngineConfig,
                "max_model_len",
                _TOKENS_OR_AUTO,
                "Longest prompt and output together; 0 is what the model was made for.",
            ),
            Flag(EngineConfig, "max_tokens_per_batch", _TOKENS, "Most tokens of one step."),
            Flag(
                EngineConfig,
                "max_seqs_per_batch",
                integer("SEQUENCES", 1, 65536),
                "Most sequences that run at once.",
            ),
            Flag(
                EngineConfig,
                "max_tokens_per_chunk_for_prefill",
                _TOKENS_OR_AUTO,
                "Most tokens of one prompt in one step; 0 lets the engine choose.",
            ),
            Flag(
                EngineConfig,
                "enable_chunked_prefill",
                BOOLEAN,
                "Compute long prompts in chunks between other requests' tokens.",
            ),
        ),
    ),
    Concern(
        "cluster",
        (
            Flag(
                WorkerConfig,
                "worker_id",
                pattern("NAME", r"[\w.:\[\]-]+", "letters, digits and '._:-[]'"),
                "The name it registers under.",
                "its advertised host:port",
            ),
            Flag(
                WorkerConfig,
                "port",
                _PORT,
                "The token stream, or the public API with --enable_service_routing=false;"
                " 0 is any free port.",
            ),
            Flag(
                WorkerConfig,
                "rpc_server_port",
                _PORT,
                "Health and metrics, for operators; 0 is any free port.",
            ),
            Flag(
                WorkerConfig,
                "block_port",
                _PORT,
                "Where other workers fetch blocks; 0 is any free port.",
            ),
            Flag(
                WorkerConfig,
                "drain_timeout",
                decimal("SECONDS", 0, 86400),
                "What running requests get to end, after SIGTERM or /admin/drain; then they move"
                " to other workers.",
            ),
            Flag(
                WorkerConfig,
                "enable_service_routing",
                BOOLEAN,
                "Serve through masters; false: without etcd, the public API on --port.",
            ),
            Flag(
                WorkerConfig,
                "enable_disagg_pd",
                BOOLEAN,
                "Prefill and decode on different workers: not supported yet.",
            ),
        ),
    ),
)


def role_flags(role: str) -> Iterator[Flag]:
    """The flags that `role` takes, in the order of `--help`."""
    for concern in (*BOTH_CONCERNS, *(MASTER_CONCERNS if role == "master" else WORKER_CONCERNS)):
        yield from concern.flags
