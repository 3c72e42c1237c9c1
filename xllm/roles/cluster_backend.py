"""The public API over the workers that a master knows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from msgspec.structs import replace

from xllm.config import RoutingConfig
from xllm.errors import (
    ConfigError,
    NoWorker,
    Overloaded,
    RequestError,
    UnknownModel,
    WorkerLost,
)
from xllm.protocol import GenerateRequest, ModelCard, TokenDelta, WorkerId, WorkerInfo, WorkerLoad
from xllm.roles.admission import MIN_QUEUED
from xllm.roles.car_policy import MAX_RETRY_AFTER_S, NO_PEERS, CostAware, CostRoute, Peers
from xllm.roles.delta_queue import Listener
from xllm.roles.global_scheduler import Candidate
from xllm.roles.registration import cache_root
from xllm.roles.registry import MemberState, Registry
from xllm.roles.routed_generation import Placed, RoutedGeneration
from xllm.roles.stream_client import StreamRequest, WorkerStream
from xllm.telemetry import Metrics
from xllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

RECONNECT_S = 2.0
"""So long after a connection was lost, new requests wait for it to be made again."""

RECONNECT_POLL_S = 0.05


class ClusterBackend:
    """A `Backend` that routes each request to a worker."""

    def __init__(
        self,
        registry: Registry[WorkerStream],
        router: CostAware,
        metrics: Metrics,
        tokenizer: Tokenizer | None = None,
        limits: RoutingConfig | None = None,
        on_sent: Callable[[GenerateRequest, CostRoute], None] = lambda *_: None,
    ) -> None:
        """Without a `tokenizer` for all models, each model's comes from its workers. `on_sent` is
        told of each attempt."""
        self._on_sent = on_sent
        self._registry = registry
        self._router = router
        self._metrics = metrics
        self._limits = limits or RoutingConfig()
        self._fixed_tokenizer = tokenizer
        self._tokenizers: dict[str, Tokenizer] = {}
        """By fingerprint of the weights."""
        self._fetching = asyncio.Lock()
        registry.on_report(self._report)
        registry.on_gone(self._forget)

    def model_cards(self) -> Sequence[ModelCard]:
        return self._registry.model_cards()

    async def tokenizer(self, model_id: str) -> Tokenizer:
        fingerprint = self._registry.usable(model_id)[0].info.fingerprint
        known = self._fixed_tokenizer or self._tokenizers.get(fingerprint)
        if known is not None:
            return known
        async with self._fetching:
            if fingerprint not in self._tokenizers:
                self._tokenizers[fingerprint] = await self._fetch_tokenizer(model_id)
            return self._tokenizers[fingerprint]

    async def fetch_tokenizers(self, changed: asyncio.Event) -> None:
        """Gets each model's tokenizer when its first worker comes, so that no request waits for
        it; until cancelled. `changed` is set when there may be a new model."""
        while True:
            await changed.wait()
            changed.clear()
            for card in self.model_cards():
                with contextlib.suppress(UnknownModel, NoWorker):
                    await self.tokenizer(card.model_id)

    async def _fetch_tokenizer(self, model_id: str) -> Tokenizer:
        """Raises: UnknownModel, NoWorker."""
        for member in self._registry.usable(model_id):
            worker_id = member.info.worker_id
            assert member.stream is not None
            try:
                files = await member.stream.fetch_tokenizer()
                # Parsing a large vocabulary takes longer than the event loop may be kept.
                tokenizer = await asyncio.to_thread(Tokenizer.from_files, files)
            except (WorkerLost, ConfigError) as error:
                logger.warning("no_tokenizer worker_id=%s reason=%r", worker_id, str(error))
                continue
            logger.info("tokenizer_fetched model_id=%s worker_id=%s", model_id, worker_id)
            return tokenizer
        raise NoWorker("no worker could send the model's tokenizer; try again", retry_after_s=1)

    async def until_reachable(self, model_id: str | None) -> None:
        """After a pause of this process its workers have hung up, and reconnect at once: requests
        that came meanwhile are not refused for it."""
        while self._is_reconnecting(model_id):  # noqa: ASYNC110
            await asyncio.sleep(RECONNECT_POLL_S)

    def _is_reconnecting(self, model_id: str | None) -> bool:
        """Nobody serves the model, but somebody did a moment ago."""
        lost_since = asyncio.get_running_loop().time() - RECONNECT_S
        is_away = False
        for member in self._registry:
            if model_id not in (None, member.model_id) or member.stream is None:
                continue
            if member.state in (MemberState.READY, MemberState.SUSPECT):
                return False
            is_connecting = member.state is MemberState.CONNECTING
            is_away |= is_connecting and member.stream.lost_at > lost_since
        return is_away

    def admit(self, model_id: str) -> None:
        for member in self._registry.usable(model_id):
            if member.stream is not None and member.stream.queue.num_queued < MIN_QUEUED:
                return
        self._admitting(self._registry.candidates(model_id))

    async def prepare(self, request: GenerateRequest) -> None:
        preparation = self._router.preparation(request)
        if preparation is not None:
            await asyncio.to_thread(preparation)

    def generate(self, request: GenerateRequest) -> RoutedGeneration:
        return RoutedGeneration(
            request,
            self._place,
            self._limits.max_request_retries,
            on_move=self._metrics.requests_resubmitted.inc,
            may_wait=self._is_reconnecting(request.model_id),
        )

    def _place(
        self, request: GenerateRequest, listener: Listener, excluded: AbstractSet[WorkerId]
    ) -> Placed:
        """Routes one attempt and sends it.

        Raises: UnknownModel, NoWorker, Overloaded, EngineFault.
        """
        while True:
            candidates = self._registry.candidates(request.model_id, excluded)
            if request.attempt == 0:
                candidates = self._admitting(candidates)
            route = self._router.route(request, candidates, self._peers(request.model_id))
            followed = _Followed(self._router, self._metrics, route, request.n, listener)
            # Each attempt has its own: whoever served blocks to the last one may be gone.
            sent = replace(request, fetch=list(route.fetch)) if route.fetch else request
            try:
                opened = self._registry.stream(route.worker_id).submit(sent, followed.listen)
            except WorkerLost:
                excluded = excluded | {route.worker_id}
                continue
            self._router.dispatched(route)
            self._on_sent(request, route)
            self._metrics.requests_routed.inc()
            if route.fetch:
                self._metrics.route_fetches.inc()
            followed.running = opened
            return Placed(route.worker_id, followed.cancel)

    def explain(self, request: GenerateRequest) -> list[dict[str, Any]]:
        """What every worker would cost that may get the request, who would get it first.

        Raises: UnknownModel, NoWorker, Overloaded.
        """
        candidates = self._admitting(self._registry.candidates(request.model_id))
        return self._router.explain(request, candidates, self._peers(request.model_id))

    def _peers(self, model_id: str) -> Peers:
        if not self._limits.enable_peer_fetch:
            return NO_PEERS
        return self._registry.block_addresses(model_id)

    def _report(self, info: WorkerInfo, load: WorkerLoad, num_unacknowledged: int) -> None:
        self._router.report(cache_root(info), info.worker_id, load, num_unacknowledged)

    def _forget(self, worker_id: WorkerId) -> None:
        self._router.forget(worker_id)
        with contextlib.suppress(KeyError):
            self._metrics.ttft_estimate_error_seconds.remove(worker_id)

    def _admitting(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that would begin a new request soon enough. Raises: Overloaded."""
        limit_s = self._limits.max_queue_time
        now = asyncio.get_running_loop().time()
        admitting, least_s = [], math.inf
        for candidate in candidates:
            queue = self._registry.stream(candidate.worker_id).queue
            if queue.num_queued < MIN_QUEUED:
                admitting.append(candidate)
                continue
            rate = candidate.load.prefill_tokens_per_s if candidate.load is not None else 0.0
            wait_s = queue.wait_s(rate, now)
            if wait_s <= limit_s:
                admitting.append(candidate)
            least_s = min(least_s, wait_s)
        if not admitting:
            raise Overloaded(
                f"a request would wait {least_s:.0f} s on the least busy worker, "
                f"and --max_queue_time is {limit_s:g} s; try again later",
                retry_after_s=min(math.ceil(least_s - limit_s), MAX_RETRY_AFTER_S),
            )
        return admitting


