"""Which decoder runs on which device."""

from __future__ import annotations

import logging

import torch

from xllm.engine.kernels.cpu.build import BuildError, build_library, select_isa
from xllm.engine.kernels.cpu.decoder import NativeDecoder
from xllm.engine.kernels.cpu.native import Pool, load_library
from xllm.engine.kernels.interface import Decoder
from xllm.engine.kernels.torch_kernels import TorchKernels
from xllm.engine.model import ComposedDecoder
from xllm.engine.model_config import DecoderConfig
from xllm.engine.weights import WeightSource

logger = logging.getLogger(__name__)

_FLASHINFER_DTYPES = (torch.bfloat16, torch.float16)
_FLASHINFER_HEAD_DIMS = (64, 128, 256)


def load_decoder(
    config: DecoderConfig,
    weights: WeightSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    max_seqs: int,
    block_size: int,
    num_threads: int,
) -> Decoder:
    """The fastest decoder that works here.

    Raises:
        ConfigError: what the device needs is not installed.
    """
    has_flashinfer = dtype in _FLASHINFER_DTYPES and config.head_dim in _FLASHINFER_HEAD_DIMS
    if device.type == "cuda" and has_flashinfer:
        from xllm.engine.kernels.cuda_graphs import CudaDecoder

        return CudaDecoder(
            config,
            weights,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_seqs=max_seqs,
            block_size=block_size,
        )
    if device.type == "cpu" and NativeDecoder.supports(config, dtype):
        pool = _native_pool(num_threads)
        if pool is not None:
            return NativeDecoder(config, weights, pool, max_model_len)
    return ComposedDecoder(config, weights, TorchKernels(), max_model_len, device)


def _native_pool(num_threads: int) -> Pool | None:
    """Builds the native kernels if need be; None, with a warning, where that cannot be done."""
    try:
        isa = select_isa()
        library = load_library(build_library(isa))
    except BuildError as error:
        logger.warning(
            "native_kernels_missing reason=%r effect=%r",
            *(str(error), "torch's operations run instead: decoding is 3 to 4 times slower"),
        )
        return None
    logger.info("native_kernels isa=%s threads=%d", isa.name, num_threads)
    return Pool(library, num_threads)
