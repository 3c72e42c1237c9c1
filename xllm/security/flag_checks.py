"""Flags of this concern that only work together, or would not do what they seem to."""

from __future__ import annotations

from collections.abc import Iterator

from xllm.config import ApiConfig, EtcdConfig, MasterConfig, SecurityConfig, WorkerConfig
from xllm.errors import ConfigError
from xllm.net import is_loopback


def check_security(config: MasterConfig | WorkerConfig) -> None:
    """Raises: ConfigError."""
    is_routed = isinstance(config, MasterConfig) or config.enable_service_routing
    has_api = isinstance(config, MasterConfig) or not config.enable_service_routing
    problems = (
        *_api_problems(config.api, has_api),
        *_process_problems(config.security, is_routed),
        *_etcd_problems(config.etcd),
    )
    if problems:
        raise ConfigError(problems[0])


def _api_problems(api: ApiConfig, has_api: bool) -> Iterator[str]:
    if api.api_keys_file is not None and not has_api:
        yield "--api_keys_file: this worker has no public API; give it to the masters"
    dependent = {
        "share_cache_across_keys": api.share_cache_across_keys,
        "requests_per_minute": api.requests_per_minute,
        "tokens_per_minute": api.tokens_per_minute,
    }
    for name, value in dependent.items():
        if value and api.api_keys_file is None:
            yield f"--{name}: is about API keys; say with --api_keys_file which there are"


def _process_problems(security: SecurityConfig, is_routed: bool) -> Iterator[str]:
    host = security.operator_host
    if host is not None and not is_loopback(host) and security.operator_key_file is None:
        yield (
            f"--operator_host={host}: whoever reaches that port may drain and clear; give it a key"
            " with --operator_key_file, or bind loopback"
        )
    if (security.tls_cert is None) != (security.tls_key is None):
        yield "--tls_cert and --tls_key: one is of no use without the other"
    if security.tls_ca is not None and security.tls_cert is None:
        yield "--tls_ca: processes also need certificates of their own: --tls_cert and --tls_key"
    if security.tls_cert is not None and security.tls_ca is None and is_routed:
        yield (
            "--tls_cert: say with --tls_ca which authority signs the certificates of the other"
            " processes"
        )


def _etcd_problems(etcd: EtcdConfig) -> Iterator[str]:
    if (etcd.etcd_cert is None) != (etcd.etcd_key is None):
        yield "--etcd_cert and --etcd_key: one is of no use without the other"
    if etcd.etcd_password_file is not None and etcd.etcd_user is None:
        yield "--etcd_password_file: say with --etcd_user whose password it is"
    for name in ("etcd_ca", "etcd_cert", "etcd_user"):
        if getattr(etcd, name) is not None and etcd.etcd_addr is None:
            yield f"--{name}: say with --etcd_addr where that etcd is"
    has_tls = etcd.etcd_ca is not None or etcd.etcd_cert is not None
    if has_tls and "http://" in (etcd.etcd_addr or ""):
        yield f"--etcd_addr={etcd.etcd_addr}: is without TLS, and there are certificates for it"
