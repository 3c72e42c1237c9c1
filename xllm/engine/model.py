"""The decoder: Llama's layer, with the switches of `DecoderConfig`, composed of `Kernels`.

    x = embed(ids)
    per layer:  y = norm(x);  x += o(attention(rope(qk_norm(qkv(y)))))
                y = norm(x);  x += down(silu(gate(y)) * up(y))
    hidden = norm(x)[logits_indices];  logits = lm_head(hidden)

The addition of one half-layer is fused with the norm of the next, so the float32 sum `residual`
runs one step behind `x`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xllm.engine.batch import Batch
from xllm.engine.kernels.interface import Kernels, Linear
from xllm.engine.model_config import DecoderConfig
from xllm.engine.rope import build_cos_sin
from xllm.engine.weights import WeightSource


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_attention_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class ComposedDecoder:
    """Implements `Decoder` on any `Kernels`."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: WeightSource,
        kernels: Kernels,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._config = config
        self._kernels = kernels
        self._scale = config.head_dim**-0.5
        self._cos_sin = build_cos_sin(config, max_model_len).to(device)
        self._embedding = weights.embedding()
        self._layers = [_load_layer(weights, index, kernels) for index in range(config.num_layers)]
        self._final_norm = weights.final_norm()
        lm_head = self._embedding if config.tie_word_embeddings else weights.lm_head()
        self._lm_head = kernels.linear(lm_head, None)

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        kernels, eps = self._kernels, self._config.rms_norm_eps
        x = self._embedding[batch.input_ids]
        residual = x.float()
        x = kernels.rms_norm(x, self._layers[0].input_norm, eps)
        for index, layer in enumerate(self._layers):
            if index > 0:
                x, residual = kernels.add_rms_norm(x, residual, layer.input_norm, eps)
            x = layer.o(self._attend(layer, x, batch, kv_cache[:, index]))
            x, residual = kernels.add_rms_norm(x, residual, layer.post_attention_norm, eps)
            x = layer.down(kernels.silu_mul(layer.gate_up(x)))
        x, residual = x[batch.logits_indices], residual[batch.logits_indices]
        return kernels.add_rms_norm(x, residual, self._final_norm, eps)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._lm_head(hidden).float()

    def _attend(
        self, layer: _Layer, x: torch.Tensor, batch: Batch, kv_layer: torch.Tensor
    ) -> torch.Tensor:
        """[T, E] -> [T, H D]"""
        config, kernels = self._config, self._kernels
        num_rows = x.shape[0]
        heads = layer.qkv(x).view(num_rows, -1, config.head_dim)
        key_start, value_start = config.num_heads, config.num_heads + config.num_kv_heads
        query = heads[:, :key_start]
        key = heads[:, key_start:value_start]
        value = heads[:, value_start:]
        if layer.q_norm is not None and layer.k_norm is not None:
            query = kernels.rms_norm(query, layer.q_norm, config.rms_norm_eps)
            key = kernels.rms_norm(key, layer.k_norm, config.rms_norm_eps)
        kernels.rope_and_write(query, key, value, self._cos_sin, batch, kv_layer)
        return kernels.attention(query, batch, kv_layer, self._scale).view(num_rows, -1)


def _load_layer(source: WeightSource, index: int, kernels: Kernels) -> _Layer:
    weights = source.layer(index)
    return _Layer(
        input_norm=weights.input_norm,
        qkv=kernels.linear(weights.qkv, weights.qkv_bias),
        q_norm=weights.q_norm,
        k_norm=weights.k_norm,
        o=kernels.linear(weights.o, weights.o_bias),
        post_attention_norm=weights.post_attention_norm,
        gate_up=kernels.linear(weights.gate_up, weights.gate_up_bias),
        down=kernels.linear(weights.down, weights.down_bias),
    )
