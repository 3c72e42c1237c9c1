"""Plain torch on any device: what runs wherever no faster kernels are to be had.

Nothing loops over tokens or heads. What all layers of one step share is worked out once per batch:
cos and sin of its rows, where K and V go, which token slots each sequence reads.

    decodes     grouped by context length (powers of two), one call of SDPA per group; the heads
                that share a KV head are the rows of its query
    prefills    one sequence at a time; a chunk attends to its past without a mask and to itself
                causally, and the two are merged by their log-sum-exp, as FlashDecoding does
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from xllm.engine.batch import Batch


class TorchLinear:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features = weight.shape[0]
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    rows: torch.Tensor
    """[b] int64: rows of the query, one per sequence."""
    blocks: torch.Tensor
    """[b, C] int64, C the longest context of the group; past a sequence's end, its first token's
    block again, so that memory that was never written is never read."""
    offsets: torch.Tensor
    """[C] or [b, C] int64: likewise, within the block."""
    mask: torch.Tensor
    """[b, 1, 1, C] bool: True where a token is."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    start: int
    end: int
    context_len: int
    blocks: torch.Tensor
    """[ceil(context_len / S)] int64."""


@dataclass(frozen=True, slots=True)
class _Rotation:
    batch: Batch
    cos_sin: torch.Tensor
    cos: torch.Tensor
    """[T, 1, D/2] float32."""
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class _StepPlan:
    batch: Batch
    written_rows: torch.Tensor | None
    """[W] int64: rows with a slot; None: all of them."""
    written_blocks: torch.Tensor
    """[W] int64."""
    written_offsets: torch.Tensor
    decodes: list[_DecodeGroup]
    prefills: list[_Prefill]


