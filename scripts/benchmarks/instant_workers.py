"""Workers that answer at once with one token: what is left to measure is the master."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from xllm.cache.block_hash import hash_blocks
from xllm.cache.block_pool import BlockEvent, BlockEventKind
from xllm.cache.event_codec import TierCode
from xllm.cache.upload import IndexUploader
from xllm.cache.upload_budget import Share
from xllm.cache.upload_plan import UploadPlan
from xllm.coordination import EtcdClient, Keys, Session
from xllm.protocol import (
    Epoch,
    FinishReason,
    GenerateRequest,
    ModelCard,
    PrefillCost,
    TokenDelta,
    TokenizerFiles,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
)
from xllm.roles.delta_queue import Listener
from xllm.roles.membership import WorkerMembership
from xllm.roles.registration import cache_root
from xllm.roles.stream_server import StreamServer
from xllm.telemetry import Metrics

BLOCK_SIZE = 32


class _Answered:
    def cancel(self) -> None:
        """Too late."""


class _InstantEngine:
    step_counter = 0

    def submit(self, request: GenerateRequest, listener: Listener) -> _Answered:
        delta = TokenDelta(
            request_id=request.request_id,
            attempt=request.attempt,
            index=0,
            offset=0,
            token_ids=[100],
            finish_reason=FinishReason.LENGTH,
        )
        asyncio.get_running_loop().call_soon(listener, delta)
        return _Answered()


class InstantWorker:
    """All of a worker but its engine: registration, stream, load and index."""

    def __init__(
        self, client: EtcdClient, keys: Keys, number: int, card: ModelCard, files: TokenizerFiles
    ) -> None:
        self._card = card
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        worker_id = WorkerId(self._address)
        self._session = Session(client, 5.0)
        self._server = StreamServer(worker_id, self._session.epoch, _InstantEngine(), files)
        self._membership = WorkerMembership(self._session, keys, self._info, self._load, Metrics())
        plan = UploadPlan(Share(puts_per_s=100, bytes_per_s=1e6), random.Random(number))
        self._uploader = IndexUploader(self._session, keys, worker_id, plan)

    def hold(self, prompts: Sequence[Sequence[int]]) -> None:
        """As if it had computed them."""
        root = cache_root(self._info(self._session.epoch)).hash()
        for token_ids in prompts:
            names = hash_blocks(root, token_ids, BLOCK_SIZE)
            events = [BlockEvent(BlockEventKind.STORED, name) for name in names]
            self._uploader.record(TierCode.DEVICE, events)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self._server.start(self._socket)
        tasks = [asyncio.create_task(self._session.run())]
        await self._membership.join()
        tasks += [
            asyncio.create_task(self._membership.publish_load()),
            asyncio.create_task(self._uploader.run()),
        ]
        try:
            yield
        finally:
            self._server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _info(self, epoch: Epoch) -> WorkerInfo:
        return WorkerInfo(
            worker_id=WorkerId(self._address),
            epoch=epoch,
            address=self._address,
            operator_address="",
            model=self._card,
            fingerprint="instant",
            block_size=BLOCK_SIZE,
            kv_dtype="bfloat16",
            device_blocks=1000,
            block_bytes=1,
        )

    def _load(self, epoch: Epoch) -> WorkerLoad:
        return WorkerLoad(
            epoch=epoch,
            prefill_tokens_per_s=1000.0,
            prefill_cost=PrefillCost(0.01, 1e-3, 1e-7),
            watermarks=self._server.watermarks(),
        )


@asynccontextmanager
async def instant_workers(
    client: EtcdClient, count: int, card: ModelCard, files: TokenizerFiles
) -> AsyncIterator[list[InstantWorker]]:
    """So many, of one model."""
    keys = Keys("default")
    async with AsyncExitStack() as stack:
        workers = [InstantWorker(client, keys, i, card, files) for i in range(count)]
        for worker in workers:
            await stack.enter_async_context(worker.running())
        yield workers
