"""Rotary tables of a model, plain or scaled to longer sequences.

Each scaling type uses the operation order of transformers, so an imported model gets bit-identical
tables. A rounding difference in a frequency would grow with the position into an angle error.

Shapes: B batch, S sequence, K head dimension.
"""

import math

import torch
from torch import Tensor

from megagrow.config.model import RopeScaling
from megagrow.config.schema import ModelConfig
from megagrow.model.ops import rope_tables


def rotary_tables(config: ModelConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines at positions (B, S): fp32, each (B, S, 1, K)."""
    cos, sin = rope_tables(position_ids, frequencies(config, position_ids))
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return cos, sin
    gain = _yarn_gain(scaling)
    return cos * gain, sin * gain


def frequencies(config: ModelConfig, position_ids: Tensor) -> Tensor:
    """Return the rotation per position of each pair of head entries: (K/2,) fp32, radians.

    Only `dynamic` scaling depends on the positions.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device).float()
    exponents = exponents / config.head_dim
    if scaling is None:
        return 1.0 / theta**exponents
    if scaling.rope_type == "linear":
        return 1.0 / theta**exponents / scaling.factor
    if scaling.rope_type == "dynamic":
        return 1.0 / _dynamic_theta(config, scaling, position_ids) ** exponents
    if scaling.rope_type == "llama3":
        return _llama3(1.0 / theta**exponents, scaling)
    return _yarn(theta, exponents, config.head_dim, scaling)


def _dynamic_theta(config: ModelConfig, scaling: RopeScaling, position_ids: Tensor) -> Tensor:
    """Return theta of `dynamic` scaling: () fp32 (NTK-aware interpolation, bloc97, emozilla 2023).

    It is increased for sequences longer than max_position_embeddings and unchanged for others.
    """
    most, width = config.max_position_embeddings, config.head_dim
    length = (position_ids.max() + 1).clamp(min=most)
    stretch = scaling.factor * length / most - (scaling.factor - 1)
    return config.rope_theta * stretch ** (width / (width - 2))


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the frequencies of Llama 3.1.

    Long wavelengths are multiplied by `factor`, short ones are unchanged, and those in between are
    interpolated.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None and high is not None and original is not None
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - low) / (high - low)
    between = (1 - blend) * plain / scaling.factor + blend * plain
    scaled = torch.where(wavelength > original / low, plain / scaling.factor, between)
    return torch.where(wavelength < original / high, plain, scaled)


def _yarn(theta: float, exponents: Tensor, head_dim: int, scaling: RopeScaling) -> Tensor:
    """Return the frequencies of YaRN (Peng et al. 2023, eq. 17 to 19).

    Frequencies of pairs that rotate more than beta_fast times over the original length are
    unchanged. Those of pairs that rotate fewer than beta_slow times are divided by `factor`. A
    linear ramp over the pairs connects the two.
    """
    original = scaling.original_max_position_embeddings
    assert original is not None

    def pair_with_rotations(rotations: float) -> float:
        wave = original / (rotations * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(theta))

    first = pair_with_rotations(scaling.beta_fast or 32)
    last = pair_with_rotations(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # avoids a division by zero, with the constant of transformers
    pairs = torch.arange(head_dim // 2, device=exponents.device).float()
    kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
    waves = theta**exponents
    return 1.0 / (scaling.factor * waves) * (1 - kept) + 1.0 / waves * kept


def _yarn_gain(scaling: RopeScaling) -> float:
    """Return the factor on cos and sin that sharpens attention over longer sequences."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    factor, over, under = scaling.factor, scaling.mscale, scaling.mscale_all_dim
    if over and under:
        return _yarn_mscale(factor, over) / _yarn_mscale(factor, under)
    return _yarn_mscale(factor, 1.0)


def _yarn_mscale(factor: float, by: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0
