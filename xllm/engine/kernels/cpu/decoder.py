"""A whole decoder in native code: one call per step for all layers, one for the logits."""

from __future__ import annotations

import ctypes

import torch

from xllm.engine.batch import Batch
from xllm.engine.kernels.cpu import native
from xllm.engine.kernels.cpu.native import LayerStruct, ModelStruct, PackedLinear, Pool, StepStruct
from xllm.engine.model_config import DecoderConfig
from xllm.engine.rope import build_cos_sin
from xllm.engine.weights import LayerWeights, WeightSource


class NativeDecoder:
    """Implements `Decoder` of kernels/interface.py.

    Weights are held once, packed; a tied embedding is read back out of the packed LM head. The
    residual is float32, so results are a little nearer to the truth than bf16 arithmetic.
    """

    def __init__(
        self, config: DecoderConfig, weights: WeightSource, pool: Pool, max_model_len: int
    ) -> None:
        self._pool = pool
        self._hidden_size = config.hidden_size
        self._vocab_size = config.vocab_size
        self._kept: list[object] = []
        self._cache_address = 0
        self.weight_bytes = 0
        """Read by a decode step: all but an untied embedding."""

        embedding = weights.embedding()
        self._dtype = embedding.dtype
        tied = config.tie_word_embeddings
        lm_head = self._pack(embedding if tied else weights.lm_head(), None)
        cos_sin = self._keep(build_cos_sin(config, max_model_len))
        final_norm = self._vector(weights.final_norm())
        layers = (LayerStruct * config.num_layers)()
        for index in range(config.num_layers):
            layers[index] = self._load_layer(weights.layer(index))
        self._model = ModelStruct(
            dtype=native.DTYPES[self._dtype],
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            embedding=None if tied else self._keep(embedding.contiguous()),
            cos_sin=cos_sin,
            final_norm=final_norm,
            lm_head=lm_head,
            layers=layers,
        )

    @property
    def library(self) -> ctypes.CDLL:
        return self._pool.library

    @staticmethod
    def supports(config: DecoderConfig, dtype: torch.dtype) -> bool:
        head_dim = config.head_dim
        return dtype in native.DTYPES and head_dim % 2 == 0 and head_dim <= native.MAX_HEAD_DIM

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        assert kv_cache.dtype == self._dtype
        if kv_cache.data_ptr() != self._cache_address:
            self._cache_address = kv_cache.data_ptr()
            native.advise_huge_pages(kv_cache)
        hidden = torch.empty(batch.logits_indices.shape[0], self._hidden_size, dtype=self._dtype)
        step = StepStruct(
            native.batch_struct(batch),
            batch.input_ids.data_ptr(),
            native.kv_layer_struct(kv_cache[:, 0]),
            kv_cache.stride(1),
            batch.logits_indices.data_ptr(),
            hidden.shape[0],
            hidden.data_ptr(),
        )
        self._pool.library.xllm_forward(
            self._pool.handle, ctypes.byref(self._model), ctypes.byref(step)
        )
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.contiguous()
        logits = torch.empty(hidden.shape[0], self._vocab_size, dtype=torch.float32)
        self._pool.library.xllm_logits(
            self._pool.handle,
            ctypes.byref(self._model),
            hidden.data_ptr(),
            hidden.shape[0],
            logits.data_ptr(),
        )
        return logits

    def _load_layer(self, weights: LayerWeights) -> LayerStruct:
        return LayerStruct(
            qkv=self._pack(weights.qkv, weights.qkv_bias),
            o=self._pack(weights.o, weights.o_bias),
            gate_up=self._pack(weights.gate_up, weights.gate_up_bias, gated=True),
            down=self._pack(weights.down, weights.down_bias),
            input_norm=self._vector(weights.input_norm),
            post_norm=self._vector(weights.post_attention_norm),
            q_norm=None if weights.q_norm is None else self._vector(weights.q_norm),
            k_norm=None if weights.k_norm is None else self._vector(weights.k_norm),
        )

    def _pack(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool = False
    ) -> native.LinearStruct:
        packed = PackedLinear(self._pool, weight, bias, gated=gated)
        self._kept.append(packed)
        self.weight_bytes += packed.num_bytes
        return packed.struct

    def _vector(self, tensor: torch.Tensor) -> int:
        return self._keep(tensor.float().contiguous())

    def _keep(self, tensor: torch.Tensor) -> int:
        """Keeps it alive as long as the decoder: -> its address."""
        self._kept.append(tensor)
        return tensor.data_ptr()
