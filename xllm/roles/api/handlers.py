"""The endpoints that generate: admission, body to job, job to answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from xllm.config import ApiConfig
from xllm.errors import Overloaded
from xllm.protocol import GenerateRequest, ModelCard
from xllm.roles.api.anthropic_messages import MessagesFormat
from xllm.roles.api.anthropic_requests import CountTokensRequest, MessagesRequest
from xllm.roles.api.auth import ANYBODY, CALLER, Caller
from xllm.roles.api.body import read_json, validate
from xllm.roles.api.chat import ChatFormat
from xllm.roles.api.complete import Job, respond_streamed, respond_whole
from xllm.roles.api.completions import CompletionFormat
from xllm.roles.api.format import Format
from xllm.roles.api.generations import Generations
from xllm.roles.api.info import json_response, select_model
from xllm.roles.api.prompts import Prompt, PromptEncoder
from xllm.roles.api.reading.plan import ReadingPlan, plan_reading
from xllm.roles.api.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest
from xllm.roles.api.responses_format import ResponsesFormat
from xllm.roles.api.responses_requests import ResponsesRequest
from xllm.roles.api.sample import TextOptions
from xllm.roles.api.sampling import choose_seed, sampling_params
from xllm.roles.backend import Backend
from xllm.telemetry import Metrics
from xllm.tokenizer import Tokenizer
from xllm.tracing import NO_SPAN, Span


@dataclass(slots=True)
class Call:
    """What every response to one HTTP request says about it in its headers."""

    request_id: str
    received_at: float
    """`time.monotonic()`."""
    generations: Generations | None = None
    span: Span = NO_SPAN


NewFormat = Callable[..., Format]
"""Takes what `Format` takes."""
_MANY_CHARS = 1 << 20
"""Work on schemas is not done between other requests' tokens."""

CALL = web.RequestKey("call", Call)


