"""What one engine can take: limits of a step, and of a request."""

from __future__ import annotations

from xllm.config import EngineConfig
from xllm.engine.scheduler import SchedulerLimits
from xllm.errors import InvalidRequest
from xllm.protocol import GenerateRequest


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
    if max(request.prompt_ids) >= vocab_size or min(request.prompt_ids) < 0:
        raise InvalidRequest(f"token ids must be from 0 to {vocab_size - 1}", param="prompt")
