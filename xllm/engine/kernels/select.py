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
from xllm.engine.weights import Checkpoint

logger = logging.getLogger(__name__)


def load_decoder(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    num_threads: int,
) -> Decoder:
    """The fastest decoder that works here, with the weights of `checkpoint`."""
    if device.type == "cpu" and NativeDecoder.supports(config, dtype):
        pool = _native_pool(num_threads)
        if pool is not None:
            return NativeDecoder(config, checkpoint, pool, max_model_len)
    return ComposedDecoder(config, checkpoint, TorchKernels(), max_model_len, device)


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
