"""The public API over this process's own engine: a worker without masters."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.errors import NoWorker, RequestError, UnknownModel
from xllm.protocol import GenerateRequest, ModelCard, TokenDelta, WorkerId
from xllm.roles.delta_queue import DeltaQueue
from xllm.roles.stream_server import RequestEngine, RunningRequest
from xllm.tokenizer import Tokenizer


class LocalBackend:
    """A `Backend` of one model on one engine. It has none until `open` is called."""

    def __init__(self, worker_id: WorkerId) -> None:
        self._worker_id = worker_id
        self._served: tuple[ModelCard, RequestEngine, Tokenizer] | None = None

    def open(self, card: ModelCard, engine: RequestEngine, tokenizer: Tokenizer) -> None:
        """The model is loaded: requests are taken from now on."""
        self._served = (card, engine, tokenizer)

    def model_cards(self) -> Sequence[ModelCard]:
        return [] if self._served is None else [self._served[0]]

    async def tokenizer(self, model_id: str) -> Tokenizer:
        _, tokenizer = self._serving(model_id)
        return tokenizer

    async def until_reachable(self, model_id: str | None) -> None:
        """The engine is here or nowhere."""

    def admit(self, model_id: str) -> None:
        self._serving(model_id)

    async def prepare(self, request: GenerateRequest) -> None:
        """The engine has a thread of its own."""

    def generate(self, request: GenerateRequest) -> LocalGeneration:
        engine, _ = self._serving(request.model_id)
        generation = LocalGeneration(self._worker_id, request.n)
        generation.running = engine.submit(request, generation.listen)
        return generation

    def _serving(self, model_id: str) -> tuple[RequestEngine, Tokenizer]:
        if self._served is None:
            raise NoWorker("the model is still being loaded; try again", retry_after_s=1)
        card, engine, tokenizer = self._served
        if model_id != card.model_id:
            raise UnknownModel(
                f"this worker serves {card.model_id!r}, not {model_id!r}", param="model"
            )
        return engine, tokenizer


class LocalGeneration(DeltaQueue):
    """A `Generation` on the engine of this process."""

    __slots__ = ("_num_open_samples", "_worker_id", "running")

    def __init__(self, worker_id: WorkerId, num_samples: int) -> None:
        super().__init__()
        self._worker_id = worker_id
        self._num_open_samples = num_samples
        self.running: RunningRequest | None = None

    @property
    def worker_id(self) -> WorkerId:
        return self._worker_id

    def listen(self, news: TokenDelta | RequestError) -> None:
        if isinstance(news, RequestError):
            self.end(news)
            return
        self.push(news)
        if news.finish_reason is not None:
            self._num_open_samples -= 1
            if self._num_open_samples == 0:
                self.end()

    def cancel(self) -> None:
        if self.running is not None:
            self.running.cancel()
        self.end()