class TorchKernels:
    """Implements `Kernels`."""

    def __init__(self) -> None:
        self._last_rotation: _Rotation | None = None
        self._last_plan: _StepPlan | None = None

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> TorchLinear:
        return TorchLinear(weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        normed = F.rms_norm(total, weight.shape, weight.to(total.dtype), eps)
        return normed.to(x.dtype), total

    def rope_and_write(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos_sin: torch.Tensor,
        batch: Batch,
        kv_layer: torch.Tensor,
    ) -> None:
        rotation = self._rotation(batch, cos_sin)
        cos, sin = rotation.cos, rotation.sin
        for heads in (query, key):
            low, high = heads.float().chunk(2, dim=-1)
            heads.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
        plan = self._plan(batch, kv_layer.shape[2])
        if plan.written_rows is not None:
            key, value = key[plan.written_rows], value[plan.written_rows]
        kv_layer[plan.written_blocks, 0, plan.written_offsets] = key
        kv_layer[plan.written_blocks, 1, plan.written_offsets] = value

    def attention(
        self, query: torch.Tensor, batch: Batch, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        plan = self._plan(batch, kv_layer.shape[2])
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in plan.decodes:
            output[group.rows] = _attend_decodes(query[group.rows], group, kv_layer, scale)
        for prefill in plan.prefills:
            rows = slice(prefill.start, prefill.end)
            _attend_prefill(query[rows], output[rows], prefill, kv_layer, scale)
        return output

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def _rotation(self, batch: Batch, cos_sin: torch.Tensor) -> _Rotation:
        last = self._last_rotation
        if last is None or last.batch is not batch or last.cos_sin is not cos_sin:
            cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)
            last = self._last_rotation = _Rotation(batch, cos_sin, cos, sin)
        return last

    def _plan(self, batch: Batch, block_size: int) -> _StepPlan:
        last = self._last_plan
        if last is None or last.batch is not batch:
            last = self._last_plan = _plan_step(batch, block_size)
        return last


def _plan_step(batch: Batch, block_size: int) -> _StepPlan:
    slots = batch.slot_mapping
    written_rows: torch.Tensor | None = None
    if bool((slots < 0).any()):
        written_rows = (slots >= 0).nonzero().squeeze(1)
        slots = slots[written_rows]
    starts = batch.query_start_loc.tolist()
    context_lens = batch.context_lens.tolist()
    prefills = [
        _Prefill(
            start=starts[seq],
            end=starts[seq + 1],
            context_len=context_lens[seq],
            blocks=batch.block_tables[seq, : -(-context_lens[seq] // block_size)].long(),
        )
        for seq in range(batch.num_decodes, batch.num_seqs)
    ]
    return _StepPlan(
        batch=batch,
        written_rows=written_rows,
        written_blocks=slots // block_size,
        written_offsets=slots % block_size,
        decodes=list(_plan_decodes(batch, context_lens, block_size)),
        prefills=prefills,
    )


def _plan_decodes(batch: Batch, context_lens: list[int], block_size: int) -> Iterator[_DecodeGroup]:
    """Sequences whose contexts are within a factor of two share a group: little padding."""
    by_magnitude: defaultdict[int, list[int]] = defaultdict(list)
    for seq in range(batch.num_decodes):
        by_magnitude[context_lens[seq].bit_length()].append(seq)
    device = batch.context_lens.device
    for seqs in by_magnitude.values():
        longest = max(context_lens[seq] for seq in seqs)
        # A decode has one row, and decodes come first: sequence and row have the same number.
        rows = torch.tensor(seqs, device=device)
        tokens = torch.arange(longest, device=device)
        exists = tokens < batch.context_lens[rows].unsqueeze(1)
        tokens = torch.where(exists, tokens, 0)
        yield _DecodeGroup(
            rows=rows,
            blocks=batch.block_tables[rows].long().gather(1, tokens // block_size),
            offsets=tokens % block_size,
            mask=exists[:, None, None, :],
        )


def _attend_decodes(
    query: torch.Tensor, group: _DecodeGroup, kv_layer: torch.Tensor, scale: float
) -> torch.Tensor:
    """[b, H, D] -> [b, H, D]"""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = kv_layer.shape[3]
    keys, values = (
        kv_layer[group.blocks, part, group.offsets].transpose(1, 2) for part in (0, 1)
    )  # [b, G, C, D]
    grouped = query.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = group.mask.expand(-1, 1, grouped.shape[2], -1)
    attended = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)
    return attended.reshape(num_seqs, num_heads, head_dim)


def _attend_prefill(
    query: torch.Tensor,
    output: torch.Tensor,
    prefill: _Prefill,
    kv_layer: torch.Tensor,
    scale: float,
) -> None:
    """Fills `output` [q, H, D] from query [q, H, D]."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = kv_layer.shape[3]
    context_len = prefill.context_len
    shared = num_heads // num_kv_heads
    keys, values = (
        kv_layer[prefill.blocks, part]
        .reshape(-1, num_kv_heads, head_dim)[:context_len]
        .transpose(0, 1)
        .expand(shared, -1, -1, -1)
        for part in (0, 1)
    )  # [H/G, G, C, D], the first dimension without memory of its own
    by_head = query.view(num_rows, num_kv_heads, shared, head_dim).permute(2, 1, 0, 3)
    past = context_len - num_rows
    if past == 0:
        attended = F.scaled_dot_product_attention(
            by_head, keys, values, is_causal=True, scale=scale
        )
    elif query.device.type == "cpu":
        # What scaled_dot_product_attention calls on a CPU, and the only way to its log-sum-exp.
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        before, before_lse = flash(
            by_head, keys[:, :, :past], values[:, :, :past], 0.0, False, scale=scale
        )
        itself, itself_lse = flash(
            by_head, keys[:, :, past:], values[:, :, past:], 0.0, True, scale=scale
        )
        share = torch.sigmoid(before_lse - itself_lse).unsqueeze(-1)
        attended = torch.lerp(itself.float(), before.float(), share)
    else:
        mask = causal_lower_right(num_rows, context_len)
        attended = F.scaled_dot_product_attention(by_head, keys, values, mask, scale=scale)
    output.view(num_rows, num_kv_heads, shared, head_dim).copy_(attended.permute(2, 1, 0, 3))
