"""Rotary position embedding with YaRN: frequencies, and the rotation itself.

Interleaved: the pairs are (2i, 2i + 1). cos and sin are made in fp32 whatever the activations' type.
"""

import math

import torch
from torch import Tensor

from dsv2_local.config import ModelConfig, Yarn


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


AT_ONCE = 256  # positions


class Rope:
    """cos and sin of a model; `rotation(positions)` is computed once per step and shared by all layers."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = inverse_frequencies(config)
        self._scale = config.yarn.rotation_scale if config.yarn else 1.0
        self._block, self._rows = -1, torch.empty(0)  # the positions that `at` was asked for last

    def rotation(self, positions: Tensor) -> Tensor:
        """Positions [T] -> complex64 [T, P/2], cos + i·sin, times YaRN's factor."""
        angles = positions.float()[:, None] * self._frequencies
        return torch.polar(torch.full_like(angles, self._scale), angles)

    def at(self, position: int) -> Tensor:
        """One position -> complex64 [1, P/2]; computed with its neighbours, which decoding asks for next."""
        block, row = divmod(position, AT_ONCE)
        if block != self._block:
            self._rows = self.rotation(torch.arange(block * AT_ONCE, (block + 1) * AT_ONCE))
            self._block = block
        return self._rows[row : row + 1]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs of x [T, …, P] by rotation [T, P/2]; computed in fp32, returned in the type of x."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    rotation = rotation.view(len(x), *(1,) * (x.dim() - 2), -1)
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
