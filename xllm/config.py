"""What a process was asked to be: frozen, one dataclass per concern.

`flags.py` turns a command line into a `MasterConfig` or a `WorkerConfig`; nothing here is read
from the environment, and nothing changes after start-up. A field has the name of its flag.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DEFAULT_ETCD_ADDR = "127.0.0.1:2379"
DEFAULT_NAMESPACE = "default"
TOOL_CALL_PARSERS = ("hermes", "llama3_json", "pythonic")
REASONING_PARSERS = ("qwen3", "deepseek-r1", "deepseek_r1")
"""The last two are one: vLLM's spelling, and SGLang's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdConfig:
    etcd_addr: str | None = None
    """Comma-separated `host:port`, `http://…` or `https://…`; None: the default address, where a
    master starts an embedded etcd if none answers."""
    etcd_namespace: str = DEFAULT_NAMESPACE
    lease_ttl: float = 5.0
    """Seconds until a silent process is gone."""
    etcd_ca: str | None = None
    """Whose certificate etcd must have; None: a public authority's, where the address is https."""
    etcd_cert: str | None = None
    """Ours, for an etcd that asks for one; `etcd_key` goes with it."""
    etcd_key: str | None = None
    etcd_user: str | None = None
    etcd_password_file: str | None = None
    """None: the password is in the environment, as `XLLM_ETCD_PASSWORD`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    host: str = "127.0.0.1"
    """What to bind."""
    advertise_host: str | None = None
    """What to register; None: the source address of the route to etcd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    log_level: str = "info"
    log_format: str = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceConfig:
    otlp_endpoint: str | None = None
    """Base URL of a collector that takes OTLP over HTTP; None: no traces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """The public HTTP API, in whichever role serves it."""

    max_concurrent_requests: int = 1024
    max_body_size: int = 16 << 20
    """Bytes."""
    api_keys_file: str | None = None
    """None: everybody may use the API."""
    share_cache_across_keys: bool = False
    requests_per_minute: int = 0
    """Of each API key whose line does not say; 0: no limit. Likewise the next."""
    tokens_per_minute: int = 0
    tool_call_parser: str = "auto"
    """How models write calls of tools; auto: by their chat templates."""
    reasoning_parser: str = "none"
    """How models write what they think before they answer; none: it is part of the answer."""
    cors_allow_origins: str = ""
    """Comma-separated origins whose pages may use the API, or `*`; empty: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """What processes and operators prove to each other. Files are paths."""

    cluster_secret_file: str | None = None
    operator_key_file: str | None = None
    operator_host: str | None = None
    """What the operator port binds; None: `host` with an operator key, else loopback."""
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    """Who signs the certificates of this cluster's processes, and of nobody else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """What a master does for a request beyond naming a policy."""

    max_request_retries: int = 2
    """How many workers may be lost under a request until it is given up."""
    max_queue_time: float = 3.0
    """Seconds that a new request may have to wait on the least busy worker."""
    target_ttft: int = 2000
    """Milliseconds to the first token, which SLO_AWARE keeps or refuses."""
    target_tpot: int = 100
    """Milliseconds per output token, likewise."""
    enable_peer_fetch: bool = True
    """Tell workers what they had better get from each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """What the leader allows workers and itself in etcd."""

    max_upload_puts_per_s: int = 1000
    """Of all workers together, load reports included."""
    max_upload_bytes_per_s: int = 10_000_000
    max_index_blocks: int = 4_000_000
    """Of all workers together, counted once per worker and tier: what each master has memory for.
    """
    etcd_compact: bool = False
    """Compact an etcd that is not our own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterConfig:
    etcd: EtcdConfig = field(default_factory=EtcdConfig)
    net: HostConfig = field(default_factory=HostConfig)
    log: LogConfig = field(default_factory=LogConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    http_server_port: int = 8888
    rpc_server_port: int = 8889
    """Operators: health, metrics, admin. On loopback unless `--host` says otherwise."""
    tokenizer_path: str | None = None
    """None: obtained from the workers."""
    load_balance_policy: str = "CAR"
    drain_timeout: float = 3.0
    """Seconds that running requests get to end on a master that leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The engine of a worker: the model, its device, and how much of it to use."""

    model: str | None = None
    """A Hugging Face folder or a Hub id; None: the default model."""
    model_id: str | None = None
    """The name clients ask for; None: the folder's name."""
    device: str = "auto"
    dtype: str = "auto"
    block_size: int = 32
    """Tokens per block."""
    max_cache_size: int = 0
    """Bytes of device KV cache; 0: from what is available."""
    max_memory_utilization: float = 0.9
    """Share of the GPU's memory for weights and cache."""
    max_model_len: int = 0
    """Tokens of prompt plus output; 0: what the model was trained for."""
    max_tokens_per_batch: int = 2048
    max_seqs_per_batch: int = 64
    max_tokens_per_chunk_for_prefill: int = 0
    """0: the engine chooses."""
    enable_chunked_prefill: bool = True
    enable_prefix_cache: bool = True
    host_blocks_factor: float | None = None
    """Blocks of the host tier for each block of the device; None: 2 on a GPU, 0 on a CPU."""
    host_cache_size: int = 0
    """Bytes of the host tier; 0: by `host_blocks_factor`."""
    disk_cache_dir: str | None = None
    """None: no disk tier."""
    disk_cache_size: int = 0
    """Bytes of the disk tier's file."""
    disk_write_policy: str = "write_through_selective"
    eviction_policy: str = "graded"
    """Of host and disk."""
    prefetch_timeout: int = 0
    """Milliseconds; 0: what computing the same tokens would take."""
    num_threads: int = 0
    """Of a CPU worker; 0: the machine's cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """A pool of blocks on Mooncake Store, shared by the workers of a cluster."""

    enable_kvcache_store: bool = False
    store_protocol: str = "tcp"
    store_master_server_address: str | None = None
    """host:port of the `mooncake_master`; required with the store."""
    store_metadata_server: str = "P2PHANDSHAKE"
    store_local_hostname: str | None = None
    """None: the advertised host."""
    store_segment_size: int = 0
    """Bytes of this machine's memory that the worker lends to the pool."""
    store_replica_num: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    etcd: EtcdConfig = field(default_factory=EtcdConfig)
    net: HostConfig = field(default_factory=HostConfig)
    log: LogConfig = field(default_factory=LogConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    worker_id: str | None = None
    """None: advertised host:port."""
    port: int = 8010
    """Token stream; with `enable_service_routing` false, the public API."""
    rpc_server_port: int = 0
    """Operators: health and metrics; 0: any free port, which is logged and registered."""
    enable_peer_fetch: bool = True
    """Fetch blocks from other workers and serve them; only with masters, who know who has what."""
    block_port: int = 0
    """Where peers fetch blocks; 0: any free port, which is registered."""
    drain_timeout: float = 3.0
    """Seconds that running requests get to end on a worker that leaves; then they move."""
    enable_cache_upload: bool = False
    enable_service_routing: bool = True
    enable_disagg_pd: bool = False
