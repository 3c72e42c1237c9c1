"""What one engine can take: limits of a step, and of a request."""

from __future__ import annotations

from collections.abc import Collection

from xllm.config import EngineConfig
from xllm.engine.scheduler import SchedulerLimits
from xllm.errors import InvalidRequest
from xllm.protocol import MAX_N, GenerateRequest, SamplingParams

_MAX_INT32 = 2**31 - 1
_MAX_GRAMMAR_CHARS = 4 << 20
"""Masters refuse clients' schemas that are a quarter of that."""
_MAX_FLOAT = 1e6
"""Far beyond what is of use, and far from what float32 cannot hold."""


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
    """Whatever the scheduler, the decoder and the sampler take for granted.

    A client's mistake is refused long before; this is for masters, of which a worker believes
    nothing that would harm other requests.

    Raises: InvalidRequest.
    """
    sampling = request.sampling
    num_tokens = len(request.prompt_ids) + max(sampling.max_tokens, 1)
    if not request.prompt_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if sampling.max_tokens == 0:
        num_tokens -= 1
    if num_tokens > max_model_len:
        raise InvalidRequest(
            f"{len(request.prompt_ids)} prompt tokens and up to {sampling.max_tokens} "
            f"output tokens are more than the {max_model_len} that this worker can hold",
            param="max_tokens",
        )
    if len(sampling.grammar) > _MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"the grammar has over {_MAX_GRAMMAR_CHARS} characters", param="grammar"
        )
    _check_token_ids("prompt", request.prompt_ids, vocab_size)
    _check_samples(request)
    _check_token_ids("output_ids", request.output_ids, vocab_size)
    _check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_token_ids("logit_bias", sampling.logit_bias, vocab_size)
    _check_numbers(sampling, vocab_size)


def _check_token_ids(param: str, token_ids: Collection[int], vocab_size: int) -> None:
    if token_ids and (max(token_ids) >= vocab_size or min(token_ids) < 0):
        raise InvalidRequest(f"token ids must be from 0 to {vocab_size - 1}", param=param)


def _check_samples(request: GenerateRequest) -> None:
    if not 1 <= request.n <= MAX_N:
        raise InvalidRequest(f"n must be from 1 to {MAX_N}, not {request.n}", param="n")
    if not 0 <= request.index <= _MAX_INT32:
        raise InvalidRequest(f"sample {request.index} cannot be numbered", param="index")
    if request.output_ids and (
        request.n != 1 or len(request.output_ids) >= request.sampling.max_tokens
    ):
        raise InvalidRequest(
            f"{len(request.output_ids)} output tokens of {request.sampling.max_tokens} with "
            f"n = {request.n}: nothing is left to be done",
            param="output_ids",
        )


def _check_numbers(sampling: SamplingParams, vocab_size: int) -> None:
    for name, low, high in (
        ("temperature", 0.0, _MAX_FLOAT),
        ("top_p", 0.0, 1.0),
        ("top_k", 0, _MAX_INT32),
        ("min_p", 0.0, 1.0),
        ("seed", 0, 2**63 - 1),
        ("max_tokens", 0, _MAX_INT32),
        ("min_tokens", 0, _MAX_INT32),
        ("presence_penalty", -_MAX_FLOAT, _MAX_FLOAT),
        ("frequency_penalty", -_MAX_FLOAT, _MAX_FLOAT),
        ("repetition_penalty", 1e-6, _MAX_FLOAT),
        ("logprobs", 0, vocab_size),
        ("prompt_logprobs", 0, vocab_size),
    ):
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:
            raise InvalidRequest(f"{name} must be from {low} to {high}, not {value}", param=name)
    if not all(-_MAX_FLOAT <= bias <= _MAX_FLOAT for bias in sampling.logit_bias.values()):
        raise InvalidRequest("logit_bias must be of finite numbers", param="logit_bias")
