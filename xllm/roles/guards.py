"""What one process proves and checks, made from its flags, and what of it SIGHUP reads again."""

from __future__ import annotations

import logging
import time

from xllm.config import HostConfig, MasterConfig, WorkerConfig
from xllm.net import is_loopback
from xllm.reload import Reload
from xllm.roles.api.auth import Authenticator
from xllm.security.api_keys import ApiKeys
from xllm.security.files import read_private_line
from xllm.security.operator_key import OperatorKey
from xllm.security.rate_limit import RateLimits
from xllm.security.seal import Seal
from xllm.security.secret import MIN_SECRET_CHARS, ClusterSecret
from xllm.security.tls import Tls
from xllm.security.trust import Trust

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


class Guards:
    """What has no flag is None, or lets everybody through."""

    def __init__(self, config: MasterConfig | WorkerConfig, reload: Reload) -> None:
        """Raises: ConfigError for a file that cannot be used."""
        security = config.security
        self.secret = _read_secret(security.cluster_secret_file)
        self.seal = Seal(self.secret)
        self.tls = Tls.of(security)
        self.operator_key: OperatorKey | None = None
        self.api: Authenticator | None = None
        if self.tls is not None:
            reload.add("tls_cert", self.tls.reload)
        if security.operator_key_file is not None:
            self.operator_key = OperatorKey(security.operator_key_file)
            reload.add("operator_key", self.operator_key.reload)
        if config.api.api_keys_file is not None:
            limits = RateLimits(config.api.requests_per_minute, config.api.tokens_per_minute)
            keys = ApiKeys(config.api.api_keys_file, limits, time.monotonic)
            reload.add("api_keys", keys.reload)
            salts = None
            if not config.api.share_cache_across_keys:
                salts = self.secret or ClusterSecret("")
            self.api = Authenticator(keys, salts)
            logger.info("api_keys_read num_keys=%d", keys.num_keys)
        if self.secret is not None and self.tls is None:
            logger.warning(
                "no_tls reason='--cluster_secret_file keeps strangers out, but whoever is on the"
                " path between processes can read and change what they say: see --tls_cert'"
            )

    def trust(self, purpose: str) -> Trust:
        """What connections of one kind ask of each other."""
        return Trust.of(self.secret, self.tls, purpose)

    def operator_host(self, config: MasterConfig | WorkerConfig) -> str:
        """What the operator port binds."""
        net = config.net
        if config.security.operator_host is not None:
            return config.security.operator_host
        if self.operator_key is not None or is_loopback(net.host):
            return net.host
        logger.warning(
            "operator_port_on_loopback host=%s reason='no --operator_key_file: nobody else may'",
            LOOPBACK,
        )
        return LOOPBACK

    def operator_address_host(self, bound: str, net: HostConfig, advertised: str) -> str:
        """Under which host the operator port is registered; `bound`: `operator_host`."""
        return advertised if bound == net.host else bound


def _read_secret(path: str | None) -> ClusterSecret | None:
    if path is None:
        return None
    return ClusterSecret(read_private_line(path, "cluster_secret_file", MIN_SECRET_CHARS))
