"""How full etcd is, as every master watches it: metrics, and a warning at half of the quota.

etcd tells its quota from 3.6 on in its status; before that only among its metrics, which it serves
on the port for clients. Where it does not, its default is assumed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable

import aiohttp

from xllm.coordination import QUOTA_BYTES, EtcdClient, EtcdRefused, EtcdStatus, is_embedded
from xllm.errors import EtcdUnavailable
from xllm.telemetry import Metrics

logger = logging.getLogger(__name__)

PERIOD_S = 10.0
DEFAULT_QUOTA_BYTES = 2 << 30
WARNING_SHARE = 0.5
FETCH_TIMEOUT_S = 2.0

_QUOTA = re.compile(r"^etcd_server_quota_backend_bytes (\S+)$", re.MULTILINE)


class EtcdSize:
    """`status` is the last one; None before the first."""

    def __init__(
        self,
        client: EtcdClient,
        metrics: Metrics,
        fetch_quota: Callable[[EtcdClient], Awaitable[int]] | None = None,
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._fetch_quota = fetch_quota or quota_among_metrics
        self._has_warned = False
        self.status: EtcdStatus | None = None
        self.quota_bytes = 0
        """0: not known yet."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
            except (EtcdUnavailable, EtcdRefused) as error:
                logger.debug("etcd_size_unknown error=%r", str(error))
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> None:
        """Raises: EtcdUnavailable, EtcdRefused."""
        status = await self._client.status()
        if not self.quota_bytes:
            self.quota_bytes = status.quota_bytes or await self._find_quota()
        self.status = status
        self._metrics.etcd_db_bytes.set(status.db_size_bytes)
        self._metrics.etcd_db_in_use_bytes.set(status.db_size_in_use_bytes)
        self._metrics.etcd_quota_bytes.set(self.quota_bytes)
        is_half_full = status.db_size_bytes >= WARNING_SHARE * self.quota_bytes
        if is_half_full and not self._has_warned:
            logger.warning(
                "etcd_filling_up size_bytes=%d quota_bytes=%d reason=%r",
                status.db_size_bytes,
                self.quota_bytes,
                "when it is full, uploads of the index stop: compact and defragment it, or let a "
                "master do the former with --etcd_compact",
            )
        self._has_warned = is_half_full

    async def _find_quota(self) -> int:
        if is_embedded(await self._client.member_names()):
            return QUOTA_BYTES
        return await self._fetch_quota(self._client) or DEFAULT_QUOTA_BYTES


async def quota_among_metrics(client: EtcdClient) -> int:
    """The quota that some endpoint of the cluster has; 0: none tells."""
    timeout = aiohttp.ClientTimeout(total=FETCH_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for url in client.urls:
            try:
                async with session.get(f"{url}/metrics") as response:
                    found = _QUOTA.search(await response.text())
            except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
                continue
            if found is not None:
                return int(float(found[1]))
    return 0
