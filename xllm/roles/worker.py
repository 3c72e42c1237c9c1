"""The worker role: an engine, and either masters that use it or a public API of its own.

    startup   ports, so that a taken one ends it at once; etcd; the model; the registration
    serve     until cancelled, drained, fenced by a worker of the same id, or the engine gives up
    drain     no new requests; running ones get `--drain_timeout`, then they move; at last the lease
              is given back

A lease that was lost (a pause, an etcd that came back empty) is replaced by a new one under the
requests that run: they do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from xllm.config import EngineConfig, WorkerConfig
from xllm.coordination import EtcdClient, Keys, Session
from xllm.errors import ConfigError
from xllm.heap import freeze_heap
from xllm.net import advertised_host, bound_port, join_host_port, listen
from xllm.protocol import Epoch, WorkerId, WorkerInfo, WorkerLoad, WorkerState
from xllm.reload import Reload
from xllm.roles.cache_port import CachePort
from xllm.roles.cache_upload import CacheUpload
from xllm.roles.departure import Drained
from xllm.roles.engine_report import EngineReport, StepMetrics
from xllm.roles.guards import Guards
from xllm.roles.http_server import serve
from xllm.roles.local_backend import LocalBackend
from xllm.roles.membership import ETCD_WAIT_S, WorkerMembership, check_peers
from xllm.roles.openai_api import build_app, make_runner
from xllm.roles.operator import OperatorPort
from xllm.roles.stream_server import StreamServer
from xllm.roles.tier_report import block_observers
from xllm.roles.worker_duties import run_duties
from xllm.security.trust import ANYBODY, Trust
from xllm.telemetry import Metrics, measure_event_loop_lag
from xllm.tokenizer import Tokenizer, read_tokenizer_files

if TYPE_CHECKING:
    from xllm.roles.loading import LoadedModel

logger = logging.getLogger(__name__)

HANDOVER_S = 2.0
"""A master looks every half second; then a command goes through etcd, and the blocks follow."""


async def run_worker(config: WorkerConfig, reload: Reload) -> None:
    """Serves until cancelled or drained; drains before it lets a cancellation through.

    Raises: ConfigError (Fenced included), EtcdUnavailable, EngineFault.
    """
    host = config.net.host
    guards = Guards(config, reload)
    with (
        contextlib.closing(listen(host, config.port, flag="port")) as main_socket,
        contextlib.closing(
            listen(guards.operator_host(config), config.rpc_server_port, flag="rpc_server_port")
        ) as operator_socket,
        _listen_for_peers(config) as block_socket,
    ):
        worker = _Worker(config, guards, main_socket, operator_socket, block_socket)
        try:
            async with (
                serve(worker.operator.runner(), operator_socket, worker.client_tls),
                asyncio.TaskGroup() as tasks,
            ):
                tasks.create_task(measure_event_loop_lag(worker.metrics))
                if config.enable_service_routing:
                    await worker.serve_masters(tasks)
                else:
                    await worker.serve_clients(tasks)
        except* Drained:
            logger.info("worker_drained")


def _listen_for_peers(
    config: WorkerConfig,
) -> contextlib.AbstractContextManager[socket.socket | None]:
    """None: there are no peers. Raises: ConfigError."""
    has_peers = config.enable_service_routing and config.enable_peer_fetch
    if not (has_peers and config.engine.enable_prefix_cache):
        return contextlib.nullcontext()
    return contextlib.closing(listen(config.net.host, config.block_port, flag="block_port"))


def _load_model(
    config: EngineConfig,
    metrics: Metrics,
    peer_id: WorkerId | None = None,
    peer_trust: Trust = ANYBODY,
) -> LoadedModel:
    # Torch's threads sleep between its operations: the native kernels have threads of their own.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Only now, because it imports torch: see there.
    from xllm.roles.loading import load_model

    return load_model(config, block_observers(metrics), peer_id, peer_trust)


class _Worker:
    def __init__(
        self,
        config: WorkerConfig,
        guards: Guards,
        main_socket: socket.socket,
        operator_socket: socket.socket,
        block_socket: socket.socket | None,
    ) -> None:
        routed = config.enable_service_routing
        self.config = config
        self.client_tls = None if guards.tls is None else guards.tls.for_clients()
        self._guards = guards
        self.metrics = Metrics(api=not routed, cluster=routed, routing=False)
        self.ready = False
        max_body_bytes = config.api.max_body_size
        self.cache_port = CachePort(max_body_bytes, guards.secret)
        self.operator = OperatorPort(
            self.metrics,
            lambda: self.ready,
            self.cache_port.routes,
            max_body_bytes,
            drain=self._begin_drain if routed else None,
            key=guards.operator_key,
        )
        self._drain_timeout_s = config.drain_timeout
        self._drain_asked_for = asyncio.Event()
        self._main_socket = main_socket
        self._block_socket = block_socket
        """Where peers fetch blocks; None: there are none."""
        # A registration may be written anew while the process stops, when sockets are closed.
        self._port = bound_port(main_socket)
        self._operator_bound = (operator_socket.getsockname()[0], bound_port(operator_socket))
        self._block_port = None if block_socket is None else bound_port(block_socket)

    async def serve_masters(self, tasks: asyncio.TaskGroup) -> None:
        config = self.config
        client = EtcdClient.of(config.etcd, self._guards.seal)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(client.close)
            keys = Keys(config.etcd.etcd_namespace)
            host = await advertised_host(config.net, client.addresses.split(","))
            worker_id = self._worker_id(host)
            await client.connect(ETCD_WAIT_S)
            peer_id = None if self._block_socket is None else worker_id
            trust = self._guards.trust("blocks")
            model = await asyncio.to_thread(
                _load_model, config.engine, self.metrics, peer_id, trust
            )
            session = Session(client, config.etcd.lease_ttl)
            # Warming up takes longer than finding out that it is in vain.
            await check_peers(client, keys, self._info(worker_id, session.epoch, host, model))
            upload = None
            if config.enable_cache_upload:
                upload = CacheUpload(session, keys, worker_id, self.metrics)
                model.engine.cache_news.listener = upload.hear
                self.operator.add_collector(upload.collect)
            report = await stack.enter_async_context(self._run_engine(model, tasks))
            if self._block_socket is not None:
                blocks = model.serve_blocks(worker_id, self._block_socket)
                stack.push_async_callback(asyncio.to_thread, blocks.close)
            tokenizer = await asyncio.to_thread(read_tokenizer_files, model.folder)
            server = StreamServer(
                *(worker_id, session.epoch, model.engine, tokenizer),
                trust=self._guards.trust("stream"),
            )
            await server.start(self._main_socket)
            stack.callback(server.close)
            session.on_new_epoch(server.change_epoch)

            def info(epoch: Epoch) -> WorkerInfo:
                state = WorkerState.DRAINING if server.draining else WorkerState.READY
                return self._info(worker_id, epoch, host, model, state)

            def load(epoch: Epoch) -> WorkerLoad:
                pending = 0 if upload is None else upload.statistics().num_dirty
                return report.load(epoch, server.watermarks(), pending)

            membership = WorkerMembership(session, keys, info, load, self.metrics)
            self.operator.add_collector(membership.collect)
            stack.push_async_callback(session.close)
            tasks.create_task(session.run())
            await membership.join()
            try:
                tasks.create_task(
                    run_duties(
                        *(session, keys, worker_id, membership, upload, model.engine),
                        drain=self._begin_drain,
                    )
                )
                freeze_heap()
                self.ready = True
                logger.info("worker_ready worker_id=%s address=%s", worker_id, self._address(host))
                tasks.create_task(model.engine.wait_closed())
                await self._drain_asked_for.wait()
            finally:
                self.ready = False
                logger.info("worker_draining timeout_s=%g", self._drain_timeout_s)
                server.refuse_new()
                publishing = asyncio.create_task(membership.publish_info())
                handing_over = asyncio.create_task(asyncio.sleep(self._handover_s))
                await server.drain(self._drain_timeout_s)
                await handing_over
                # Requests that still run move now, and not when etcd has answered.
                server.close()
                publishing.cancel()
                await asyncio.gather(publishing, return_exceptions=True)
        raise Drained

    @property
    def _handover_s(self) -> float:
        """From the beginning of a drain: what masters get to have peers fetch what only this worker
        holds. They know that only if it was published."""
        if self._block_socket is None or not self.config.enable_cache_upload:
            return 0.0
        return min(HANDOVER_S, self._drain_timeout_s)

    def _begin_drain(self, timeout_s: float | None) -> float:
        """Returns the seconds that running requests get."""
        if timeout_s is not None:
            self._drain_timeout_s = timeout_s
        self._drain_asked_for.set()
        return self._drain_timeout_s

    async def serve_clients(self, tasks: asyncio.TaskGroup) -> None:
        """The public API over the own engine; it answers 503 until the model is loaded."""
        config = self.config
        host = config.net.advertise_host or config.net.host
        backend = LocalBackend(self._worker_id(host))
        app = build_app(backend, config.api, self.metrics, self._guards.api)
        async with contextlib.AsyncExitStack() as stack:
            # The engine outlives the API, whose shutdown lets running requests end.
            engine_stack = await stack.enter_async_context(contextlib.AsyncExitStack())
            await stack.enter_async_context(
                serve(make_runner(app), self._main_socket, self.client_tls)
            )
            model = await asyncio.to_thread(_load_model, config.engine, self.metrics)
            await engine_stack.enter_async_context(self._run_engine(model, tasks))
            tokenizer = await asyncio.to_thread(Tokenizer.from_folder, model.folder)
            backend.open(model.card, model.engine, tokenizer)
            freeze_heap()
            self.ready = True
            scheme = "http" if self.client_tls is None else "https"
            logger.info("worker_ready url=%s://%s", scheme, self._address(host))
            await model.engine.wait_closed()

    @asynccontextmanager
    async def _run_engine(
        self, model: LoadedModel, tasks: asyncio.TaskGroup
    ) -> AsyncIterator[EngineReport]:
        engine = model.engine
        report = EngineReport(engine, self.metrics)
        engine.observer = StepMetrics(self.metrics)
        # Cancelled in here, the process ends without waiting for a step of the warm-up.
        await engine.start()
        try:
            self.operator.add_collector(report.collect)
            tasks.create_task(report.log_status())
            self.cache_port.open(engine, model.card, partial(Tokenizer.from_folder, model.folder))
            yield report
        finally:
            await engine.stop()

    def _address(self, host: str) -> str:
        return join_host_port(host, self._port)

    def _operator_address(self, host: str) -> str:
        bound_host, port = self._operator_bound
        return join_host_port(
            self._guards.operator_address_host(bound_host, self.config.net, host), port
        )

    def _worker_id(self, host: str) -> WorkerId:
        worker_id = self.config.worker_id or self._address(host)
        if not worker_id.isprintable() or "/" in worker_id or " " in worker_id:
            raise ConfigError(f"--worker_id={worker_id}: expected a name without '/' and spaces")
        return WorkerId(worker_id)

    def _info(
        self,
        worker_id: WorkerId,
        epoch: Epoch,
        host: str,
        model: LoadedModel,
        state: WorkerState = WorkerState.READY,
    ) -> WorkerInfo:
        runner = model.runner
        return WorkerInfo(
            worker_id=worker_id,
            epoch=epoch,
            address=self._address(host),
            operator_address=self._operator_address(host),
            block_address=(
                "" if self._block_port is None else join_host_port(host, self._block_port)
            ),
            model=model.card,
            fingerprint=runner.fingerprint,
            block_size=runner.block_size,
            kv_dtype=runner.kv_dtype,
            device_blocks=runner.num_blocks,
            block_bytes=runner.block_bytes,
            state=state,
            started_at=float(model.card.created),
        )
