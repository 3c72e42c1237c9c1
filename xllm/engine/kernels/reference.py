"""The truth: every operation written as its definition, in float32, one sequence at a time.

Slow on purpose. Nothing here is shared with the implementations that are tested against it.
"""

from __future__ import annotations

import torch

from xllm.engine.batch import Batch


class ReferenceLinear:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features = weight.shape[0]
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float() @ self._weight.float().T
        if self._bias is not None:
            y = y + self._bias.float()
        return y.to(x.dtype)


class ReferenceKernels:
    """Implements `Kernels`."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ReferenceLinear:
        return ReferenceLinear(weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        mean_square = wide.square().mean(dim=-1, keepdim=True)
        return (wide / (mean_square + eps).sqrt() * weight.float()).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps).to(x.dtype), total

    def rope_and_write(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos_sin: torch.Tensor,
        batch: Batch,
        kv_layer: torch.Tensor,
    ) -> None:
        block_size = kv_layer.shape[2]
        for row in range(batch.num_tokens):
            cos, sin = cos_sin[batch.positions[row]].chunk(2)
            for heads in (query[row], key[row]):
                low, high = heads.float().chunk(2, dim=-1)
                heads.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
            slot = int(batch.slot_mapping[row])
            if slot >= 0:
                block, offset = divmod(slot, block_size)
                kv_layer[block, 0, offset] = key[row]
                kv_layer[block, 1, offset] = value[row]

    def attention(
        self, query: torch.Tensor, batch: Batch, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        block_size, num_kv_heads = kv_layer.shape[2:4]
        heads_per_kv_head = query.shape[1] // num_kv_heads
        for seq in range(batch.num_seqs):
            start, end = (int(row) for row in batch.query_start_loc[seq : seq + 2])
            context_len = int(batch.context_lens[seq])
            tokens = torch.arange(context_len, device=query.device)
            blocks = batch.block_tables[seq, tokens // block_size].long()
            keys, values = (
                kv_layer[blocks, part, tokens % block_size]
                .float()
                .repeat_interleave(heads_per_kv_head, dim=1)
                for part in (0, 1)
            )  # [context, H, D]
            scores = torch.einsum("qhd,chd->hqc", query[start:end].float(), keys) * scale
            last_seen = context_len - (end - start) + torch.arange(end - start, device=query.device)
            scores.masked_fill_(tokens > last_seen.unsqueeze(1), -torch.inf)
            weights = torch.softmax(scores, dim=-1)
            output[start:end] = torch.einsum("hqc,chd->qhd", weights, values)
        return output

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)
