"""Which kernels, and which decoder made of them, run on which device."""

from __future__ import annotations

import torch

from xllm.engine.kernels.interface import Decoder, Kernels
from xllm.engine.kernels.torch_kernels import TorchKernels
from xllm.engine.model import ComposedDecoder
from xllm.engine.model_config import DecoderConfig
from xllm.engine.weights import WeightSource

_FLASHINFER_DTYPES = (torch.bfloat16, torch.float16)


def build_decoder(
    config: DecoderConfig,
    weights: WeightSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    max_seqs: int,
    block_size: int,
) -> Decoder:
    """The fastest decoder that works here.

    Raises:
        ConfigError: what the device needs is not installed.
    """
    if device.type == "cuda" and dtype in _FLASHINFER_DTYPES:
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
    kernels = select_kernels(device, dtype)
    return ComposedDecoder(config, weights, kernels, max_model_len, device)


def select_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels that work here. Faster ones than torch's go in front of the return."""
    if device.type == "cuda" and dtype in _FLASHINFER_DTYPES:
        from xllm.engine.kernels.cuda import FlashInferKernels

        return FlashInferKernels(device)
    return TorchKernels()
