"""Quantise a matrix: by the native kernel where it was compiled, else in torch, to the same layout."""

import torch
from torch import Tensor

from dsv2_local.kernels import cpu
from dsv2_local.kernels.format import Format
from dsv2_local.kernels.layout import Matrix, planes
from dsv2_local.quant import int8, nf4


def quantize(weight: Tensor, format: Format) -> Matrix:
    """Quantise [R, C] (any float type, finite, magnitudes up to 65,504) to nf4 or int8, on the calling thread."""
    native = cpu.kernels()
    if native is None:
        return nf4.quantize(weight) if format is Format.NF4 else int8.quantize(weight)
    rows, cols = weight.shape
    parts = [torch.empty(plane.shape, dtype=plane.dtype) for plane in planes(format, rows, cols)]
    matrix = Matrix(format, rows, cols, *parts)
    native.quantize(weight, matrix)
    return matrix
