"""What the decoder has to know of a model, from the config.json of its Hugging Face folder.

Four architectures are one decoder with switches: Llama, Mistral, Qwen2, Qwen3. Whatever this
decoder would compute wrongly is refused here, before any weight is read, and the message names
what works.

Both spellings of rotary scaling are read: `rope_theta` + `rope_scaling` and the newer
`rope_parameters`. Defaults for absent keys are those of `transformers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from xllm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): a ramp by number of rotations, and scaled cos and sin."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    """What cos and sin are multiplied with; None: derived from `factor` and the two `mscale`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


_StructT = TypeVar("_StructT", bound=msgspec.Struct)

RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """One decoder-only transformer, as its weights were trained."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_model_len: int
    """Tokens of prompt plus output that the model was made for, rotary scaling included."""
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMS norm over each head of query and key, before the rotation."""
    eos_token_ids: tuple[int, ...]
    """Ascending: those of config.json and of generation_config.json that are in the vocabulary."""

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class _Architecture:
    qkv_bias: bool = False
    """Always; elsewhere `attention_bias` decides, for the output projection as well."""
    configurable_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    default_head_dim: int | None = None
    """Where it is not hidden_size / heads."""
    default_kv_heads: int | None = None
    default_sliding_window: int | None = None
    """Of every layer, where config.json has no such key."""


_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture(configurable_bias=True, mlp_bias=True),
    "MistralForCausalLM": _Architecture(default_kv_heads=8, default_sliding_window=4096),
    "Qwen2ForCausalLM": _Architecture(qkv_bias=True, default_kv_heads=32),
    "Qwen3ForCausalLM": _Architecture(
        configurable_bias=True, qk_norm=True, default_head_dim=128, default_kv_heads=32
    ),
}

_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class _RawConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of config.json that matter here; others are ignored."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    architectures: list[str] | None = None
    model_type: str | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_id: int | list[int] | None = None
    sliding_window: int | msgspec.UnsetType | None = msgspec.UNSET
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


class _RawGenerationConfig(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int] | None = None


class _RawRope(msgspec.Struct, frozen=True, kw_only=True):
    """`rope_parameters`, or `rope_scaling` with `type` renamed."""

    rope_type: str = "default"
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None


def load_config(folder: Path, max_model_len: int = 0) -> DecoderConfig:
    """Reads config.json and generation_config.json of `folder`.

    `max_model_len` (0: the model's own) is the longest sequence that will be run: a sliding window
    at least as long never takes effect.

    Raises:
        ConfigError: the folder is not a model, or not one that this decoder computes correctly.
    """
    raw = _decode(folder / "config.json", _RawConfig)
    architecture = _architecture_of(raw, folder)
    traits = _ARCHITECTURES[architecture]
    if raw.quantization_config is not None:
        method = raw.quantization_config.get("quant_method", "unknown")
        raise ConfigError(
            f"{folder} holds quantized weights (quantization_config: {method}), which are not "
            "supported; use the unquantized bfloat16, float16 or float32 model"
        )
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json; save the tokenizer in the fast format "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    if raw.hidden_act != "silu":
        raise ConfigError(f"{folder}: hidden_act is {raw.hidden_act!r}; only 'silu' is supported")

    num_kv_heads = raw.num_key_value_heads or traits.default_kv_heads or raw.num_attention_heads
    head_dim = raw.head_dim or traits.default_head_dim
    if head_dim is None:
        head_dim = raw.hidden_size // raw.num_attention_heads
    if raw.num_attention_heads % num_kv_heads or head_dim % 2:
        raise ConfigError(
            f"{folder}: {raw.num_attention_heads} heads of size {head_dim} over {num_kv_heads} KV "
            "heads; the heads must divide evenly, and the size must be even"
        )
    theta, scaling = _parse_rope(raw, folder)
    model_len = raw.max_position_embeddings
    if isinstance(scaling, YarnScaling):
        model_len = max(model_len, int(scaling.factor * scaling.original_max_position_embeddings))
    _refuse_sliding_window(raw, traits, max_model_len or model_len, folder)
    has_bias = traits.configurable_bias and raw.attention_bias
    return DecoderConfig(
        architecture=architecture,
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=raw.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_model_len=model_len,
        tie_word_embeddings=raw.tie_word_embeddings,
        qkv_bias=traits.qkv_bias or has_bias,
        o_bias=has_bias,
        mlp_bias=traits.mlp_bias and raw.mlp_bias,
        qk_norm=traits.qk_norm,
        eos_token_ids=_eos_token_ids(raw, folder),
    )


