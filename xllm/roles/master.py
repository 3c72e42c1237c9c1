"""The master role: the public API over every worker that etcd knows.

    startup   ports, with the API answering 503; etcd, which may be an own child; registration
    serve     until cancelled
    stop      no new connections; running requests get `--drain_timeout`; then the lease is given
              back. After /admin/leave, see `departure.py`

Any number of masters serve side by side. One is elected for what must be done once: `leader.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time

import msgspec

from xllm.config import DEFAULT_ETCD_ADDR, EtcdConfig, MasterConfig
from xllm.coordination import EmbeddedEtcd, Keys, Session, ensure_etcd
from xllm.coordination.endpoints import parse_endpoints
from xllm.errors import EtcdUnavailable
from xllm.heap import freeze_heap
from xllm.net import advertised_host, bound_port, join_host_port, listen
from xllm.protocol import MasterId, MasterInfo
from xllm.reload import Reload
from xllm.roles.car_policy import make_router
from xllm.roles.cluster import Cluster
from xllm.roles.cluster_admin import ClusterAdmin
from xllm.roles.cluster_backend import ClusterBackend
from xllm.roles.cost_routing import Targets
from xllm.roles.departure import Departure, Drained
from xllm.roles.global_index import GlobalIndex
from xllm.roles.guards import Guards
from xllm.roles.hot_prefix_duty import HotPrefixDuty
from xllm.roles.http_server import serve
from xllm.roles.openai_api import build_app, make_runner
from xllm.roles.operator import OperatorPort
from xllm.roles.route_port import RoutePort
from xllm.telemetry import Metrics, measure_event_loop_lag
from xllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ETCD_RETRY_S = 1.0


async def run_master(config: MasterConfig, reload: Reload) -> None:
    """Serves until cancelled or drained.

    Raises: ConfigError, EtcdUnavailable.
    """
    try:
        await _serve(config, reload)
    except* Drained:
        logger.info("master_drained")


async def _serve(config: MasterConfig, reload: Reload) -> None:
    keys = Keys(config.etcd.etcd_namespace)
    guards = Guards(config, reload)
    operator_host = guards.operator_host(config)
    metrics = Metrics(engine=False)
    async with contextlib.AsyncExitStack() as stack:
        api_socket = stack.enter_context(
            _listen(config.net.host, config.http_server_port, "http_server_port")
        )
        operator_socket = stack.enter_context(
            _listen(operator_host, config.rpc_server_port, "rpc_server_port")
        )
        endpoints = parse_endpoints(config.etcd.etcd_addr or DEFAULT_ETCD_ADDR)
        host = await advertised_host(config.net, [str(endpoint) for endpoint in endpoints])
        address = join_host_port(host, bound_port(api_socket))
        info = MasterInfo(
            master_id=MasterId(address),
            http_address=address,
            operator_address=join_host_port(
                guards.operator_address_host(operator_host, config.net, host),
                bound_port(operator_socket),
            ),
            started_at=time.time(),
        )
        tokenizer = await _load_tokenizer(config)
        cluster = Cluster(info.master_id, metrics, trust=guards.trust("stream"))
        global_index = GlobalIndex(keys, cluster.registry.answers, metrics)
        cluster.registry.on_gone(global_index.forget)
        router = make_router(
            config.load_balance_policy,
            global_index.index,
            cluster.registry.cache_root,
            time.monotonic,
            Targets(config.routing.target_ttft / 1e3, config.routing.target_tpot / 1e3),
        )
        hot = HotPrefixDuty(global_index.index, router, cluster.registry, metrics, time.monotonic)
        backend = ClusterBackend(
            *(cluster.registry, router, metrics, tokenizer, config.routing), on_sent=hot.observe
        )
        route_port = RoutePort(
            *(backend, config.load_balance_policy, config.api.max_body_size), guards.secret
        )
        admin = ClusterAdmin(
            *(config, keys, info, backend, cluster.registry, global_index.index, metrics),
            hot if config.routing.enable_peer_fetch else None,
            guards.secret,
        )
        departure = Departure(metrics.num_api_requests, config.drain_timeout)
        operator = OperatorPort(
            metrics,
            is_ready=lambda: not departure.is_leaving and bool(backend.model_cards()),
            routes=[*route_port.routes, *admin.routes],
            max_body_bytes=config.api.max_body_size,
            drain=departure.begin,
            drain_path="/admin/leave",
            key=guards.operator_key,
        )
        operator.add_collector(cluster.collect)
        operator.add_collector(global_index.collect)
        operator.add_collector(admin.collect)
        tls = None if guards.tls is None else guards.tls.for_clients()
        await stack.enter_async_context(serve(operator.runner(), operator_socket, tls))

        # What is left last is entered first: the lease outlives the tasks, and these the API.
        etcd_stack = await stack.enter_async_context(contextlib.AsyncExitStack())
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        app = build_app(backend, config.api, metrics, guards.api, lambda: departure.is_leaving)
        runner = make_runner(app, config.drain_timeout)
        await stack.enter_async_context(serve(runner, api_socket, tls))
        tasks.create_task(measure_event_loop_lag(metrics))
        logger.info("master_listening url=%s://%s", "https" if tls else "http", address)

        client, embedded = await ensure_etcd(config.etcd, seal=guards.seal)
        if embedded is not None:
            keeper = _EmbeddedEtcdKeeper(config.etcd, embedded)
            etcd_stack.push_async_callback(keeper.stop)
            tasks.create_task(keeper.run())
        etcd_stack.push_async_callback(client.close)
        session = Session(client, config.etcd.lease_ttl)
        etcd_stack.push_async_callback(session.close)
        session.on_new_epoch(lambda epoch: metrics.lease_epochs.inc())
        operator.add_collector(lambda: metrics.etcd_connected.set(session.alive))
        tasks.create_task(session.run())
        await session.register(keys.master(info.master_id), msgspec.json.encode(info))
        metrics.lease_epochs.inc()
        tasks.create_task(admin.run(session))
        tasks.create_task(backend.fetch_tokenizers(cluster.changed))
        tasks.create_task(global_index.run(client))
        freeze_heap()
        # Not in here: it has to go on until the API has ended.
        tasks.create_task(cluster.follow(client, keys))
        await departure.wait()
        raise Drained


def _listen(host: str, port: int, flag: str) -> contextlib.closing[socket.socket]:
    return contextlib.closing(listen(host, port, flag=flag))


async def _load_tokenizer(config: MasterConfig) -> Tokenizer | None:
    """Raises: ConfigError."""
    if config.tokenizer_path is None:
        return None
    return await asyncio.to_thread(Tokenizer.from_folder, config.tokenizer_path)


class _EmbeddedEtcdKeeper:
    """Replaces an embedded etcd that has ended by a fresh one, in which everybody registers anew:
    requests do not notice."""

    def __init__(self, config: EtcdConfig, etcd: EmbeddedEtcd) -> None:
        self._config = config
        self._etcd: EmbeddedEtcd | None = etcd

    async def run(self) -> None:
        while self._etcd is not None:
            output = await self._etcd.wait()
            logger.error("embedded_etcd_ended output=%r", output[-500:])
            await asyncio.sleep(ETCD_RETRY_S)
            try:
                client, self._etcd = await ensure_etcd(self._config)
            except EtcdUnavailable as error:
                logger.error("embedded_etcd_not_replaced reason=%r", str(error))
            else:
                await client.close()

    async def stop(self) -> None:
        if self._etcd is not None:
            await self._etcd.stop()
