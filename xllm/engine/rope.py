"""Rotary position embedding: the table of cos and sin, with the scalings of `model_config`.

Computed in float32 in the order `transformers` computes it, so that positions far out, where one
ulp of a frequency is many radians' worth of rounding, agree with it to the last bit.
"""

from __future__ import annotations

import math

import torch

from xllm.engine.model_config import DecoderConfig, LinearScaling, Llama3Scaling, YarnScaling


def build_cos_sin(config: DecoderConfig, max_position: int) -> torch.Tensor:
    """[max_position, D] float32: cos of the D/2 angles, then their sin."""
    inverse_frequencies, amplitude = _inverse_frequencies(config)
    positions = torch.arange(max_position, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies)
    return torch.cat((angles.cos() * amplitude, angles.sin() * amplitude), dim=1)


def _inverse_frequencies(config: DecoderConfig) -> tuple[torch.Tensor, float]:
    """([D/2] float32 radians per token, what cos and sin are multiplied with)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    periods = config.rope_theta**exponents
    unscaled = 1.0 / periods
    match config.rope_scaling:
        case None:
            return unscaled, 1.0
        case LinearScaling(factor=factor):
            return unscaled / factor, 1.0
        case Llama3Scaling() as scaling:
            return _llama3(unscaled, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(periods, scaling, config), _yarn_amplitude(scaling)


def _llama3(unscaled: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    original_len = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / unscaled
    is_low = wavelength > original_len / scaling.low_freq_factor
    is_high = wavelength < original_len / scaling.high_freq_factor
    slowed = unscaled / scaling.factor
    ramp = (original_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - ramp) * unscaled / scaling.factor + ramp * unscaled
    return torch.where(is_low, slowed, torch.where(is_high, unscaled, blended))


def _yarn(periods: torch.Tensor, scaling: YarnScaling, config: DecoderConfig) -> torch.Tensor:
    dim = config.head_dim

    def dimension_with(rotations: float) -> float:
        """The dimension that turns this often over the original length (the paper's eq. 17)."""
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = dimension_with(scaling.beta_fast)
    high = dimension_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    steps = torch.arange(dim // 2, dtype=torch.float32)
    kept = 1 - torch.clamp((steps - low) / (high - low), 0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _yarn_amplitude(scaling: YarnScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def log_scale(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return log_scale(scaling.mscale) / log_scale(scaling.mscale_all_dim)
    return log_scale(1.0)
