"""Which worker runs a request, by load alone. Pure: what is known goes in, a route comes out.

A policy sees the workers of one model that can take the request, and nothing else; who can is the
registry's business. `car_policy.py` asks one of these, or weighs what each worker would cost.

What a master knows of a worker's load is its last report, up to a second old, and what the master
itself has sent and seen ending since then. Both are counted, not guessed: a report says how many
of this master's requests it already includes (`protocol.Watermark`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xllm.protocol import GenerateRequest, WorkerId, WorkerLoad


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that can take a request of its model now."""

    worker_id: WorkerId
    load: WorkerLoad | None
    """Its last report; None: it has not reported yet."""
    unreported: int
    """This master's own requests that run there beyond those in `load`; negative: that ended."""

    @property
    def num_requests(self) -> int:
        """Waiting and running, as well as this master can know."""
        reported = 0
        if self.load is not None:
            reported = self.load.waiting_requests_num + self.load.running_requests_num
        return max(0, reported + self.unreported)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes."""

    worker_id: WorkerId


class Policy(Protocol):
    def route(self, request: GenerateRequest, candidates: Sequence[Candidate]) -> Route:
        """Chooses one of `candidates`: not empty, in the order of their ids."""
        ...

    def peek(self, request: GenerateRequest, candidates: Sequence[Candidate]) -> Route:
        """What `route` would choose now; changes nothing."""
        ...


class RoundRobin:
    """Each worker of a model in turn, by id, so that joining and leaving does not upset it."""

    def __init__(self) -> None:
        self._last: dict[str, WorkerId] = {}

    def route(self, request: GenerateRequest, candidates: Sequence[Candidate]) -> Route:
        route = self.peek(request, candidates)
        self._last[request.model_id] = route.worker_id
        return route

    def peek(self, request: GenerateRequest, candidates: Sequence[Candidate]) -> Route:
        last = self._last.get(request.model_id)
        chosen = candidates[0].worker_id
        if last is not None:
            after = (c.worker_id for c in candidates if c.worker_id > last)
            chosen = next(after, chosen)
        return Route(chosen)


class LeastLoad:
    """The worker with the fewest requests; in turn among equals, so that none stays cold."""

    def __init__(self) -> None:
        self._turn = RoundRobin()

    def route(self, request: GenerateRequest, candidates: Sequence[Candidate]) -> Route:
        return self._turn.route(request, _least_loaded(candidates))

    def peek(self, request: GenerateRequest, candidates: Sequence[Candidate]) -> Route:
        return self._turn.peek(request, _least_loaded(candidates))


def _least_loaded(candidates: Sequence[Candidate]) -> list[Candidate]:
    fewest = min(c.num_requests for c in candidates)
    return [c for c in candidates if c.num_requests == fewest]


POLICIES: dict[str, Callable[[], Policy]] = {"RR": RoundRobin, "LEAST_LOAD": LeastLoad}
"""By the value of `--load_balance_policy`."""
