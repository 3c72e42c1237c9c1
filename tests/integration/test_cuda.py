"""The CUDA path on a GPU: each kernel against `reference.py`, the decoder, graphs, copies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden.harness import Lane, make_batch, make_lanes
from tests.golden.tiny_models import TINY_MODELS, TinyModel, prompt_ids, write_model
from xllm.config import EngineConfig
from xllm.engine.batch import Batch, build_batch
from xllm.engine.device_blocks import device_blocks
from xllm.engine.kernels.reference import ReferenceKernels
from xllm.engine.model import ComposedDecoder
from xllm.engine.request import Sequence, SequenceState
from xllm.engine.runner import Runner
from xllm.engine.scheduler import ScheduledSequence, StepPlan
from xllm.engine.staging import PinnedStaging
from xllm.engine.weights import Checkpoint
from xllm.protocol import GenerateRequest, SamplingParams

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

REFERENCE = ReferenceKernels()
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
HEADS_64 = {"head_dim": 64, "hidden_size": 256}
MODEL = TinyModel(TINY_MODELS["llama"].config | HEADS_64)
QK_NORM_MODEL = TinyModel(TINY_MODELS["qwen3"].config | HEADS_64)
BF16 = {"rtol": 2e-2, "atol": 2e-2}


def to_gpu(batch: Batch) -> Batch:
    tensors = {
        name: getattr(batch, name).cuda()
        for name in ("input_ids", "positions", "slot_mapping", "query_start_loc", "context_lens")
    }
    tables = batch.block_tables.clamp(max=1 << 20).cuda()
    return replace(
        batch, block_tables=tables, logits_indices=batch.logits_indices.cuda(), **tensors
    )


def make_runner(folder: Path, device: str) -> Runner:
    config = EngineConfig(
        device=device,
        dtype="bfloat16",
        block_size=16,
        max_cache_size=8 << 20,
        max_model_len=256,
        max_seqs_per_batch=8,
    )
    return Runner(config, folder)


@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_rope_write_and_attention(block_size: int) -> None:
    """Decodes, one of them written already, and prefills with and without a past."""
    from xllm.engine.kernels.cuda import FlashInferKernels

    torch.manual_seed(0)
    past = [100, 37, 0, 64]
    rows = [1, 1, 45, 70]
    lanes: list[Lane] = []
    num_blocks = 0
    for start, num_rows in zip(past, rows, strict=True):
        needed = -(-(start + num_rows) // block_size)
        blocks = list(range(num_blocks, num_blocks + needed))
        num_blocks += needed
        lanes.append(Lane([0] * (start + num_rows), blocks, start))
    lanes[1].num_written = past[1] + 1
    batch = make_batch(list(zip(lanes, rows, strict=True)), block_size)
    num_rows = sum(rows)
    fused = torch.randn(num_rows, HEADS + 2 * KV_HEADS, HEAD_DIM).bfloat16()
    cache = torch.randn(num_blocks, 3, 2, block_size, KV_HEADS, HEAD_DIM).bfloat16()
    cos_sin = torch.rand(256, HEAD_DIM) * 2 - 1
    outcomes = []
    for kernels, device in ((REFERENCE, "cpu"), (FlashInferKernels(torch.device("cuda")), "cuda")):
        copied, kv_cache = fused.clone().to(device), cache.clone().to(device)
        query, key, value = copied.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        moved = batch if device == "cpu" else to_gpu(batch)
        kernels.rope_and_write(query, key, value, cos_sin.to(device), moved, kv_cache[:, 1])
        attended = kernels.attention(query, moved, kv_cache[:, 1], HEAD_DIM**-0.5)
        outcomes.append([tensor.cpu() for tensor in (query, key, kv_cache, attended)])
    for expected, actual in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, **BF16)
    assert torch.equal(outcomes[0][2][:, [0, 2]], outcomes[1][2][:, [0, 2]])


def test_norms_and_activation() -> None:
    from xllm.engine.kernels.cuda import FlashInferKernels

    torch.manual_seed(0)
    kernels = FlashInferKernels(torch.device("cuda"))
    x, weight = torch.randn(5, 576).bfloat16(), torch.randn(576).bfloat16()
    residual = torch.randn(5, 576)
    expected = REFERENCE.add_rms_norm(x, residual, weight, 1e-5)
    actual = kernels.add_rms_norm(x.cuda(), residual.cuda(), weight.cuda(), 1e-5)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, **BF16)
    normed = kernels.rms_norm(x.cuda(), weight.cuda(), 1e-5)
    torch.testing.assert_close(normed.cpu(), REFERENCE.rms_norm(x, weight, 1e-5), **BF16)
    heads = torch.randn(5, 6, 64).bfloat16()
    strided, weight = heads[:, 1:4], torch.randn(64).bfloat16()
    normed = kernels.rms_norm(heads.cuda()[:, 1:4], weight.cuda(), 1e-5)
    torch.testing.assert_close(normed.cpu(), REFERENCE.rms_norm(strided, weight, 1e-5), **BF16)
    product = kernels.silu_mul(x.cuda())
    torch.testing.assert_close(product.cpu(), REFERENCE.silu_mul(x), **BF16)


@pytest.mark.parametrize("model", [MODEL, QK_NORM_MODEL], ids=["llama", "qwen3"])
def test_the_whole_decoder(model: TinyModel, tmp_path: Path) -> None:
    """Logits of prompts, and of decodes through a padded graph, against the reference kernels."""
    folder = write_model(tmp_path, model)
    runner = make_runner(folder, "cuda")
    config, cpu = runner.model_config, torch.device("cpu")
    with torch.inference_mode(), Checkpoint(folder, config, runner.dtype, cpu) as checkpoint:
        reference = ComposedDecoder(config, checkpoint, REFERENCE, 256, cpu)
    prompts = [prompt_ids(length, config.vocab_size, length) for length in (5, 40, 90)]
    lanes = make_lanes(runner, prompts, 4)
    expected_cache = torch.zeros(runner.cache.shape, dtype=runner.dtype)
    for _ in range(3):
        parts = sorted(((lane, lane.num_remaining) for lane in lanes), key=lambda p: p[1] != 1)
        batch = make_batch(parts, runner.block_size)
        actual = runner.logits(to_gpu(batch)).cpu()
        with torch.inference_mode():
            expected = reference.logits(reference.forward(batch, expected_cache))
        torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)
        for lane, num_tokens in parts:
            lane.num_computed += num_tokens
            lane.num_written = lane.num_computed
            lane.token_ids.append(7)


def test_a_replayed_graph_equals_the_same_step_without(tmp_path: Path) -> None:
    """At every number of sequences, with graphs used in any order."""
    from xllm.engine.kernels.cuda_graphs import CudaDecoder

    runner = make_runner(write_model(tmp_path, MODEL), "cuda")
    decoder = runner._decoder
    assert isinstance(decoder, CudaDecoder)
    vocab_size = runner.model_config.vocab_size
    lanes = make_lanes(runner, [prompt_ids(20 + 9 * i, vocab_size, i) for i in range(8)], 4)
    for lane in lanes:
        runner.logits(to_gpu(make_batch([(lane, lane.num_remaining)], runner.block_size)))
        lane.num_computed = lane.num_written = len(lane.token_ids)
        lane.token_ids.append(7)
    for num_seqs in (3, 8, 1, 5, 3, 2):
        parts = [(lane, 1) for lane in lanes[:num_seqs]]
        batch = to_gpu(make_batch(parts, runner.block_size))
        with torch.inference_mode():
            replayed = decoder.forward(batch, runner.cache).clone()
            kept = runner.cache.clone()
            eager = decoder._decoder.forward(batch, runner.cache)
        torch.testing.assert_close(replayed, eager, **BF16)
        torch.testing.assert_close(kept, runner.cache, **BF16)


def test_staged_batches_are_the_same() -> None:
    staging = PinnedStaging(torch.device("cuda"), num_bytes=16)
    for num_tokens in (3, 200, 5):
        request = GenerateRequest(
            request_id="a",
            model_id="",
            prompt_ids=list(range(num_tokens)),
            sampling=SamplingParams(),
        )
        seq = Sequence(request, 0, 0.0)
        seq.state = SequenceState.RUNNING
        seq.block_table = list(range(20))
        plan = StepPlan([ScheduledSequence(seq, 0, num_tokens, 1)], 0, [])
        staged = build_batch(plan, 16, torch.device("cuda"), staging)
        plain = build_batch(plan, 16, torch.device("cpu"))
        assert staged.host is not None
        for name in ("input_ids", "positions", "slot_mapping", "block_tables", "logits_indices"):
            assert torch.equal(getattr(staged, name).cpu(), getattr(plain, name))
        assert np.array_equal(staged.host.context_lens, plain.context_lens.numpy())


def test_blocks_go_out_and_come_back() -> None:
    cache = torch.randn(6, 2, 2, 4, 2, 64, device="cuda").bfloat16()
    expected = cache.clone()
    blocks = device_blocks(cache)
    buffers = [np.empty(blocks.block_bytes + 64, np.uint8) for _ in range(3)]
    blocks.copy_out([4, 0, 2], buffers)
    cache[:3] = 0
    blocks.copy_in([0, 1, 2], [buffers[1], buffers[0], buffers[2]])
    expected[1] = expected[4]
    assert torch.equal(cache, expected)
    assert blocks.view(0) is None
