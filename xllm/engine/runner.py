"""A loaded model on its device: weights, KV cache, and the forward pass of one step.

The runner holds tensors and executes; what runs, and in which blocks, is decided elsewhere. All
methods belong to one thread, the engine's.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from xllm.cache.memory import map_pages
from xllm.config import EngineConfig
from xllm.engine.batch import Batch, Staging
from xllm.engine.kernels.cpu.decoder import NativeDecoder
from xllm.engine.kernels.interface import Decoder
from xllm.engine.kernels.select import load_decoder
from xllm.engine.memory import available_memory_bytes
from xllm.engine.model_config import DecoderConfig, load_config
from xllm.engine.sampler import SampledTokens, SamplingBatch, sample
from xllm.engine.staging import PinnedStaging
from xllm.engine.weights import Checkpoint, WeightSource, fingerprint
from xllm.errors import ConfigError

logger = logging.getLogger(__name__)

_MAX_LOGITS_BYTES = 64 << 20
"""Of one slice of rows: a long prompt whose every token is scored must not need it all at once."""

_DEFAULT_CPU_CACHE_BYTES = 4 << 30

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_FAST_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"})
"""Of /proc/cpuinfo, x86 and Arm."""


class Runner:
    """Loads the model of a folder and runs batches over its KV cache.

    Raises:
        ConfigError: the model, the device or the sizes asked for cannot work.
    """

    def __init__(self, config: EngineConfig, model_path: Path) -> None:
        self.config = config
        self.device = _pick_device(config.device)
        self.dtype = _pick_dtype(config.dtype, self.device)
        self._num_threads = config.num_threads or len(os.sched_getaffinity(0))
        if self.device.type == "cpu":
            torch.set_num_threads(self._num_threads)
        self.model_config, self.fingerprint = self._read_model(model_path)
        self.max_model_len = _pick_max_model_len(config, self.model_config)
        self.block_size = config.block_size
        with torch.inference_mode(), self._open_weights(model_path) as weights:
            self._decoder = self._load_decoder(weights)
        if isinstance(self._decoder, NativeDecoder):
            # What is left for torch, sampling, is many small operations: to wake a second thread
            # for each takes longer than it saves, and one that spins takes a core from ours.
            torch.set_num_threads(1)
        self.num_blocks = self._pick_num_blocks(config)
        self.staging: Staging | None = None
        """How batches get to the device, where that is not the host."""
        if self.device.type == "cuda":
            self.staging = PinnedStaging(self.device)
        self._cache = self._new_cache(0)

    @property
    def native_library(self) -> ctypes.CDLL | None:
        """The native kernels; None where others run."""
        return self._decoder.library if isinstance(self._decoder, NativeDecoder) else None

    @property
    def kv_dtype(self) -> str:
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    @property
    def block_bytes(self) -> int:
        """Of one block: K and V of `block_size` tokens, all layers."""
        model = self.model_config
        per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
        return per_token * self.block_size * self.dtype.itemsize

    @property
    def cache(self) -> torch.Tensor:
        """[N, L, 2, S, G, D]: N is 0 until `allocate_cache`."""
        return self._cache

    def allocate_cache(self, num_blocks: int) -> None:
        """Replaces the KV cache by one of `num_blocks` blocks with undefined contents."""
        self._cache = self._new_cache(0)  # the old one goes first
        self._cache = self._new_cache(num_blocks)

    def enter_thread(self) -> None:
        """To be called first on the thread that executes steps."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @torch.inference_mode()
    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole blocks, (source, destination) each; no block is both."""
        if pairs:
            sources, destinations = zip(*pairs, strict=True)
            self._cache[list(destinations)] = self._cache[list(sources)]

    @torch.inference_mode()
    def execute(self, batch: Batch, sampling: SamplingBatch) -> SampledTokens:
        """Runs one step, whose tensors are on `device`. `sampling` has one entry per entry of
        `batch.logits_indices`."""
        hidden = self._decoder.forward(batch, self._cache)
        rows_per_slice = max(1, _MAX_LOGITS_BYTES // (4 * self.model_config.vocab_size))
        token_ids, logprobs, faulty = [], [], set[int]()
        sampling.wait()
        for start in range(0, len(sampling.rows), rows_per_slice):
            end = start + rows_per_slice
            part = SamplingBatch(sampling.rows[start:end])
            sampled = sample(self._decoder.logits(hidden[start:end]), part)
            token_ids += sampled.token_ids
            logprobs += sampled.logprobs
            faulty.update(start + row for row in sampled.faulty_rows)
        return SampledTokens(token_ids, logprobs, frozenset(faulty))

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """[R, V] float32: runs one step and samples nothing. For evaluation: R is not bounded."""
        return self._decoder.logits(self._decoder.forward(batch, self._cache))

    def _read_model(self, model_path: Path) -> tuple[DecoderConfig, str]:
        """The model's configuration and fingerprint."""
        model = load_config(model_path, self.config.max_model_len)
        return model, fingerprint(model_path, model)

    def _open_weights(self, model_path: Path) -> AbstractContextManager[WeightSource]:
        return Checkpoint(model_path, self.model_config, self.dtype, self.device)

    def _load_decoder(self, weights: WeightSource) -> Decoder:
        return load_decoder(
            self.model_config,
            weights,
            device=self.device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_seqs=self.config.max_seqs_per_batch,
            block_size=self.block_size,
            num_threads=self._num_threads,
        )

    def _new_cache(self, num_blocks: int) -> torch.Tensor:
        model = self.model_config
        block_shape = (model.num_layers, 2, self.block_size, model.num_kv_heads, model.head_dim)
        if self.device.type == "cpu":
            # Page-aligned, so that blocks can be read from disk without a copy in between.
            pages = torch.from_numpy(map_pages(num_blocks * self.block_bytes))
            return pages.view(self.dtype).view(num_blocks, *block_shape)
        return torch.empty((num_blocks, *block_shape), dtype=self.dtype, device=self.device)

    def _pick_num_blocks(self, config: EngineConfig) -> int:
        budget = config.max_cache_size or _default_cache_bytes(config, self.device)
        num_blocks = budget // self.block_bytes
        needed = -(-self.max_model_len // self.block_size)
        if num_blocks < needed:
            origin = "--max_cache_size" if config.max_cache_size else "what is available"
            raise ConfigError(
                f"a cache of {budget} bytes ({origin}) holds {num_blocks * self.block_size} "
                f"tokens, fewer than one request of --max_model_len={self.max_model_len}, which "
                f"takes {needed * self.block_bytes} bytes; raise --max_cache_size or lower "
                "--max_model_len"
            )
        return num_blocks


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cpu" and not number:
        return torch.device("cpu")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise ConfigError(f"--device={name} is unknown; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ConfigError(f"--device={name}, but torch finds no GPU here; use --device=cpu")
    if int(number or "0") >= torch.cuda.device_count():
        raise ConfigError(
            f"--device={name}, but the GPUs here are 0 to {torch.cuda.device_count() - 1}"
        )
    return torch.device("cuda", int(number or "0"))


def _pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        is_fast = device.type == "cuda" or cpu_has_bf16()
        return torch.bfloat16 if is_fast else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"--dtype={name} is unknown; use auto, {' or '.join(_DTYPES)}")
    return _DTYPES[name]


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bfloat16 natively; one that does not is faster in float32."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return platform.system() == "Darwin" and platform.machine() == "arm64"
    for line in text.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not _FAST_BF16_FLAGS.isdisjoint(flags.split())
    return False


def _pick_max_model_len(config: EngineConfig, model: DecoderConfig) -> int:
    if config.max_model_len > model.max_model_len:
        raise ConfigError(
            f"--max_model_len={config.max_model_len} is more than the {model.max_model_len} "
            "tokens that the model was made for; lower it, or leave it out"
        )
    return config.max_model_len or model.max_model_len


def _default_cache_bytes(config: EngineConfig, device: torch.device) -> int:
    if device.type == "cpu":
        return min(_DEFAULT_CPU_CACHE_BYTES, available_memory_bytes() // 4)
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(total * config.max_memory_utilization) - (total - free))
