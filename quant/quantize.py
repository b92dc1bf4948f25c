"""Quantise a matrix to the stored layout; `kernels.ops` chooses the native kernel or the torch reference."""

from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import Format
from dsv2_local.kernels.layout import Matrix
from dsv2_local.quant import int8, nf4

REFERENCES = {Format.NF4: nf4.quantize, Format.INT8: int8.quantize}


def quantize(weight: Tensor, format: Format) -> Matrix:
    """Quantise [R, C] (any float type, finite, magnitudes up to 65,504) to nf4 or int8, on the calling thread."""
    return ops.quantize(weight, format, REFERENCES[format])
