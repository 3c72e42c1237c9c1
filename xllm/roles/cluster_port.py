"""What operators may ask of a master about the whole cluster.

    GET  /admin/cluster          masters, workers, load, tiers, rates, etcd
    POST /admin/cache/lookup     who holds how much of a prompt, by tier
    POST /admin/cache/clear      drop a tier, or all
    POST /admin/cache/pin        keep a prompt for a time
    POST /admin/cache/unpin
    POST /admin/cache/move       have one worker fetch a prompt's blocks from another
    POST /admin/drain            workers stop taking requests, let running ones end, and end

All but the first go to the workers as commands through etcd and answer per worker, so they reach
workers whose operator port is not reachable from here, or whose stream is down. Lookup, too: what a
worker says is exact, while the index of a master is a moment late, knows half of a name, and may
leave out what nobody uses. The answer shows both.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web
from pydantic import Field

from xllm.cache.block_hash import hash_blocks
from xllm.cache.event_codec import TierCode, short_hashes
from xllm.cache.index import CacheIndex
from xllm.coordination import EtcdRefused
from xllm.errors import EtcdUnavailable, InvalidRequest, NoWorker
from xllm.protocol import (
    BlockHash,
    Command,
    CommandKind,
    CommandState,
    FetchRange,
    WorkerId,
    WorkerInfo,
)
from xllm.roles.api.base_model import ApiModel
from xllm.roles.api.body import read_json, validate
from xllm.roles.api.info import json_response, select_model
from xllm.roles.cache_port import MAX_TTL_S, PromptBody, answering_errors, encode_prompt
from xllm.roles.cluster_backend import ClusterBackend
from xllm.roles.command_desk import CommandDesk
from xllm.roles.commands import join_names
from xllm.roles.registry import MemberState, Registry
from xllm.roles.stream_client import WorkerStream
from xllm.security.secret import ClusterSecret

DEADLINE_S = 5.0
MOVE_DEADLINE_S = 30.0
MAX_DEADLINE_S = 300.0

_Deadline = Field(DEADLINE_S, gt=0, le=MAX_DEADLINE_S, description="Seconds to wait for workers.")
_Workers = Field(None, min_length=1, description="Ids; None: all that serve the model.")


class ClusterPromptBody(PromptBody):
    """Body of lookup and unpin."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    workers: list[str] | None = _Workers
    deadline: float = _Deadline


class ClusterPinBody(ClusterPromptBody):
    ttl: float = Field(gt=0, le=MAX_TTL_S, description="Seconds.")


class ClusterMoveBody(ClusterPromptBody):
    workers: None = None
    to: str = Field(description="Id of the worker that is to get the blocks.")
    source: str | None = Field(None, description="Id of their holder; None: who has most of them.")
    deadline: float = Field(MOVE_DEADLINE_S, gt=0, le=MAX_DEADLINE_S)


class ClusterClearBody(ApiModel):
    tier: Literal["device", "host", "disk", "remote"] | None = Field(
        None, description="None: all of them. remote: the shared store, for all workers."
    )
    workers: list[str] | None = Field(None, min_length=1, description="Ids; None: all workers.")
    deadline: float = _Deadline


class ClusterDrainBody(ApiModel):
    workers: list[str] = Field(min_length=1, description="Ids.")
    timeout: float | None = Field(None, ge=0, description="Seconds; None: --drain_timeout.")
    deadline: float = _Deadline


@dataclass(frozen=True, slots=True)
class _Prompt:
    names: list[BlockHash]
    num_tokens: int
    workers: list[WorkerInfo]
    block_size: int


