"""What a master does beside requests: operators' questions, and the leader's duties if it leads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

from xllm.cache.index import CacheIndex
from xllm.config import MasterConfig
from xllm.coordination import Election, EtcdRefused, Keys, Session
from xllm.errors import EtcdUnavailable
from xllm.protocol import LeaderWord, MasterInfo
from xllm.roles.cluster_backend import ClusterBackend
from xllm.roles.cluster_port import ClusterPort
from xllm.roles.cluster_view import (
    describe_etcd,
    describe_masters,
    describe_workers,
    upload_needs,
)
from xllm.roles.command_desk import CommandDesk
from xllm.roles.etcd_size import EtcdSize
from xllm.roles.hot_prefix_duty import HotPrefixDuty
from xllm.roles.leader import Leader
from xllm.roles.leader_word import decode_word, encode_word
from xllm.roles.registration import decode_master
from xllm.roles.registry import Registry
from xllm.roles.stream_client import WorkerStream
from xllm.security.secret import ClusterSecret
from xllm.telemetry import Metrics


class ClusterAdmin:
    """`routes` are for the operator port; `run` begins when etcd was found."""

    def __init__(
        self,
        config: MasterConfig,
        keys: Keys,
        info: MasterInfo,
        backend: ClusterBackend,
        registry: Registry[WorkerStream],
        index: CacheIndex,
        metrics: Metrics,
        hot: HotPrefixDuty | None = None,
        secret: ClusterSecret | None = None,
        serving: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """`hot`: what a leader does about prefixes that many want; None: nothing. `serving`: how
        this master has served lately."""
        self._serving = serving
        self._hot = hot
        self._config = config
        self._keys = keys
        self._info = info
        self._registry = registry
        self._index = index
        self._metrics = metrics
        self._port = ClusterPort(
            backend, registry, index, self._describe, config.api.max_body_size, secret
        )
        self._session: Session | None = None
        self._election: Election | None = None
        self._size: EtcdSize | None = None

    @property
    def routes(self) -> list[web.RouteDef]:
        return self._port.routes

    async def run(
        self, session: Session, extend: Callable[[LeaderWord], LeaderWord] = lambda word: word
    ) -> None:
        """Wants to lead, until cancelled. `extend`: see `Leader`."""
        client, keys, master_id = session.client, self._keys, self._info.master_id
        value = encode_word(LeaderWord(master_id=master_id))
        self._session = session
        self._election = election = Election(session, keys.leader, value)
        self._size = EtcdSize(client, self._metrics)
        desk = CommandDesk(client, keys, master_id)
        self._port.open(desk)
        leader = Leader(
            election,
            client,
            keys,
            master_id,
            self._config.index,
            lambda: upload_needs(self._registry),
            time.monotonic,
            extend,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(election.run())
            tasks.create_task(leader.run())
            tasks.create_task(self._size.run())
            if self._hot is not None:
                tasks.create_task(self._hot.run(desk, lambda: election.is_leader))

    def collect(self) -> None:
        """Brings the metrics up to date."""
        self._metrics.is_leader.set(self._election is not None and self._election.is_leader)

    async def _describe(self) -> dict[str, Any]:
        return self.describe(await self.masters())

    def describe(self, masters: Sequence[MasterInfo]) -> dict[str, Any]:
        """The answer of GET /admin/cluster, as far as it is known if etcd does not answer."""
        session, size = self._session, self._size
        value = None if self._election is None else self._election.leader
        word = None if value is None else decode_word(value)
        leader = None if word is None else word.master_id
        return {
            "namespace": self._keys.namespace,
            "answered_by": self._info.master_id,
            "leader": leader,
            "etcd": describe_etcd(
                None if size is None else size.status,
                0 if size is None else size.quota_bytes,
                session is not None and session.alive,
            ),
            "masters": describe_masters(masters, leader),
            "workers": describe_workers(self._registry, self._index, word),
            "serving": self._serving(),
        }

    async def masters(self) -> list[MasterInfo]:
        """All that are registered; this one alone, if etcd does not answer."""
        if self._session is None:
            return [self._info]
        try:
            snapshot = await self._session.client.range(self._keys.masters)
        except (EtcdUnavailable, EtcdRefused):
            return [self._info]
        found = [decode_master(kv) for kv in snapshot.kvs]
        return [master for master in found if master is not None]
