"""Quantise to int8: symmetric, blocks of 64 along the input dimension, one fp16 scale per block (8.25 bits)."""

import torch
from torch import Tensor

from dsv2_local.kernels.format import Format
from dsv2_local.kernels.layout import Matrix, pack_int8, to_tiles


def quantize(weight: Tensor) -> Matrix:
    """Quantise [R, C] (any float type, finite, magnitudes up to 65,504) to the layout of `kernels.layout`."""
    rows, cols = weight.shape
    tiles = to_tiles(weight.float())  # [G, 8, B, 64]
    # Rounded to fp16 before the division, so that the codes match the stored scale.
    scales = (tiles.abs().amax(3) / 127).half()
    divisor = scales.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    codes = (tiles / divisor).round_().clamp_(-127, 127).to(torch.int8)
    return Matrix(Format.INT8, rows, cols, pack_int8(codes), scales.transpose(1, 2).contiguous())
