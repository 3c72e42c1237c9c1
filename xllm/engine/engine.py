"""The engine: a step loop on its own thread, asyncio on the outside.

    event loop                          engine thread
    ----------                          -------------
    submit, cancel ──commands──>        apply commands
                                        schedule -> build batch -> execute -> complete
    listeners      <──one callback──    deltas of the step

The scheduler, the cache and the runner belong to the engine's thread alone. The two sides share
one queue of commands, one callback per step, and `statistics()`, an immutable snapshot that is
replaced after each step. A request's listener gets every delta and exactly one end: the last delta
of each sample, or one error; after `cancel` it is not called any more.

The cache's books are shared with the thread that serves peers (`cache/shared_books.py`): while a
step is computed, blocks may be pinned and unpinned for peers, but no sequence is changed.

A step that raises fails the requests in it (EngineFault), frees their blocks, and the loop goes
on; after MAX_FAULTS_IN_A_ROW of them the engine gives up, and `wait_closed` raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, TypeVar

from msgspec.structs import replace

from xllm.cache.admin import CacheAdmin
from xllm.cache.block_hash import CacheRoot
from xllm.cache.block_pool import BlockObserver, BlockPool
from xllm.cache.kv_cache import KVCache
from xllm.cache.news import CacheNews, NewsCollector
from xllm.cache.prefetch import PrefetchOutcome
from xllm.cache.shared_books import SharedBooks
from xllm.cache.tiers import Tiers
from xllm.engine.batch import build_batch
from xllm.engine.grammar import CompiledGrammar, GrammarCompiler, MaskWorker
from xllm.engine.limits import check_request, scheduler_limits
from xllm.engine.load_meter import LoadMeter
from xllm.engine.outputs import StepOutputs
from xllm.engine.request import Sequence
from xllm.engine.request_trace import end_trace, start_trace
from xllm.engine.runner import Runner
from xllm.engine.running_request import Listener, RunningRequest
from xllm.engine.sampler import SampledTokens
from xllm.engine.scheduler import Scheduler, StepPlan
from xllm.engine.statistics import Counters, EngineObserver, EngineStatistics
from xllm.engine.step_cost import StepCost
from xllm.engine.timeline import Timeline
from xllm.engine.warm_up import warm_up_plans
from xllm.errors import EngineFault, InvalidRequest, NoWorker, Overloaded, RequestError, WorkerLost
from xllm.protocol import BlockHash, FetchRange, GenerateRequest, TokenDelta
from xllm.tracing import OFF, Tracer

logger = logging.getLogger(__name__)

TiersFactory = Callable[[BlockPool, CacheRoot, Callable[[], None]], Tiers | None]
"""Given the pool, the root, and what to call on any thread when the tiers have something to say."""

T = TypeVar("T")

MAX_OPEN_REQUESTS = 4096
MAX_FAULTS_IN_A_ROW = 3
FLUSH_S = 1.0
"""For the tiers to write what is still on its way to disk, when the engine stops."""
PREFETCH_TIMEOUT_S = 30.0
IDLE_POLL_S = 0.05
"""Until the scheduler is asked again when requests are there and none can run."""


class Engine:
    """Runs requests on one `Runner`. Methods are for the event loop's thread."""

    def __init__(
        self,
        runner: Runner,
        open_tiers: TiersFactory = lambda pool, root, on_ended: None,
        observer: BlockObserver | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """Takes the memory of all tiers, and blocks meanwhile. `observer`: of device blocks;
        `grammars`: None refuses requests that have one.

        Raises: ConfigError.
        """
        config = runner.config
        root = CacheRoot(
            fingerprint=runner.fingerprint,
            kv_dtype=runner.kv_dtype,
            block_size=config.block_size,
        )
        pool = BlockPool(runner.num_blocks, observer=observer)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.books: Final = SharedBooks()
        """By way of which others than the engine's thread use `tiers.lender`."""
        runner.allocate_cache(runner.num_blocks)
        self.tiers: Final = open_tiers(pool, root, lambda: self._commands.put(_wake_up))
        limits = scheduler_limits(config, runner.max_model_len)
        self.root = root
        self.max_model_len = runner.max_model_len
        self.vocab_size = runner.model_config.vocab_size
        self.kv_cache = KVCache(
            pool, root, enable_prefix_cache=config.enable_prefix_cache, tiers=self.tiers
        )
        self.cache_admin = CacheAdmin(
            self.kv_cache,
            self.tiers,
            max_pinned_blocks=runner.num_blocks - self.kv_cache.blocks_for(runner.max_model_len),
        )
        """For functions given to `call`."""
        self._runner = runner
        self._grammars = grammars
        self._masks = MaskWorker()
        self._cost = StepCost()
        self._eos_token_ids = runner.model_config.eos_token_ids
        self._scheduler = Scheduler(self.kv_cache, limits, self._eos_token_ids, self._cost)
        self._meter = LoadMeter(self._scheduler, self._cost)
        self._handles: set[RunningRequest] = set()
        """The event loop's: requests that have not ended."""
        self._calls: set[asyncio.Future[Any]] = set()
        """The event loop's: calls that have not been answered."""
        self._open: dict[int, RunningRequest] = {}
        """The engine thread's, by id of the request message, which the handle keeps alive."""
        self.observer: EngineObserver | None = None
        """To be set before `start`, as the next."""
        self.tracer: Tracer = OFF
        self._counters = Counters()
        self._statistics = EngineStatistics(num_blocks=runner.num_blocks)
        self.cache_news: Final = NewsCollector(self.kv_cache, self.tiers)
        """Its listener, to be set before `start`, is called on the event loop's thread."""
        self._outbox: list[tuple[RunningRequest, TokenDelta | RequestError]] = []
        self._is_stopping = False
        self._faults_in_a_row = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._started: asyncio.Future[None] | None = None
        self._closed: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Returns when the engine has warmed up: it has run, and knows roughly how fast it is."""
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        self._closed = self._loop.create_future()
        self._thread.start()
        await self._started

    async def stop(self) -> None:
        """Ends the loop after the step that runs; open requests end with an error."""
        if self._closed is not None:
            self._commands.put(self._stop)
            await asyncio.wait([self._closed])

    async def wait_closed(self) -> None:
        """Returns when the engine was stopped. Raises: EngineFault when it gave up."""
        assert self._closed is not None, "started first"
        await asyncio.shield(self._closed)

    def submit(self, request: GenerateRequest, listener: Listener) -> RunningRequest:
        """Queues a request; `listener` is called on the event loop's thread.

        Raises: InvalidRequest, Overloaded.
        """
        check_request(request, self.max_model_len, self.vocab_size)
        if request.sampling.grammar and self._grammars is None:
            raise InvalidRequest("this worker takes no grammars", param="grammar")
        if self._closed is None or self._closed.done():
            raise NoWorker("the engine of this worker is not running")
        if len(self._handles) >= MAX_OPEN_REQUESTS:
            raise Overloaded(
                f"{MAX_OPEN_REQUESTS} requests are open on this worker; try again later",
                retry_after_s=1,
            )
        timeline = Timeline(time.monotonic(), num_prompt_tokens=len(request.prompt_ids))
        handle = RunningRequest(
            request,
            listener,
            timeline,
            on_cancel=lambda handle: self._commands.put(partial(self._abort, handle)),
            on_end=self._handles.discard,
        )
        if self.tracer.is_on:
            handle.span = start_trace(self.tracer, request, timeline)
        self._handles.add(handle)
        if request.sampling.grammar:
            self._compile(handle)
        else:
            self._commands.put(lambda: self._begin(handle))
        return handle

    def _compile(self, handle: RunningRequest) -> None:
        """Begins the request when its grammar is compiled, or ends it with an error."""

        def begin(compiled: Future[CompiledGrammar]) -> None:
            self._commands.put(lambda: self._begin_under(handle, compiled))

        assert self._grammars is not None
        self._grammars.submit(handle.request.sampling.grammar).add_done_callback(begin)

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns on the engine's thread, between two steps: it may use the cache.

        Raises: what it raises; NoWorker if the engine does not run.
        """
        future: asyncio.Future[T] = self._new_call()

        def run() -> None:
            try:
                answer = partial(future.set_result, function())
            except Exception as error:
                answer = partial(future.set_exception, error)
            self._post(lambda: None if future.done() else answer())

        self._commands.put(run)
        return await future

    async def prefetch(
        self,
        hashes: list[BlockHash],
        fetch: list[FetchRange],
        timeout_s: float = PREFETCH_TIMEOUT_S,
    ) -> PrefetchOutcome:
        """Brings blocks here from peers that no request waits for; returns when they are here, or
        as many as could be had in time.

        hashes: names from the first block of a prompt on (`KVCache.name_prompt`); fetch: who has
        which of them. Raises: NoWorker if the engine does not run.
        """
        future: asyncio.Future[PrefetchOutcome] = self._new_call()

        def end(outcome: PrefetchOutcome) -> None:
            self._post(lambda: None if future.done() else future.set_result(outcome))

        self._commands.put(lambda: self.kv_cache.prefetch(hashes, fetch, timeout_s, end))
        return await future

    def _new_call(self) -> asyncio.Future[Any]:
        """Ends with NoWorker if the engine stops before it is answered. Raises: NoWorker."""
        if self._closed is None or self._closed.done() or self._loop is None:
            raise NoWorker("the engine of this worker is not running")
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def statistics(self) -> EngineStatistics:
        """As of the last step; any thread."""
        return self._statistics

    @property
    def step_counter(self) -> int:
        return self._statistics.num_steps

    @property
    def is_busy(self) -> bool:
        """Requests run, as of the last step; any thread."""
        return self._statistics.num_running > 0

    def _deliver(
        self,
        outbox: list[tuple[RunningRequest, TokenDelta | RequestError]],
        news: CacheNews | None,
    ) -> None:
        for handle, item in outbox:
            listener = handle.listener
            if listener is None:
                continue
            if isinstance(item, RequestError):
                handle.end()
            elif item.finish_reason is not None:
                handle.num_open_samples -= 1
                if handle.num_open_samples == 0:
                    handle.end()
            listener(item)
        self.cache_news.tell(news)

    def _set_started(self) -> None:
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def _set_closed(self, error: BaseException | None) -> None:
        for handle in list(self._handles):
            listener = handle.listener
            handle.end()
            if listener is not None:
                listener(WorkerLost("the engine has stopped"))
        for call in list(self._calls):
            if not call.done():
                call.set_exception(NoWorker("the engine has stopped"))
        for future in (self._started, self._closed):
            if future is not None and not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(EngineFault(f"the engine has stopped: {error}"))

    # ---- engine thread ----

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._runner.enter_thread()
            with self.books.hold():
                self._warm_up()
            self._post(self._set_started)
            self._publish()
            has_run = False
            with self.books.hold():
                while not self._is_stopping:
                    self._take_commands(may_sleep=not has_run)
                    has_run = self._step()
                    self._publish()
        except BaseException as caught:
            error = caught
            logger.exception("engine_stopped")
        if self.tiers is not None:
            with self.books.hold():
                self._scheduler.abort_all()
                self.kv_cache.cancel_prefetches()
                self.tiers.close(FLUSH_S)
        self._masks.close()
        if self._grammars is not None:
            self._grammars.close()
        self._post(lambda: self._set_closed(error))

    def _take_commands(self, *, may_sleep: bool) -> None:
        """Applies what the event loop asked for; sleeps while there is nothing to run."""
        if may_sleep:
            with contextlib.suppress(queue.Empty):
                self._next_command()()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _next_command(self) -> Callable[[], None]:
        """Sleeps until there is one. Raises: queue.Empty."""
        timeout_s = self._max_sleep_s()
        with self.books.pause():
            return self._commands.get(timeout=timeout_s)

    def _begin_under(self, handle: RunningRequest, compiled: Future[CompiledGrammar]) -> None:
        if compiled.cancelled():  # the engine stops
            return
        error = compiled.exception()
        if error is None:
            self._begin(handle, compiled.result())
            return
        if not isinstance(error, RequestError):
            logger.error("grammar_failed request_id=%s", handle.request.request_id, exc_info=error)
            error = EngineFault("the grammar could not be compiled")
        self._observe_end(handle, error.message)
        self._outbox.append((handle, error))

    def _begin(self, handle: RunningRequest, grammar: CompiledGrammar | None = None) -> None:
        if handle.listener is None:  # cancelled while its grammar was compiled
            return
        request = handle.request
        sequences = [
            Sequence(request, index, handle.timeline.submitted_at)
            for index in range(request.index, request.index + request.n)
        ]
        if grammar is not None:
            for seq in sequences:
                seq.grammar = grammar.new_state(seq.output_ids)
        first, *children = sequences
        first.children = children
        for seq in (first, *children):
            seq.loads = handle.timeline.loads
            seq.trace = handle.span.traceparent
        for child in children:
            child.prompt_logprobs = first.prompt_logprobs
        self._open[id(request)] = handle
        self._scheduler.add(first)

    def _abort(self, handle: RunningRequest) -> None:
        self._scheduler.abort(handle.request)
        if self._open.pop(id(handle.request), None) is not None:
            self._observe_end(handle)  # cancelled, as at each stop string: that is no error

    def _stop(self) -> None:
        self._is_stopping = True

    def _max_sleep_s(self) -> float | None:
        """None: until a command comes; requests that wait for nothing but blocks on their way up
        also wake up at their deadline."""
        deadline = self.kv_cache.next_deadline
        if deadline is not None:
            return max(deadline - time.monotonic(), 0.0)
        return IDLE_POLL_S if self._scheduler.has_work else None

    def _step(self) -> bool:
        """Runs one step, if anything can run; False: nothing could."""
        if self._is_stopping:
            return False
        self.cache_admin.expire()
        plan = self._scheduler.schedule()
        if not plan.scheduled:
            return False
        self._observe_begun(plan)
        work = plan.work
        started = time.perf_counter()
        outputs = StepOutputs(plan, self._eos_token_ids, self.vocab_size, self._masks.begin)
        try:
            sampled = self._execute(plan, outputs)
        except Exception:
            logger.exception(
                "step_failed tokens=%d sequences=%d", plan.num_tokens, len(plan.scheduled)
            )
            self._fail(plan)
            return True
        self._faults_in_a_row = 0
        faulty = outputs.faulty(sampled)
        outputs.keep_scores(sampled)
        for advance in self._scheduler.complete(plan, outputs.drawn(sampled)):
            if advance.seq not in faulty:
                self._emit(outputs.delta(advance, sampled), advance.seq)
        for seq in faulty:
            reason = seq.grammar.error if seq.grammar is not None else ""
            self._fail_request(
                seq.group, EngineFault(reason or "the model's logits are not finite")
            )
        seconds = time.perf_counter() - started
        self._cost.observe(work, seconds)
        self._counters.count(plan, seconds)
        if self.observer is not None:
            self.observer.step_done(plan, seconds)
        return True

    def _observe_begun(self, plan: StepPlan) -> None:
        for item in plan.scheduled[plan.num_decodes :]:
            if not item.seq.is_begun:
                item.seq.is_begun = True
                now = time.monotonic()
                handle = self._open.get(id(item.seq.group))
                if handle is not None and handle.timeline.begun_at is None:
                    handle.timeline.begun_at = now
                if self.observer is not None:
                    self.observer.request_begun(now - item.seq.arrival)

    def _observe_end(self, handle: RunningRequest, error: str = "") -> None:
        timeline, span = handle.timeline, handle.span
        timeline.ended_at = time.monotonic()
        if self.observer is not None:
            self.observer.request_ended(handle.request, timeline)
        if self.tracer.is_on:
            self._post(lambda: end_trace(span, timeline, error))

    def _execute(self, plan: StepPlan, outputs: StepOutputs) -> SampledTokens:
        runner = self._runner
        if plan.copies:
            runner.copy_blocks(plan.copies)
        sampling = outputs.begin_sampling()
        batch = build_batch(plan, self.kv_cache.block_size, runner.device, runner.staging)
        try:
            with self.books.pause():
                return runner.execute(batch, sampling)
        finally:
            sampling.wait()  # where the runner has failed: nobody may touch the states before

    def _fail(self, plan: StepPlan) -> None:
        """After a step that raised: nobody knows what its blocks hold, so nobody may use them."""
        self._counters.num_faults += 1
        self._faults_in_a_row += 1
        for item in plan.scheduled:
            self._fail_request(item.seq.group, EngineFault("the engine failed in this request"))
        if self._faults_in_a_row >= MAX_FAULTS_IN_A_ROW:
            raise EngineFault(f"{MAX_FAULTS_IN_A_ROW} steps failed in a row")

    def _fail_request(self, request: GenerateRequest, error: RequestError) -> None:
        self._scheduler.abort(request)
        handle = self._open.pop(id(request), None)
        if handle is not None:
            self._observe_end(handle, error.message)
            self._outbox.append((handle, error))

    def _emit(self, delta: TokenDelta, seq: Sequence) -> None:
        handle = self._open.get(id(seq.group))
        if handle is None:
            return
        timeline = handle.timeline
        timeline.num_output_tokens += len(delta.token_ids)
        if timeline.first_token_at is None:
            timeline.first_token_at = time.monotonic()
            timeline.cached_tokens = seq.cached_tokens or {}
        if delta.finish_reason is not None:
            delta = replace(delta, phases=timeline.phases(time.monotonic()))
        self._outbox.append((handle, delta))
        if delta.finish_reason is not None:
            handle.num_running_samples -= 1
            if handle.num_running_samples == 0:
                del self._open[id(seq.group)]
                self._observe_end(handle)

    def _publish(self) -> None:
        """One callback for all that the step brought, and a new snapshot."""
        self._statistics = self._counters.snapshot(self._meter, self.tiers)
        news = self.cache_news.take()
        if self._outbox or news is not None:
            outbox, self._outbox = self._outbox, []
            self._post(lambda: self._deliver(outbox, news))

    def _post(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        # The loop may be gone already when the process is torn down: nobody listens then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def _warm_up(self) -> None:
        num_blocks, block_size = self.kv_cache.pool.num_blocks, self.kv_cache.block_size
        # A GPU's kernels are compiled and its graphs captured by their first runs.
        for is_cold in (False,) if self._runner.device.type == "cpu" else (True, False):
            for plan in warm_up_plans(self._scheduler.limits, num_blocks, block_size):
                outputs = StepOutputs(plan, (), self.vocab_size)
                started = time.perf_counter()
                self._execute(plan, outputs)
                if not is_cold:
                    self._cost.observe(plan.work, time.perf_counter() - started)


def _wake_up() -> None:
    """A command that only ends the engine's sleep."""
