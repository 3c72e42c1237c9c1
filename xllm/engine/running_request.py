"""The event loop's handle of one request that an engine has."""

from __future__ import annotations

from collections.abc import Callable

from xllm.engine.timeline import Timeline
from xllm.errors import RequestError
from xllm.protocol import GenerateRequest, TokenDelta
from xllm.tracing import NO_SPAN

Listener = Callable[[TokenDelta | RequestError], None]


class RunningRequest:
    """One request, until its end."""

    __slots__ = (
        "_on_cancel",
        "_on_end",
        "listener",
        "num_open_samples",
        "num_running_samples",
        "request",
        "span",
        "timeline",
    )

    def __init__(
        self,
        request: GenerateRequest,
        listener: Listener,
        timeline: Timeline,
        *,
        on_cancel: Callable[[RunningRequest], None],
        on_end: Callable[[RunningRequest], None],
    ) -> None:
        self.request = request
        self.listener: Listener | None = listener
        self.timeline = timeline
        """The engine thread's."""
        self.span = NO_SPAN
        self.num_open_samples = request.n
        """As the event loop has seen."""
        self.num_running_samples = request.n
        """As the engine's thread has seen."""
        self._on_cancel = on_cancel
        self._on_end = on_end

    def cancel(self) -> None:
        """Frees the request's blocks before the next step; its listener hears nothing more."""
        if self.listener is not None:
            self.end()
            self._on_cancel(self)

    def end(self) -> None:
        """The last call of the listener is the one that follows, if any."""
        self.listener = None
        self._on_end(self)
