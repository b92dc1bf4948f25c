"""Verify a finished conversion against its source."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from dsv2_local.architectures.tensors import UNQUANTISED, Kind
from dsv2_local.errors import CheckpointError
from dsv2_local.kernels.layout import Matrix, planes
from dsv2_local.kernels.reference import dequantize
from dsv2_local.quant.checkpoint import Checkpoint
from dsv2_local.quant.convert import Report, Tally
from dsv2_local.quant.pieces import ConversionPlan, Piece, check_tensors
from dsv2_local.quant.schema import Recipe
from dsv2_local.quant.source import Source


def verify(source_dir: Path, destination: Path, report: Report | None = None) -> dict[Kind, float]:
    """Check every file's sha256, then every tensor against the source.

    Returns:
        The relative error ‖stored - source‖ / ‖source‖ over all tensors of each kind.

    Raises:
        CheckpointError: a file does not match its checksum, or the source is another model.
    """
    checkpoint = Checkpoint(destination)
    source = Source(source_dir)
    try:
        check_tensors(source, checkpoint.config)
        plan = ConversionPlan(source, checkpoint.config, checkpoint.recipe)
        tally = Tally(plan, report)
        sums = {kind: [0.0, 0.0] for kind in Kind}
        for file in checkpoint.manifest.files.keys() - set(plan.files):
            checkpoint.verify_file(file)
        for file in plan.files:
            checkpoint.verify_file(file)
            with (destination / file).open("rb") as stored:
                for piece in plan.pieces(file):
                    weight = piece.load().float()
                    error = _read_back(piece, weight, checkpoint.recipe, stored.fileno()) - weight
                    sums[piece.kind][0] += float(error.square().sum())
                    sums[piece.kind][1] += float(weight.square().sum())
                    tally.count(piece)
    finally:
        source.close()
    return {kind: math.sqrt(error / norm) for kind, (error, norm) in sums.items() if norm}


def _read_back(piece: Piece, weight: Tensor, recipe: Recipe, descriptor: int) -> Tensor:
    """The stored values of a piece in fp32, in the shape of `weight`."""
    if piece.kind in UNQUANTISED:
        [offset] = piece.offsets
        return _read(descriptor, offset, piece.nbytes).view(piece.dtype).view(weight.shape).float()
    format = recipe.format_of(piece.kind)
    rows, cols = weight.shape
    parts = [
        _read(descriptor, offset, plane.nbytes).view(plane.dtype).view(plane.shape)
        for offset, plane in zip(piece.offsets, planes(format, rows, cols), strict=True)
    ]
    return dequantize(Matrix(format, rows, cols, *parts))


def _read(descriptor: int, offset: int, size: int) -> Tensor:
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise CheckpointError("the checkpoint changed while it was read; run the same command again")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
