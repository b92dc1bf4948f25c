"""Rotary position embedding (RoPE), with YaRN if the model has it: frequencies and rotation factors.

Interleaved: the dimensions 2i and 2i + 1 rotate together. cos and sin are computed in fp32 for every type of
activations.
"""

import math
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig, Yarn

Factors: TypeAlias = NDArray[np.complex64]


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


AT_ONCE = 256  # positions whose factors are computed by one call, so that they have the same bits whoever asks first
GROWTH = 1024  # positions by which the table of factors grows


class Rope:
    """The rotation factors of a model, by position; all layers use the same."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = inverse_frequencies(config)
        self._scale = config.yarn.rotation_scale if config.yarn else 1.0
        self._known = np.empty((0, len(self._frequencies)), dtype=np.complex64)  # the factors of the first positions

    @property
    def pairs(self) -> int:
        """Pairs of dimensions that rotate together: P/2."""
        return len(self._frequencies)

    def table(self, count: int) -> Factors:
        """Factors of at least the first `count` positions: (cos + i·sin) · YaRN's scale, complex64 [n, P/2].

        They are computed once.
        """
        if count > len(self._known):
            new = range(len(self._known), -(-count // GROWTH) * GROWTH, AT_ONCE)
            self._known = np.concatenate((self._known, *map(self._compute, new)))
        return self._known

    def _compute(self, first: int) -> Factors:
        """Factors of `AT_ONCE` positions from `first` on."""
        angles = torch.arange(first, first + AT_ONCE).float()[:, None] * self._frequencies
        return torch.polar(torch.full_like(angles, self._scale), angles).numpy()
