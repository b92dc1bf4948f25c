"""Rotary position embedding (RoPE), with YaRN if the model has it: frequencies and rotation factors.

Interleaved: the dimensions 2i and 2i + 1 rotate together. cos and sin are computed in fp32 for every type of
activations.
"""

import math

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig, Yarn


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position, for each pair of dimensions: float32 [qk_rope_head_dim / 2]."""
    dim = config.qk_rope_head_dim
    plain = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.yarn is None:
        return plain
    ramp = _ramp(config.yarn, dim, config.rope_theta)
    return plain / config.yarn.factor * ramp + plain * (1 - ramp)


def _ramp(yarn: Yarn, dim: int, theta: float) -> Tensor:
    """How far each pair's frequency is interpolated: 0 is not at all, 1 is division by YaRN's factor; [dim / 2].

    Pairs with many rotations within the original context stay as they are, those with few are interpolated, with a
    linear ramp between (YaRN, arXiv 2309.00071, section 3.2). The bounds are rounded outwards, as in the released
    modelling code.
    """

    def pair_with(rotations: float) -> float:
        """The pair, as a fractional index, that makes so many rotations within the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


AT_ONCE = 256  # positions computed together and cached, since decoding needs one after the other


class Rope:
    """The rotation factors of a model; `rotation` is called once per step, and all layers share its result."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = inverse_frequencies(config)
        self._scale = config.yarn.rotation_scale if config.yarn else 1.0
        self._first, self._cached = -1, torch.empty(0)  # the factors of `AT_ONCE` positions from `_first` on

    def rotation(self, position: int, tokens: int) -> Tensor:
        """Factors of `tokens` positions from `position` on: (cos + i·sin) · YaRN's scale, complex64 [tokens, P/2]."""
        if tokens > 1:
            return self._compute(position, tokens)
        first = position // AT_ONCE * AT_ONCE
        if first != self._first:
            self._first, self._cached = first, self._compute(first, AT_ONCE)
        return self._cached[position - first : position - first + 1]

    def _compute(self, position: int, tokens: int) -> Tensor:
        angles = torch.arange(position, position + tokens).float()[:, None] * self._frequencies
        return torch.polar(torch.full_like(angles, self._scale), angles)
