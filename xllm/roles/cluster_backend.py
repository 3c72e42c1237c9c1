"""The public API over the workers that a master knows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from xllm.errors import ConfigError, NoWorker, UnknownModel, WorkerLost
from xllm.protocol import GenerateRequest, ModelCard, TokenDelta, WorkerId
from xllm.roles.global_scheduler import Policy
from xllm.roles.registry import Registry
from xllm.roles.stream_client import StreamRequest, WorkerStream
from xllm.telemetry import Metrics
from xllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class ClusterBackend:
    """A `Backend` that routes each request to a worker."""

    def __init__(
        self,
        registry: Registry[WorkerStream],
        policy: Policy,
        metrics: Metrics,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Without a `tokenizer` for all models, each model's comes from its workers."""
        self._registry = registry
        self._policy = policy
        self._metrics = metrics
        self._fixed_tokenizer = tokenizer
        self._tokenizers: dict[str, Tokenizer] = {}
        """By fingerprint of the weights."""
        self._fetching = asyncio.Lock()

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

    def generate(self, request: GenerateRequest) -> RoutedGeneration:
        candidates = self._registry.candidates(request.model_id)
        route = self._policy.route(request, candidates)
        opened = self._registry.stream(route.worker_id).submit(request)
        self._metrics.requests_routed.inc()
        return RoutedGeneration(route.worker_id, opened)


class RoutedGeneration:
    """A `Generation` on a worker of the cluster.

    `num_received` is what a second attempt elsewhere would start from: per sample, the output
    tokens that have been passed on.
    """

    def __init__(self, worker_id: WorkerId, opened: StreamRequest) -> None:
        self._worker_id = worker_id
        self._opened = opened
        self.num_received: dict[int, int] = {}

    @property
    def worker_id(self) -> WorkerId:
        return self._worker_id

    async def __aiter__(self) -> AsyncIterator[TokenDelta]:
        async for delta in self._opened:
            received = self.num_received.get(delta.index, 0)
            if delta.offset != received:
                self.cancel()
                raise WorkerLost(
                    f"worker {self._worker_id} skipped tokens {received} to {delta.offset}"
                )
            self.num_received[delta.index] = received + len(delta.token_ids)
            yield delta

    def cancel(self) -> None:
        self._opened.cancel()