class _Followed:
    """Tells the router what becomes of one attempt, on its way to the listener."""

    __slots__ = (
        "_has_begun",
        "_has_ended",
        "_listener",
        "_metrics",
        "_num_open",
        "_route",
        "_router",
        "running",
    )

    def __init__(
        self,
        router: CostAware,
        metrics: Metrics,
        route: CostRoute,
        num_samples: int,
        listener: Listener,
    ) -> None:
        self._router = router
        self._metrics = metrics
        self._route = route
        self._num_open = num_samples
        self._listener = listener
        self._has_begun = False
        self._has_ended = False
        self.running: StreamRequest | None = None
        """None until it is sent."""

    def listen(self, news: TokenDelta | RequestError) -> None:
        if isinstance(news, RequestError):
            self.end()
        else:
            if not self._has_begun:
                self._has_begun = True
                self._compare()
            if news.finish_reason is not None:
                self._num_open -= 1
                if not self._num_open:
                    self.end()
        self._listener(news)

    def end(self) -> None:
        """Idempotent."""
        if not self._has_ended:
            self._has_ended = True
            self._router.ended(self._route)

    def cancel(self) -> None:
        """Idempotent."""
        self.end()
        if self.running is not None:
            self.running.cancel()

    def _compare(self) -> None:
        outcome = self._router.first_token(self._route)
        if outcome is not None:
            error_s = outcome.measured_s - outcome.estimated_s
            self._metrics.ttft_estimate_error_seconds.labels(outcome.worker_id).observe(error_s)
