"""From the flags of a worker to an engine with its model in memory.

Importing this module imports torch, which takes seconds; all of it blocks. A worker does both on a
thread, after it has bound its ports.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xllm.cache.block_pool import BlockObserver
from xllm.cache.peer_server import PeerServer
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory, check_memory, peer_layout
from xllm.engine.runner import Runner
from xllm.engine.weights import weight_files
from xllm.model_store import default_model_id, resolve_model
from xllm.protocol import ModelCard, WorkerId
from xllm.security.trust import ANYBODY, Trust
from xllm.tracing import Tracer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can be started: `engine.start()`."""

    folder: Path
    card: ModelCard
    runner: Runner
    engine: Engine
    peer_trust: Trust

    def use_tracer(self, tracer: Tracer) -> None:
        """To be called before the engine starts and blocks are served."""
        engine = self.engine
        engine.tracer = tracer
        if engine.tiers is not None and engine.tiers.peers is not None:
            engine.tiers.peers.client.tracer = tracer

    def serve_blocks(self, worker_id: WorkerId, listening: socket.socket) -> PeerServer:
        """Serves this worker's blocks to its peers on a bound socket, until it is closed: before
        the engine stops. Only where the model was loaded with a `peer_id`."""
        engine = self.engine
        assert engine.tiers is not None
        assert engine.tiers.lender is not None
        layout = peer_layout(self.runner, engine.root)
        lender, books = engine.tiers.lender, engine.books
        server = PeerServer(
            *(worker_id, layout, lender, books),
            is_busy=lambda: engine.is_busy,
            trust=self.peer_trust,
            tracer=engine.tracer,
        )
        server.start(listening)
        return server


def load_model(
    config: EngineConfig,
    observers: Mapping[TierName, BlockObserver],
    peer_id: WorkerId | None = None,
    peer_trust: Trust = ANYBODY,
) -> LoadedModel:
    """Finds or fetches the model, loads its weights, takes the memory of its cache, and says what
    it takes. `peer_id`: see `LowerTiersFactory`.

    Raises: ConfigError.
    """
    folder = resolve_model(
        config.model, progress=lambda line: logger.info("model_preparing progress=%r", line)
    )
    model_id = config.model_id or default_model_id(config.model)
    logger.info("model_loading model_id=%s folder=%s", model_id, folder)
    runner = Runner(config, folder)
    logger.info(
        "model_loaded model_id=%s weights_bytes=%d device=%s dtype=%s max_model_len=%d",
        model_id,
        sum(file.stat().st_size for file in weight_files(folder)),
        runner.device,
        runner.kv_dtype,
        runner.max_model_len,
    )
    logger.info(
        "cache_sized num_blocks=%d tokens=%d bytes=%d",
        runner.num_blocks,
        runner.num_blocks * runner.block_size,
        runner.num_blocks * runner.block_bytes,
    )
    card = ModelCard(
        model_id=model_id,
        max_model_len=runner.max_model_len,
        vocab_size=runner.model_config.vocab_size,
        created=int(time.time()),
    )
    check_memory(runner)
    factory = LowerTiersFactory(runner, observers, peer_id=peer_id, peer_trust=peer_trust)
    engine = Engine(runner, factory, observers.get(TierName.DEVICE))
    return LoadedModel(folder, card, runner, engine, peer_trust)