def _decode(path: Path, struct: type[_StructT]) -> _StructT:
    try:
        return msgspec.json.decode(path.read_bytes(), type=struct)
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent} has no {path.name}; --model wants a Hugging Face model folder"
        ) from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error


def _architecture_of(raw: _RawConfig, folder: Path) -> str:
    names = raw.architectures or [_BY_MODEL_TYPE.get(raw.model_type or "", raw.model_type or "")]
    for name in names:
        if name in _ARCHITECTURES:
            return name
    raise ConfigError(
        f"{folder} has the architecture {names[0] or 'unknown'!r}, which is not supported; "
        f"supported are {', '.join(_ARCHITECTURES)}"
    )


def _refuse_sliding_window(
    raw: _RawConfig, traits: _Architecture, max_model_len: int, folder: Path
) -> None:
    window = raw.sliding_window
    if traits.default_sliding_window is not None:
        windowed = True
        if window is msgspec.UNSET:
            window = traits.default_sliding_window
    elif raw.layer_types is not None:
        windowed = "sliding_attention" in raw.layer_types
    else:
        windowed = raw.use_sliding_window and raw.max_window_layers < raw.num_hidden_layers
    if windowed and isinstance(window, int) and window < max_model_len:
        raise ConfigError(
            f"{folder} attends within a sliding window of {window} tokens, which is not supported; "
            f"--max_model_len={window} or less keeps within it"
        )


def _parse_rope(raw: _RawConfig, folder: Path) -> tuple[float, RopeScaling | None]:
    """(theta, scaling)."""
    fields = dict(raw.rope_parameters or raw.rope_scaling or {})
    legacy_type = fields.pop("type", None)
    fields.setdefault("rope_type", legacy_type or "default")
    try:
        rope = msgspec.convert(fields, _RawRope)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{folder}: rotary parameters {fields}: {error}") from error
    theta = rope.rope_theta or raw.rope_theta or 10_000.0
    if (rope.partial_rotary_factor or raw.partial_rotary_factor or 1.0) != 1.0:
        raise ConfigError(f"{folder} rotates only a part of each head, which is not supported")

    original = rope.original_max_position_embeddings or raw.max_position_embeddings
    match rope.rope_type:
        case "default":
            return theta, None
        case "linear" if rope.factor:
            return theta, LinearScaling(factor=rope.factor)
        case "llama3" if rope.factor and rope.low_freq_factor and rope.high_freq_factor:
            return theta, Llama3Scaling(
                factor=rope.factor,
                low_freq_factor=rope.low_freq_factor,
                high_freq_factor=rope.high_freq_factor,
                original_max_position_embeddings=original,
            )
        case "yarn":
            return theta, YarnScaling(
                factor=rope.factor or raw.max_position_embeddings / original,
                original_max_position_embeddings=original,
                attention_factor=rope.attention_factor,
                mscale=rope.mscale,
                mscale_all_dim=rope.mscale_all_dim,
                beta_fast=rope.beta_fast or 32.0,
                beta_slow=rope.beta_slow or 1.0,
                truncate=rope.truncate is not False,
            )
        case "linear" | "llama3":
            raise ConfigError(f"{folder}: rotary scaling {fields} is incomplete")
        case other:
            raise ConfigError(
                f"{folder} scales its rotary embedding by {other!r}, which is not supported; "
                "supported are default, linear, llama3 and yarn"
            )


def _eos_token_ids(raw: _RawConfig, folder: Path) -> tuple[int, ...]:
    sources = [raw.eos_token_id]
    path = folder / "generation_config.json"
    if path.is_file():
        sources.append(_decode(path, _RawGenerationConfig).eos_token_id)
    ids: set[int] = set()
    for source in sources:
        ids.update([source] if isinstance(source, int) else source or [])
    return tuple(sorted(token_id for token_id in ids if 0 <= token_id < raw.vocab_size))
