"""One run: arrivals, workers, etcd and one master on a virtual clock.

The policy, the index, the view and the upload plans are the real ones; keys and values are the
bytes that etcd would get. What takes real time here is measured for the master alone.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable, Sequence

from simulation.policies import Routing
from simulation.summary import Summary
from simulation.trace import Arrival
from simulation.worker import Rates, Running, SimulatedWorker
from xllm.cache.index import CacheIndex
from xllm.cache.upload_budget import LOAD_REPORT_BYTES, even_share
from xllm.cache.upload_plan import UploadPlan
from xllm.coordination import PUT, Change, Keys, KeyValue
from xllm.protocol import Epoch, WorkerId
from xllm.roles.cost_routing import Prompt
from xllm.roles.global_scheduler import Candidate
from xllm.roles.index_view import IndexView

REPORT_S = 1.0
ETCD_S = 0.002
"""From a write to the masters' watch."""

MAX_PUTS_PER_S = 1000.0
MAX_BYTES_PER_S = 10e6

_KEYS = Keys("simulation")


class Cluster:
    """Run once with `run`."""

    def __init__(
        self,
        num_workers: int,
        rates: Rates,
        tiers: Sequence[tuple[str, int]],
        make_routing: Callable[[CacheIndex, int, Callable[[], float]], Routing],
        with_peers: bool = False,
    ) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._number = 0
        ids = [WorkerId(f"10.0.{i // 256}.{i % 256}:18889") for i in range(num_workers)]
        self.workers = {i: SimulatedWorker(i, rates, tiers, with_peers) for i in ids}
        self._epochs = {worker_id: Epoch(number + 1) for number, worker_id in enumerate(ids)}
        self.index = CacheIndex()
        self._view = IndexView(_KEYS, self.index)
        self._routing = make_routing(self.index, rates.block_size, lambda: self.now)
        share = even_share(MAX_PUTS_PER_S, MAX_BYTES_PER_S, num_workers, REPORT_S)
        self._plans = {i: UploadPlan(share, random.Random(n)) for n, i in enumerate(ids)}
        self._upload_at: dict[WorkerId, float] = {}
        self._reporting: set[WorkerId] = set()
        self._phases = {i: random.Random(n).random() * REPORT_S for n, i in enumerate(ids)}
        self._candidates = [Candidate(i, None, 0) for i in sorted(ids)]
        self._revision = 0
        self._apply_s = 0.0
        self.summary = Summary(num_workers)
        for worker_id in ids:
            self._put(_KEYS.worker(worker_id), b"{}", self._epochs[worker_id])
            self._plans[worker_id].begin_epoch(0.0)
            self._upload(worker_id)
            self._report(worker_id)

    def run(self, arrivals: Sequence[Arrival]) -> Summary:
        for arrival in arrivals:
            self._at(arrival.at, self._arrive, arrival)
        while self._queue:
            self.now, _, action, arguments = heapq.heappop(self._queue)
            action(*arguments)
        load_puts = len(self.workers) / REPORT_S
        busy_s = sum(worker.busy_s for worker in self.workers.values())
        self.summary.busy = busy_s / (arrivals[-1].at * len(self.workers))
        self.summary.finish(
            self.index,
            load_puts,
            load_puts * LOAD_REPORT_BYTES,
            self._apply_s,
            self._routing.errors,
        )
        return self.summary

    def _at(self, at: float, action: Callable[..., None], *arguments: object) -> None:
        self._number += 1
        heapq.heappush(self._queue, (at, self._number, action, arguments))

    # A request

    def _arrive(self, arrival: Arrival) -> None:
        prompt = Prompt(str(arrival.number), arrival.hashes, arrival.num_tokens)
        started = time.thread_time()
        worker_id = self._routing.route(prompt, self._candidates)
        self.summary.route_s.append(time.thread_time() - started)
        self._routing.dispatched(prompt, worker_id)
        fetch = self._routing.fetch
        if fetch is None:
            self.workers[worker_id].enqueue(arrival, self.now)
        else:
            source = self.workers[fetch.worker_id]
            end = fetch.first + fetch.count
            self.workers[worker_id].enqueue(arrival, self.now, source, end)
        self._start(self.workers[worker_id])

    def _start(self, worker: SimulatedWorker) -> None:
        running = worker.start_next(self.now)
        if running is not None:
            self._at(running.finishes_at, self._finish, worker, running)
        self._keep_reporting(worker.worker_id)

    def _finish(self, worker: SimulatedWorker, running: Running) -> None:
        worker.finish(running, self.now)
        arrival = running.arrival
        self.summary.add(
            self.now - running.came_at, running.prefix, running.num_fetched, len(arrival.hashes)
        )
        self._routing.first_token(str(arrival.number))
        self._at(self.now + worker.decode_s(arrival.num_output), self._end, worker, arrival)
        plan = self._plans[worker.worker_id]
        for tier, events in worker.take_events():
            plan.record(tier, events, self.now)
        plan.touch(arrival.hashes[: sum(running.prefix)])
        self._upload(worker.worker_id)
        self._start(worker)

    def _end(self, worker: SimulatedWorker, arrival: Arrival) -> None:
        worker.num_decoding -= 1
        self._routing.ended(str(arrival.number))
        self._keep_reporting(worker.worker_id)

    # Load reports: those of idle workers say nothing new, and are only counted

    def _keep_reporting(self, worker_id: WorkerId) -> None:
        if worker_id not in self._reporting:
            self._reporting.add(worker_id)
            phase = self._phases[worker_id]
            next_at = math.ceil((self.now - phase) / REPORT_S) * REPORT_S + phase
            self._at(max(next_at, self.now), self._report, worker_id)

    def _report(self, worker_id: WorkerId) -> None:
        worker = self.workers[worker_id]
        load = worker.load(self._epochs[worker_id], self.now)
        self._at(self.now + ETCD_S, self._routing.report, worker_id, load)
        self._reporting.discard(worker_id)
        if worker.num_requests:
            self._reporting.add(worker_id)
            self._at(self.now + REPORT_S, self._report, worker_id)

    # Uploads

    def _upload(self, worker_id: WorkerId) -> None:
        """Writes what is due; comes back when more is."""
        plan = self._plans[worker_id]
        if self._upload_at.get(worker_id, math.inf) <= self.now:
            del self._upload_at[worker_id]
        write = plan.take(self.now)
        if write is not None:
            self.summary.add_write(self.now, write.num_bytes)
            self._at(self.now + ETCD_S, self._written, worker_id, write.puts)
            return
        due_at = plan.due_at(self.now)
        if due_at < self._upload_at.get(worker_id, math.inf):
            self._upload_at[worker_id] = due_at
            self._at(due_at, self._upload, worker_id)

    def _written(self, worker_id: WorkerId, puts: Sequence[tuple[str, bytes]]) -> None:
        folder = _KEYS.cache_of(worker_id, self._epochs[worker_id])
        for key, value in puts:
            self._put(folder + key, value, self._epochs[worker_id])
        self._plans[worker_id].written(self.now)
        self._upload(worker_id)

    def _put(self, key: str, value: bytes, lease: int) -> None:
        self._revision += 1
        started = time.thread_time()
        kv = KeyValue(key, value, self._revision, self._revision, lease)
        self._view.feed([Change(PUT, kv)])
        self._view.work()
        self._apply_s += time.thread_time() - started
