"""What the HTTP layer needs from a role: the seam between `openai_api` and what runs a request.

A worker implements it over its own engine, a master over the workers it knows. So there is one
implementation of the public API, and a test can put a fake behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from xllm.protocol import GenerateRequest, ModelCard, TokenDelta, WorkerId
from xllm.tokenizer import Tokenizer


class Generation(Protocol):
    """One accepted request. Exactly one of these ends it: every sample's last delta, an error
    raised by the iterator, or `cancel`."""

    @property
    def worker_id(self) -> WorkerId:
        """Who runs it now; after a failover, who took it over."""
        ...

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        """Deltas of all samples, interleaved, without gaps or repetitions per sample.

        Raises: a `RequestError`; before the first delta if the request was refused.
        """
        ...

    def cancel(self) -> None:
        """The client has gone: stop, free the blocks. Idempotent, also after the end."""
        ...


class Backend(Protocol):
    """A source of models and generations."""

    def model_cards(self) -> Sequence[ModelCard]:
        """Every model that can be asked for now; empty: not ready."""
        ...

    async def tokenizer(self, model_id: str) -> Tokenizer:
        """Raises: UnknownModel, NoWorker."""
        ...

    async def until_reachable(self, model_id: str | None) -> None:
        """Waits for workers of the model, or of any, that are only away for a moment."""
        ...

    def admit(self, model_id: str) -> None:
        """To be asked before any work is spent on a request that `generate` would refuse.

        Raises: UnknownModel, NoWorker, Overloaded.
        """
        ...

    async def prepare(self, request: GenerateRequest) -> None:
        """Does off the event loop what `generate` would keep it long with.

        Raises: UnknownModel, NoWorker.
        """
        ...

    def generate(self, request: GenerateRequest) -> Generation:
        """Accepts a validated request; synchronous, so that nothing accepted is lost.

        Raises: UnknownModel, NoWorker, Overloaded.
        """
        ...
