"""A model's tensors from safetensors files, and the fingerprint of their contents.

`Checkpoint` hands out one layer at a time, already in the target dtype, with the projections that
read the same input fused. The caller passes each tensor on (see `Kernels.linear`) before it asks
for the next layer, so no more than one copy of the model plus one layer is ever in memory. Nothing
handed out refers to the file: it may be replaced while the model serves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from xllm.engine.model_config import DecoderConfig
from xllm.errors import ConfigError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

_MIN_REMEMBERED_BYTES = 32 << 20
"""Hashing a smaller file again takes 20 ms at most."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in]; a bias is None where the model has none."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    """[(H + 2 G) D, E]: query, key, value."""
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    """[D]"""
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor
    """[2 I, E]: gate, up."""
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class WeightSource(Protocol):
    """Where a decoder gets its weights: each tensor once, its own copy, of one dtype."""

    def embedding(self) -> torch.Tensor: ...

    def lm_head(self) -> torch.Tensor: ...

    def final_norm(self) -> torch.Tensor: ...

    def layer(self, index: int) -> LayerWeights: ...


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class Checkpoint(AbstractContextManager["Checkpoint"]):
    """The open safetensors files of one folder.

    Raises:
        ConfigError: from any method, when a file or a tensor is missing, damaged, or not of the
            shape that config.json promises.
    """

    def __init__(
        self, folder: Path, config: DecoderConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._folder = folder
        self._config = config
        self._dtype = dtype
        self._device = device
        self._files = ExitStack()
        self._owner: dict[str, Any] = {}
        """By tensor name: the open file that has it. (safetensors' handles are untyped.)"""
        with ExitStack() as opened:
            for path in weight_files(folder):
                try:
                    handle = opened.enter_context(safe_open(path, framework="pt"))
                except (OSError, SafetensorError) as error:
                    raise ConfigError(f"{path} cannot be read: {error}") from error
                self._owner.update(dict.fromkeys(handle.keys(), handle))
            self._files = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._owner.clear()
        self._files.close()

    def embedding(self) -> torch.Tensor:
        """[V, E]"""
        return self._tensor("model.embed_tokens.weight", self._vocab_shape)

    def lm_head(self) -> torch.Tensor:
        """[V, E]: of an untied model; a tied one uses `embedding`."""
        assert not self._config.tie_word_embeddings
        return self._tensor("lm_head.weight", self._vocab_shape)

    def final_norm(self) -> torch.Tensor:
        return self._tensor("model.norm.weight", (self._config.hidden_size,))

    def layer(self, index: int) -> LayerWeights:
        config = self._config
        prefix = f"model.layers.{index}."
        attention = prefix + "self_attn."
        hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
        query_size, kv_size = config.num_heads * head, config.num_kv_heads * head
        qkv_names = [f"{attention}{part}_proj" for part in "qkv"]
        qkv_sizes = [query_size, kv_size, kv_size]
        gate_up_names = [f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"]
        return LayerWeights(
            input_norm=self._tensor(prefix + "input_layernorm.weight", (hidden,)),
            qkv=self._matrix(qkv_names, qkv_sizes, hidden),
            qkv_bias=self._bias(qkv_names, qkv_sizes) if config.qkv_bias else None,
            q_norm=self._tensor(attention + "q_norm.weight", (head,)) if config.qk_norm else None,
            k_norm=self._tensor(attention + "k_norm.weight", (head,)) if config.qk_norm else None,
            o=self._matrix([attention + "o_proj"], [hidden], query_size),
            o_bias=self._bias([attention + "o_proj"], [hidden]) if config.o_bias else None,
            post_attention_norm=self._tensor(prefix + "post_attention_layernorm.weight", (hidden,)),
            gate_up=self._matrix(gate_up_names, [inner, inner], hidden),
            gate_up_bias=self._bias(gate_up_names, [inner, inner]) if config.mlp_bias else None,
            down=self._matrix([prefix + "mlp.down_proj"], [hidden], inner),
            down_bias=self._bias([prefix + "mlp.down_proj"], [hidden]) if config.mlp_bias else None,
        )

    @property
    def _vocab_shape(self) -> tuple[int, int]:
        return self._config.vocab_size, self._config.hidden_size

    def _matrix(self, names: Sequence[str], rows: Sequence[int], columns: int) -> torch.Tensor:
        shapes = [(size, columns) for size in rows]
        return self._stacked([f"{name}.weight" for name in names], shapes)

    def _bias(self, names: Sequence[str], rows: Sequence[int]) -> torch.Tensor:
        return self._stacked([f"{name}.bias" for name in names], [(size,) for size in rows])

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._stacked([name], [shape])

    def _stacked(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """The named tensors one after the other along their first dimension."""
        total = sum(shape[0] for shape in shapes)
        stacked = torch.empty((total, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            stacked[start : start + shape[0]].copy_(self._mapped(name, shape))
            start += shape[0]
        return stacked

    def _mapped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor as it is in the file: a view of mapped memory."""
        handle = self._owner.get(name)
        if handle is None:
            raise ConfigError(f"{self._folder} has no tensor {name!r}; is the model complete?")
        try:
            tensor: torch.Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(f"{self._folder}: tensor {name!r}: {error}") from error
        if tuple(tensor.shape) != shape or not tensor.dtype.is_floating_point:
            raise ConfigError(
                f"{self._folder}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}; "
                f"config.json asks for floating point {list(shape)}"
            )
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, ascending by name.

    Raises:
        ConfigError: there are none, or one that the index names is missing.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            names = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{index} cannot be used: {error}") from error
    else:
        names = {_SINGLE}
    # The index comes with the model, which may be anybody's.
    if strange := [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]:
        raise ConfigError(
            f"{index} names {strange[0]!r}: weights are read from *.safetensors of that folder only"
        )
    files = [folder / name for name in sorted(names)]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ConfigError(
            f"{folder} lacks the weights {', '.join(missing) or '(an empty index)'}; wanted is "
            f"{_SINGLE}, or {_INDEX} with every file it names"
        )
    return files


_WITHOUT_INFLUENCE_ON_KV = ("eos_token_ids", "max_model_len", "tie_word_embeddings")


def fingerprint(folder: Path, config: DecoderConfig, cache_folder: Path | None = None) -> str:
    """32 hex digits over what the KV of a token depends on: configuration and weights' contents.

    Two fine-tunes of one base never share a fingerprint; a copy of the same files elsewhere does.
    Files are hashed at the speed of sha256, once: the digest is kept in `cache_folder` (None: in
    the user's cache directory) by path, size, mtime and inode.
    """
    if cache_folder is None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_folder = Path(root) / "xllm" / "fingerprints"
    relevant = {
        key: value for key, value in asdict(config).items() if key not in _WITHOUT_INFLUENCE_ON_KV
    }
    scaling_kind = type(config.rope_scaling).__name__
    digest = sha256(repr((sorted(relevant.items()), scaling_kind)).encode())
    for path in weight_files(folder):
        digest.update(_file_sha256(path.resolve(), cache_folder))
    return digest.hexdigest()[:32]


def _file_sha256(path: Path, cache_folder: Path) -> bytes:
    """The digest of the file's contents, from the cache where the file has not changed."""
    status = path.stat()
    if status.st_size < _MIN_REMEMBERED_BYTES:
        return _hash_file(path)
    identity = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    entry = cache_folder / sha256(repr(identity).encode()).hexdigest()
    try:
        known = bytes.fromhex(entry.read_text())
    except (OSError, ValueError):
        known = b""
    if len(known) == sha256().digest_size:
        return known
    digest = _hash_file(path)
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=cache_folder, delete=False) as temporary:
            temporary.write(digest.hex())
        os.replace(temporary.name, entry)
    except OSError:
        pass  # a cache that cannot be written costs the next start a second
    return digest


def _hash_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file_digest(file, "sha256").digest()
