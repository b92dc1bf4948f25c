"""Rotary position embedding with YaRN: frequencies, and the rotation itself.

Interleaved: the pairs are (2i, 2i + 1). cos and sin are made in fp32 whatever the activations' type.
"""

import math

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig, Yarn


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair: float32 [qk_rope_head_dim / 2]."""
    dim = config.qk_rope_head_dim
    plain = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.yarn is None:
        return plain
    ramp = _ramp(config.yarn, dim, config.rope_theta)
    return plain / config.yarn.factor * ramp + plain * (1 - ramp)


def _ramp(yarn: Yarn, dim: int, theta: float) -> Tensor:
    """0 where a pair turns often enough within the original context to be kept, 1 where it is interpolated.

    YaRN, arXiv 2309.00071, section 3.2; the bounds are rounded outwards as in the model's own code.
    """

    def pair_turning(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


AT_ONCE = 256  # positions that are computed together, since decoding asks for one after the other


class Rope:
    """cos and sin of a model; `rotation` is computed once per step and shared by all layers."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = inverse_frequencies(config)
        self._scale = config.yarn.rotation_scale if config.yarn else 1.0
        self._first, self._kept = -1, torch.empty(0)  # rotations of `AT_ONCE` positions, and the first of these

    def rotation(self, position: int, tokens: int) -> Tensor:
        """Positions from `position` on -> complex64 [tokens, P/2], cos + i·sin, times YaRN's factor."""
        if tokens > 1:
            return self._compute(position, tokens)
        first = position // AT_ONCE * AT_ONCE
        if first != self._first:
            self._first, self._kept = first, self._compute(first, AT_ONCE)
        return self._kept[position - first : position - first + 1]

    def _compute(self, position: int, tokens: int) -> Tensor:
        angles = torch.arange(position, position + tokens).float()[:, None] * self._frequencies
        return torch.polar(torch.full_like(angles, self._scale), angles)
