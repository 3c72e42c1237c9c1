"""A worker's presence in etcd: its registration and its load, on one lease."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from xllm.coordination import EtcdClient, Keys, Session
from xllm.errors import ConfigError
from xllm.protocol import Epoch, WorkerInfo, WorkerLoad
from xllm.roles.registration import find_conflict
from xllm.telemetry import Metrics

logger = logging.getLogger(__name__)

ETCD_WAIT_S = 30.0
LOAD_PERIOD_S = 1.0


async def check_peers(client: EtcdClient, keys: Keys, info: WorkerInfo) -> None:
    """Raises: ConfigError if a worker of the same model is registered that does not go with
    `info`; EtcdUnavailable."""
    # Loading a model takes a while, in which etcd may have been restarted.
    await client.connect(ETCD_WAIT_S)
    snapshot = await client.range(keys.workers)
    conflict = find_conflict(info, snapshot.kvs)
    if conflict:
        raise ConfigError(conflict)


class WorkerMembership:
    """Keeps `workers/{id}` and `load/{id}`, under whatever epoch the session is in."""

    def __init__(
        self,
        session: Session,
        keys: Keys,
        make_info: Callable[[Epoch], WorkerInfo],
        make_load: Callable[[Epoch], WorkerLoad],
        metrics: Metrics,
    ) -> None:
        self._session = session
        self._keys = keys
        self._make_info = make_info
        self._make_load = make_load
        self._metrics = metrics
        self.load_period_s = LOAD_PERIOD_S
        """Between two load reports, at least."""
        session.on_new_epoch(self._count_epoch)

    async def join(self) -> None:
        """Registers, unless the worker cannot serve its model beside those that do.

        Raises: ConfigError, Fenced, EtcdUnavailable.
        """
        info = self._make_info(self._session.epoch)
        client = self._session.client
        await check_peers(client, self._keys, info)
        await self._session.register(
            self._keys.worker(info.worker_id), self._encode_info, exclusive=True
        )
        # Another one may have registered at the same time.
        await check_peers(client, self._keys, info)
        await self._session.register(self._keys.load_of(info.worker_id), self._encode_load)
        self._metrics.lease_epochs.inc()

    async def publish_info(self) -> None:
        """Writes the registration again, because it has changed."""
        key = self._keys.worker(self._make_info(self._session.epoch).worker_id)
        await self._session.update(key, self._encode_info)

    async def publish_load(self) -> None:
        """Writes the load when it has changed, at most once per period, until cancelled."""
        info = self._make_info(self._session.epoch)
        published = b""
        while True:
            await asyncio.sleep(self.load_period_s)
            load = self._encode_load(self._session.epoch)
            if load != published:
                published = load
                await self._session.update(self._keys.load_of(info.worker_id), self._encode_load)

    def collect(self) -> None:
        self._metrics.etcd_connected.set(self._session.alive)

    def _encode_info(self, epoch: Epoch) -> bytes:
        return msgspec.json.encode(self._make_info(epoch))

    def _encode_load(self, epoch: Epoch) -> bytes:
        return msgspec.json.encode(self._make_load(epoch))

    def _count_epoch(self, epoch: Epoch) -> None:
        self._metrics.lease_epochs.inc()
        logger.warning("registering_anew epoch=%x reason='the lease was lost'", epoch)