class ClusterPort:
    """The routes of one master; commands answer 503 until `open`."""

    def __init__(
        self,
        backend: ClusterBackend,
        registry: Registry[WorkerStream],
        index: CacheIndex,
        describe: Callable[[], Awaitable[dict[str, Any]]],
        max_body_bytes: int,
        secret: ClusterSecret | None = None,
    ) -> None:
        """`describe`: the answer of GET /admin/cluster. `secret`: the cluster's."""
        self._secret = secret
        self._backend = backend
        self._registry = registry
        self._index = index
        self._describe = describe
        self._max_body_bytes = max_body_bytes
        self._desk: CommandDesk | None = None

    @property
    def routes(self) -> list[web.RouteDef]:
        actions = {
            "cache/lookup": self._lookup,
            "cache/clear": self._clear,
            "cache/pin": self._pin,
            "cache/unpin": self._unpin,
            "cache/move": self._move,
            "drain": self._drain,
        }
        return [
            web.get("/admin/cluster", self._show),
            *(web.post(f"/admin/{name}", self._answering(act)) for name, act in actions.items()),
        ]

    def open(self, desk: CommandDesk) -> None:
        """etcd is there."""
        self._desk = desk

    async def _show(self, request: web.Request) -> web.Response:
        return json_response(await self._describe())

    async def _lookup(self, raw: dict[str, Any]) -> dict[str, Any]:
        body = validate(ClusterPromptBody, raw)
        prompt = await self._prepare(body)
        answers = await self._ask(
            prompt.workers, CommandKind.LOOKUP, body.deadline, {"blocks": join_names(prompt.names)}
        )
        indexed = self._index.match(short_hashes(prompt.names))
        for worker_id, answer in answers["workers"].items():
            counts = indexed.get(worker_id, [0] * len(TierCode))
            answer["indexed_tokens_by_tier"] = {
                tier.name.lower(): count * prompt.block_size
                for tier, count in zip(TierCode, counts, strict=True)
                if count
            }
        return {"prompt_tokens": prompt.num_tokens, **answers}

    async def _clear(self, raw: dict[str, Any]) -> dict[str, Any]:
        body = validate(ClusterClearBody, raw)
        workers = self._registered(None, body.workers)
        return await self._ask(workers, CommandKind.CLEAR, body.deadline, {"tier": body.tier})

    async def _pin(self, raw: dict[str, Any]) -> dict[str, Any]:
        body = validate(ClusterPinBody, raw)
        prompt = await self._prepare(body)
        fields = {"blocks": join_names(prompt.names), "ttl_s": body.ttl}
        answers = await self._ask(prompt.workers, CommandKind.PIN, body.deadline, fields)
        return {"prompt_tokens": prompt.num_tokens, **answers}

    async def _unpin(self, raw: dict[str, Any]) -> dict[str, Any]:
        body = validate(ClusterPromptBody, raw)
        prompt = await self._prepare(body)
        fields = {"blocks": join_names(prompt.names)}
        answers = await self._ask(prompt.workers, CommandKind.UNPIN, body.deadline, fields)
        return {"prompt_tokens": prompt.num_tokens, **answers}

    async def _move(self, raw: dict[str, Any]) -> dict[str, Any]:
        body = validate(ClusterMoveBody, raw)
        prompt = await self._prepare(body)
        workers = {info.worker_id: info for info in prompt.workers}
        target = workers.get(WorkerId(body.to))
        if target is None:
            raise InvalidRequest(f"no worker {body.to!r} serves the model", param="to")
        ends_at = time.monotonic() + body.deadline
        fields = {"blocks": join_names(prompt.names)}
        found = await self._desk_or_raise().ask(
            prompt.workers, CommandKind.LOOKUP, min(DEADLINE_S, body.deadline), fields
        )
        held = {
            worker_id: command.outcome["matched_tokens"] // prompt.block_size
            for worker_id, command in found.items()
            if command.state is CommandState.DONE
        }
        has = held.get(target.worker_id, 0)
        source = self._choose_source(body, workers, held, target)
        if source is None or held[source.worker_id] <= has:
            return {
                "prompt_tokens": prompt.num_tokens,
                "workers": {target.worker_id: {"state": "done", "fetched_blocks": 0}},
                "complete": True,
            }
        missing = FetchRange(
            source.worker_id, source.block_address, has, held[source.worker_id] - has
        )
        left_s = max(0.1, ends_at - time.monotonic())
        answers = await self._ask([target], CommandKind.MOVE, left_s, fields | {"fetch": [missing]})
        return {"prompt_tokens": prompt.num_tokens, "source": source.worker_id, **answers}

    def _choose_source(
        self,
        body: ClusterMoveBody,
        workers: Mapping[WorkerId, WorkerInfo],
        held: Mapping[WorkerId, int],
        target: WorkerInfo,
    ) -> WorkerInfo | None:
        """Who holds most of a prompt, of those that serve blocks; None: nobody holds any.

        Raises: InvalidRequest for a source that was named and cannot serve.
        """
        if body.source is not None:
            source = workers.get(WorkerId(body.source))
            if source is None or source.worker_id not in held:
                raise InvalidRequest(f"worker {body.source!r} does not answer", param="source")
            if not source.block_address or source is target:
                raise InvalidRequest(f"worker {body.source!r} serves it no blocks", param="source")
            return source
        holders = [i for i in workers.values() if held.get(i.worker_id) and i is not target]
        sources = [info for info in holders if info.block_address]
        if holders and not sources:
            raise InvalidRequest("the workers that hold the prompt serve no blocks to others")
        return max(sources, key=lambda info: held[info.worker_id], default=None)

    async def _drain(self, raw: dict[str, Any]) -> dict[str, Any]:
        body = validate(ClusterDrainBody, raw)
        workers = self._registered(None, body.workers)
        fields = {"timeout_s": body.timeout}
        return await self._ask(workers, CommandKind.DRAIN, body.deadline, fields)

    async def _prepare(self, body: ClusterPromptBody) -> _Prompt:
        """The names of the prompt's blocks, and the workers that are meant.

        Raises: InvalidRequest, NoWorker, UnknownModel.
        """
        card = select_model(self._backend, body.model)
        workers = self._registered(card.model_id, body.workers)
        tokenizer = await self._backend.tokenizer(card.model_id)
        token_ids = await encode_prompt(body, tokenizer, card)
        root = self._registry.cache_root(card.model_id)
        names = hash_blocks(root.hash(body.salt(self._secret)), token_ids, root.block_size)
        return _Prompt(names, len(token_ids), workers, root.block_size)

    def _registered(self, model_id: str | None, wanted: list[str] | None) -> list[WorkerInfo]:
        """Workers that commands can be addressed to. Raises: NoWorker, InvalidRequest."""
        infos = {
            member.info.worker_id: member.info
            for member in self._registry
            if member.registered
            and member.state is not MemberState.REFUSED
            and model_id in (None, member.model_id)
        }
        if wanted is not None:
            if unknown := [worker_id for worker_id in wanted if worker_id not in infos]:
                raise InvalidRequest(f"no such worker: {', '.join(unknown)}", param="workers")
            infos = {worker_id: infos[worker_id] for worker_id in map(WorkerId, wanted)}
        if not infos:
            raise NoWorker("no worker is registered")
        return list(infos.values())

    async def _ask(
        self,
        workers: list[WorkerInfo],
        kind: CommandKind,
        deadline_s: float,
        fields: Mapping[str, Any],
    ) -> dict[str, Any]:
        commands = await self._desk_or_raise().ask(workers, kind, deadline_s, fields)
        answers = {worker_id: _answer(command) for worker_id, command in commands.items()}
        complete = all(command.state is CommandState.DONE for command in commands.values())
        return {"workers": answers, "complete": complete}

    def _desk_or_raise(self) -> CommandDesk:
        if self._desk is None:
            raise NoWorker("etcd has not been reached yet; try again", retry_after_s=1)
        return self._desk

    def _answering(
        self, act: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            has_body = request.can_read_body
            raw = await read_json(request, self._max_body_bytes) if has_body else {}
            try:
                return json_response(await act(raw))
            except (EtcdUnavailable, EtcdRefused) as error:
                reason = f"commands go through etcd, and it does not take them: {error}"
                raise NoWorker(reason, retry_after_s=1) from error

        return answering_errors(answer)


def _answer(command: Command) -> dict[str, Any]:
    answer: dict[str, Any] = {"state": command.state.value, **command.outcome}
    if command.error:
        answer["error"] = command.error
    return answer
