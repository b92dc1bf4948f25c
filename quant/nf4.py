"""Quantise to NF4: 4-bit normal-float codes in blocks of 64, with scales chosen for the least squared error.

bitsandbytes uses a block's largest magnitude as its scale, which costs all weights precision for the sake of one. Here
every block tries `CANDIDATES` scales between 0.60 and 1.06 of that magnitude, takes the codes of the scale with the
least squared error, and then the least-squares scale for these codes, <w, v> / <v, v>. On Gaussian weights the relative
error falls from 0.0920 to 0.0852 at the same 4.25 bits, and bitsandbytes still reads the result as NF4.

The search runs on weights rounded to 1/1024 of the block's maximum: the squared error of every candidate is then a
table look-up, and one `embedding_bag` sums it over the block for all candidates at once.
"""

from functools import cache

import torch
from torch import Tensor

from dsv2_local.kernels.format import Format
from dsv2_local.kernels.layout import NF4_LEVELS, Matrix, pack_nf4, to_tiles

CANDIDATES = 24
BINS = 1024  # steps between zero and a block's maximum
STEPS = 2 * BINS + 1  # from minus the maximum to plus the maximum


@cache
def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """Squared error [STEPS, CANDIDATES] and code [CANDIDATES · STEPS] of each step with each candidate; the levels."""
    levels = torch.tensor(NF4_LEVELS)
    candidates = torch.linspace(0.60, 1.06, CANDIDATES)[:, None]
    steps = (torch.arange(STEPS) - BINS) / BINS
    codes = torch.bucketize(steps / candidates, (levels[1:] + levels[:-1]) / 2)
    error = (levels[codes] * candidates - steps).square()
    return error.T.contiguous(), codes.to(torch.uint8).view(-1), levels


def quantize(weight: Tensor) -> Matrix:
    """Quantise [R, C] (any float type, finite, magnitudes up to 65,504) to the layout of `kernels.layout`.

    Processes all of `weight` at once in fp32; callers bound the memory by passing slices of rows (multiples of 8).
    """
    rows, cols = weight.shape
    tiles = to_tiles(weight.float())  # [G, 8, B, 64]
    codes, scales = _search(tiles.view(-1, tiles.shape[-1]))
    shape = tiles.shape[:3]
    return Matrix(
        Format.NF4, rows, cols, pack_nf4(codes.view(tiles.shape)), scales.view(shape).transpose(1, 2).contiguous()
    )


def _search(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, 64] and scales fp16 [N] of blocks fp32 [N, 64]."""
    error, step_codes, levels = _tables()
    maximum = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    steps = torch.add(BINS + 0.5, blocks / maximum * BINS).to(torch.int32).clamp_(0, STEPS - 1)
    best = torch.nn.functional.embedding_bag(steps, error, mode="sum").argmin(1, keepdim=True)
    steps += best.to(torch.int32) * STEPS
    codes = step_codes.index_select(0, steps.view(-1)).view(blocks.shape)
    values = levels.index_select(0, codes.view(-1).to(torch.int32)).view(blocks.shape)
    # In a block of zeros <w, v> is 0, and so is the scale.
    scales = (blocks * values).sum(1) / values.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return codes, scales.half()
