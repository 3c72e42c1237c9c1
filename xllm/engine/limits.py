"""What one engine can take: limits of a step, and of a request."""

from __future__ import annotations

import math
from collections.abc import Collection

from xllm.config import EngineConfig
from xllm.engine.scheduler import SchedulerLimits
from xllm.errors import InvalidRequest
from xllm.protocol import GenerateRequest, SamplingParams

MAX_SAMPLES = 512
"""Of one prompt: more than the public API lets a client ask for."""
MAX_LOGPROBS = 100
"""Alternatives per token; likewise."""


def scheduler_limits(config: EngineConfig, max_model_len: int) -> SchedulerLimits:
    return SchedulerLimits(
        max_tokens_per_batch=config.max_tokens_per_batch,
        max_seqs_per_batch=config.max_seqs_per_batch,
        max_model_len=max_model_len,
        max_tokens_per_chunk=config.max_tokens_per_chunk_for_prefill,
        enable_chunked_prefill=config.enable_chunked_prefill,
        prefetch_timeout_s=config.prefetch_timeout / 1e3 if config.prefetch_timeout else None,
    )


def check_request(request: GenerateRequest, max_model_len: int, vocab_size: int) -> None:
    """Raises: InvalidRequest."""
    num_tokens = len(request.prompt_ids) + max(request.sampling.max_tokens, 1)
    if not request.prompt_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if request.sampling.max_tokens == 0:
        num_tokens -= 1
    if num_tokens > max_model_len:
        raise InvalidRequest(
            f"{len(request.prompt_ids)} prompt tokens and up to {request.sampling.max_tokens} "
            f"output tokens are more than the {max_model_len} that this worker can hold",
            param="max_tokens",
        )
    _check_token_ids(request.prompt_ids, vocab_size, "prompt")
    _check_token_ids(request.output_ids, vocab_size, "output_ids")
    _check_token_ids(request.sampling.logit_bias, vocab_size, "logit_bias")
    if len(request.output_ids) > request.sampling.max_tokens:
        raise InvalidRequest("more output than max_tokens", param="output_ids")
    if not 0 < request.n <= MAX_SAMPLES or not 0 <= request.index <= MAX_SAMPLES:
        raise InvalidRequest(f"must be from 1 to {MAX_SAMPLES}", param="n")
    _check_sampling(request.sampling)


def _check_token_ids(token_ids: Collection[int], vocab_size: int, param: str) -> None:
    if token_ids and (max(token_ids) >= vocab_size or min(token_ids) < 0):
        raise InvalidRequest(f"token ids must be from 0 to {vocab_size - 1}", param=param)


def _check_sampling(sampling: SamplingParams) -> None:
    """The public API has checked more; here it is that no request may harm the others of its
    batch, whoever sent it."""
    numbers = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
    }
    for param, number in numbers.items():
        if not math.isfinite(number):
            raise InvalidRequest("must be a finite number", param=param)
    if not all(map(math.isfinite, sampling.logit_bias.values())):
        raise InvalidRequest("must be finite numbers", param="logit_bias")
    if sampling.temperature < 0:
        raise InvalidRequest("must not be negative", param="temperature")
    if sampling.repetition_penalty <= 0:
        raise InvalidRequest("must be positive", param="repetition_penalty")
    for param, count in (
        ("logprobs", sampling.logprobs),
        ("prompt_logprobs", sampling.prompt_logprobs),
    ):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise InvalidRequest(f"must be from 0 to {MAX_LOGPROBS}", param=param)
