"""The kernels' C ABI: `src/api.h` in ctypes, field by field, and who owns the memory behind it.

A structure holds addresses only. Whoever fills one keeps the tensors alive while it is in use;
`PackedLinear` and `Pool` own what they hold and free it with themselves.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from xllm.cache.slab_format import Buffer
from xllm.engine.batch import Batch

_ABI_VERSION = 1
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
MAX_HEAD_DIM = 256


class LinearStruct(Structure):
    _fields_ = (
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("dtype", c_int32),
        ("gated", c_int32),
    )


class KvLayerStruct(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("kv_stride", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
        ("block_size", c_int64),
    )


class BatchStruct(Structure):
    _fields_ = (
        ("num_tokens", c_int64),
        ("num_seqs", c_int64),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("query_start_loc", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("block_table_stride", c_int64),
    )


class AttentionStruct(Structure):
    _fields_ = (
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("scale", c_float),
        ("eps", c_float),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cos_sin", c_void_p),
        ("dtype", c_int32),
    )


class LayerStruct(Structure):
    _fields_ = (
        ("qkv", LinearStruct),
        ("o", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    )


class ModelStruct(Structure):
    _fields_ = (
        ("dtype", c_int32),
        ("num_layers", c_int32),
        ("hidden_size", c_int64),
        ("intermediate_size", c_int64),
        ("vocab_size", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("eps", c_float),
        ("scale", c_float),
        ("embedding", c_void_p),
        ("cos_sin", c_void_p),
        ("final_norm", c_void_p),
        ("lm_head", LinearStruct),
        ("layers", POINTER(LayerStruct)),
    )


class StepStruct(Structure):
    _fields_ = (
        ("batch", BatchStruct),
        ("input_ids", c_void_p),
        ("kv", KvLayerStruct),
        ("layer_stride", c_int64),
        ("logits_indices", c_void_p),
        ("num_logits", c_int64),
        ("hidden", c_void_p),
    )


_PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "xllm_abi_version": (c_int32, ()),
    "xllm_isa": (c_char_p, ()),
    "xllm_pool_create": (c_void_p, (c_int32,)),
    "xllm_pool_destroy": (None, (c_void_p,)),
    "xllm_alloc": (c_void_p, (c_int64,)),
    "xllm_free": (None, (c_void_p, c_int64)),
    "xllm_packed_bytes": (c_int64, (c_int64, c_int64, c_int32, c_int32)),
    "xllm_pack": (
        None,
        (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32, c_int32),
    ),
    "xllm_forward": (None, (c_void_p, POINTER(ModelStruct), POINTER(StepStruct))),
    "xllm_logits": (None, (c_void_p, POINTER(ModelStruct), c_void_p, c_int64, c_void_p)),
    "xllm_linear": (
        None,
        (c_void_p, POINTER(LinearStruct), c_void_p, c_int64, c_int64, c_void_p, c_int64),
    ),
    "xllm_linear_add": (
        None,
        (c_void_p, POINTER(LinearStruct), c_void_p, c_int64, c_int64, c_void_p, c_int64),
    ),
    "xllm_norm_linear": (
        None,
        (
            c_void_p,
            POINTER(LinearStruct),
            c_void_p,
            c_int64,
            c_void_p,
            c_float,
            c_int64,
            c_void_p,
            c_int64,
        ),
    ),
    "xllm_rope_and_write": (
        None,
        (
            c_void_p,
            POINTER(AttentionStruct),
            POINTER(BatchStruct),
            c_void_p,
            c_int64,
            POINTER(KvLayerStruct),
        ),
    ),
    "xllm_attention": (
        None,
        (
            c_void_p,
            POINTER(AttentionStruct),
            POINTER(BatchStruct),
            c_void_p,
            c_int64,
            POINTER(KvLayerStruct),
            c_void_p,
            c_int64,
        ),
    ),
    "xllm_copy_past_cache": (None, (c_void_p, c_void_p, c_int64)),
    "xllm_read": (c_float, (c_void_p, c_void_p, c_int64)),
}


def load_library(path: Path) -> ctypes.CDLL:
    """The library with its functions typed. Calls release the GIL."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    version = library.xllm_abi_version()
    assert version == _ABI_VERSION, f"{path} has ABI {version}, expected {_ABI_VERSION}"
    return library


class Pool:
    """Threads of the kernels, the caller included. One call at a time; others wait."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self.library = library
        self.num_threads = num_threads
        self.handle = library.xllm_pool_create(num_threads)
        self._finalizer = weakref.finalize(self, library.xllm_pool_destroy, self.handle)


def copy_past_cache(library: ctypes.CDLL, target: Buffer, source: Buffer) -> None:
    """Copies `source` to `target`, as many bytes, without leaving them in the caches."""
    assert target.nbytes == source.nbytes
    library.xllm_copy_past_cache(target.ctypes.data, source.ctypes.data, target.nbytes)


class PackedLinear:
    """The weights of one linear layer in the kernels' layout, in memory of their own.

    `weight` [out, in] is copied and can be dropped afterwards. With `gated` it is [gate; up], and
    the layer computes silu(gate(x)) * up(x).
    """

    def __init__(
        self, pool: Pool, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool = False
    ) -> None:
        assert weight.stride(1) == 1
        assert not (gated and weight.shape[0] % 2)
        library, (n, k), dtype = pool.library, weight.shape, DTYPES[weight.dtype]
        num_bytes = library.xllm_packed_bytes(n, k, gated, dtype)
        packed = library.xllm_alloc(num_bytes)
        if packed is None:
            raise MemoryError(f"no memory for {num_bytes} bytes of weights")
        self._finalizer = weakref.finalize(self, library.xllm_free, packed, num_bytes)
        library.xllm_pack(
            pool.handle, packed, weight.data_ptr(), weight.stride(0), n, k, gated, dtype
        )
        self._bias = None if bias is None else bias.float().contiguous()
        self.num_bytes = num_bytes
        self.struct = LinearStruct(packed, address(self._bias), n, k, dtype, gated)


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Asks for huge pages behind a large tensor, best before it is first written. Only speed
    depends on it, so systems without them are fine."""
    libc = ctypes.CDLL(None)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if advice is not None and end > begin:
        libc.madvise(c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def batch_struct(batch: Batch) -> BatchStruct:
    """Borrows the batch's tensors, which must be contiguous but for rows of block_tables."""
    return BatchStruct(
        batch.num_tokens,
        batch.num_seqs,
        batch.positions.data_ptr(),
        batch.slot_mapping.data_ptr(),
        batch.query_start_loc.data_ptr(),
        batch.context_lens.data_ptr(),
        batch.block_tables.data_ptr(),
        batch.block_tables.stride(0),
    )


def kv_layer_struct(kv_layer: torch.Tensor) -> KvLayerStruct:
    """Of one layer's view [N, 2, S, G, D]; D must be contiguous."""
    block, kv, token, head, element = kv_layer.stride()
    assert element == 1
    return KvLayerStruct(kv_layer.data_ptr(), block, kv, token, head, kv_layer.shape[2])