class GenerationHandlers:
    def __init__(
        self, backend: Backend, encoder: PromptEncoder, config: ApiConfig, metrics: Metrics
    ) -> None:
        self._backend = backend
        self._encoder = encoder
        self._config = config
        self._metrics = metrics
        self._num_running = 0

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        with self._admit():
            body = validate(ChatCompletionRequest, await self._read(request))
            card, tokenizer = await self._model(body)
            response_id = f"chatcmpl-{uuid.uuid4().hex}"
            return await self._chat(request, body, card, tokenizer, ChatFormat, response_id)

    async def _chat(
        self,
        request: web.Request,
        body: ChatCompletionRequest,
        card: ModelCard,
        tokenizer: Tokenizer,
        new_format: NewFormat,
        response_id: str,
    ) -> web.StreamResponse:
        salt = _salt(request, body.cache_salt)
        prompt = await self._encoder.chat(body, tokenizer, salt)
        num_chars = _MANY_CHARS if body.wants_form or body.tools else 0
        plan = await self._encoder.run(
            lambda: plan_reading(body, prompt, tokenizer, self._config), num_chars
        )
        return await self._respond(
            request, body, card, tokenizer, [prompt], new_format, response_id, plan, salt
        )

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """OpenAI's newer endpoint, as a chat."""
        with self._admit():
            body = validate(ResponsesRequest, await self._read(request))
            chat = body.as_chat()
            card, tokenizer = await self._model(chat)
            new_format = partial(ResponsesFormat, request=body)
            response_id = f"resp_{uuid.uuid4().hex}"
            return await self._chat(request, chat, card, tokenizer, new_format, response_id)

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """Anthropic's endpoint, as a chat."""
        with self._admit():
            chat = validate(MessagesRequest, await self._read(request)).as_chat()
            card, tokenizer = await self._model(chat)
            response_id = f"msg_{uuid.uuid4().hex}"
            return await self._chat(request, chat, card, tokenizer, MessagesFormat, response_id)

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        chat = validate(CountTokensRequest, await self._read(request)).as_chat()
        _, tokenizer = await self._model(chat)
        prompt = await self._encoder.chat(chat, tokenizer, _salt(request, chat.cache_salt))
        return json_response({"input_tokens": len(prompt.token_ids)})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        with self._admit():
            body = validate(CompletionRequest, await self._read(request))
            card, tokenizer = await self._model(body)
            salt = _salt(request, body.cache_salt)
            prompts = await self._encoder.completion(body, tokenizer, card, salt)
            num_chars = _MANY_CHARS if body.wants_form else 0
            grammar = await self._encoder.run(lambda: body.answer_grammar() or "", num_chars)
            plan = ReadingPlan(grammar=grammar)
            response_id = f"cmpl-{uuid.uuid4().hex}"
            return await self._respond(
                request, body, card, tokenizer, prompts, CompletionFormat, response_id, plan, salt
            )

    @contextmanager
    def _admit(self) -> Iterator[None]:
        """Raises: Overloaded."""
        if self._num_running >= self._config.max_concurrent_requests:
            raise Overloaded(
                f"{self._num_running} requests are running, which is this server's limit; "
                "try again later"
            )
        self._num_running += 1
        self._metrics.api_requests_in_flight.inc()
        try:
            yield
        finally:
            self._num_running -= 1
            self._metrics.api_requests_in_flight.dec()

    async def _read(self, request: web.Request) -> dict[str, object]:
        return await read_json(request, self._config.max_body_size)

    async def _model(self, body: GenerationRequest) -> tuple[ModelCard, Tokenizer]:
        await self._backend.until_reachable(body.model)
        card = select_model(self._backend, body.model)
        self._backend.admit(card.model_id)
        return card, await self._backend.tokenizer(card.model_id)

    async def _respond(
        self,
        request: web.Request,
        body: GenerationRequest,
        card: ModelCard,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        new_format: NewFormat,
        response_id: str,
        plan: ReadingPlan,
        salt: str,
    ) -> web.StreamResponse:
        call = request[CALL]
        caller = request.get(CALLER, ANYBODY)
        with_logprobs = body.num_logprobs is not None
        job = Job(
            requests=_generate_requests(
                *(body, card, tokenizer, prompts, response_id),
                salt=salt,
                grammar=plan.grammar,
                traceparent=call.span.traceparent,
            ),
            prompts=prompts,
            tokenizer=tokenizer,
            text_options=TextOptions(
                stops=body.stops,
                min_tokens=body.min_tokens or 0,
                with_scores=with_logprobs,
                skip_special_tokens=body.skip_special_tokens is not False,
                kept_tokens=plan.kept_tokens,
            ),
            new_reader=plan.new_reader,
            echo=isinstance(body, CompletionRequest) and bool(body.echo),
            format=new_format(
                tokenizer,
                response_id=response_id,
                created=int(time.time()),
                model=card.model_id,
                with_logprobs=with_logprobs,
                include_usage=body.include_usage,
            ),
            received_at=call.received_at,
            take_output=caller.take_tokens,
            span=call.span,
        )
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        caller.check_prompt(num_prompt_tokens)
        call.generations = Generations(self._backend, job.requests)
        async with call.generations as generations:
            caller.take_tokens(num_prompt_tokens)
            if body.stream:
                return await respond_streamed(job, generations, self._metrics, request)
            return await respond_whole(job, generations, self._metrics)


def _salt(request: web.Request, request_salt: str | None) -> str:
    """Of the tenant."""
    caller: Caller = request.get(CALLER, ANYBODY)
    return caller.salt(request_salt or "")


def _generate_requests(
    body: GenerationRequest,
    card: ModelCard,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    response_id: str,
    *,
    salt: str,
    grammar: str,
    traceparent: str,
) -> list[GenerateRequest]:
    """One per prompt. Raises: InvalidRequest."""
    seed = choose_seed(body.seed)
    return [
        GenerateRequest(
            request_id=response_id if len(prompts) == 1 else f"{response_id}-{i}",
            model_id=card.model_id,
            prompt_ids=prompt.token_ids,
            sampling=sampling_params(
                body,
                seed=seed,
                num_prompt_tokens=len(prompt.token_ids),
                defaults=tokenizer.default_sampling,
                card=card,
                grammar=grammar,
            ),
            n=body.n or 1,
            salt=salt,
            priority=body.priority or 0,
            traceparent=traceparent,
        )
        for i, prompt in enumerate(prompts)
    ]
