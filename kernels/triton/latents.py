"""The latent cache on the GPU: where rows lie on their pages, and how they are written and read (`kernels.latents`).

A row is numbers of one type, or bytes: then `latents` is the cache as int8, `halves` the same memory as bf16, and
SCALES the scales in a row, one for 64 latents. Without scales both are the cache itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_local.kernels.format import BLOCK, CACHE_BLOCK
from dsv2_local.kernels.triton.dequantize import BLOCK_, contiguous
from dsv2_local.kernels.triton.rows import normed, rotated
from dsv2_local.kernels.triton.tuning import early, wait_for_earlier

PAGE_ = tl.constexpr(CACHE_BLOCK)
MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: added and taken away again, it rounds to the nearest even integer


def views(latents: Tensor, C: int) -> tuple[Tensor, Tensor, int, int]:
    """A layer's cache as kernels take it: `latents`, `halves`, numbers from a row of `latents` to the next, SCALES."""
    if latents.dtype != torch.uint8:
        return latents, latents, latents.stride(1), 0
    return latents.view(torch.int8), latents.view(torch.bfloat16), latents.stride(1), -(-C // BLOCK)


@triton.jit
def row_of(block_table, s):
    """Which row of a layer's pages has position s of a sequence; those after it follow, to the page's end."""
    i = s // PAGE_
    return (tl.load(block_table + 1 + i) - i) * PAGE_ + s


@triton.jit
def rows_of(block_table, start, BS: tl.constexpr):
    """The same for the BS positions from `start` on, a multiple of BS, so that all lie in one page: int64 [BS]."""
    tl.static_assert(PAGE_ % BS == 0)
    return row_of(block_table, start) + tl.arange(0, BS)


@triton.jit
def read_latents(
    latents, halves, row, there, stride, start, C: tl.constexpr, BC: tl.constexpr, SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Latents start to start + BC of rows [BS] -> [BS, BC] in DTYPE; zeros where there are none."""
    c = start + tl.arange(0, BC)
    numbers = tl.load(latents + (row * stride)[:, None] + c[None, :], there[:, None] & (c < C)[None, :], 0)
    if SCALES > 0:
        WIDTH: tl.constexpr = min(BC, BLOCK_)
        COUNT: tl.constexpr = BC // WIDTH
        BS: tl.constexpr = row.shape[0]
        block = start // BLOCK_ + tl.arange(0, COUNT)
        place = (row * (stride // 2))[:, None] + C // 2 + block[None, :]
        scales = tl.load(halves + place, there[:, None] & (block < SCALES)[None, :], 0.0).to(tl.float32)
        numbers = (numbers.to(tl.float32).reshape(BS, COUNT, WIDTH) * scales[:, :, None]).reshape(BS, BC)
    return numbers.to(DTYPE)


@triton.jit
def read_keys(
    halves, row, there, stride, C: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The rotated rope keys of rows [BS] -> [BS, BP] in DTYPE; zeros where there are none."""
    p = tl.arange(0, BP)
    place = row * (stride // 2) + (C // 2 + SCALES) if SCALES > 0 else row * stride + C
    return tl.load(halves + place[:, None] + p[None, :], there[:, None] & (p < P)[None, :], 0.0).to(DTYPE)


@triton.jit
def _write_latents(
    latents, halves, block_table, kv_a, weight, rotation, stride, kv_a_stride, P, eps,
    C: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, SCALES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_earlier(EARLY)
    t = tl.program_id(0).to(tl.int64)
    kv_a += t * kv_a_stride
    row = row_of(block_table, tl.load(block_table) + t)
    c, p = tl.arange(0, BC), tl.arange(0, BP)
    value = normed(tl.load(kv_a + c, c < C, 0.0).to(tl.float32), weight, C, eps, c)
    key = row * stride + C
    if SCALES > 0:
        WIDTH: tl.constexpr = min(BC, BLOCK_)
        COUNT: tl.constexpr = BC // WIDTH
        blocks = tl.where(c < C, value, 0.0).reshape(COUNT, WIDTH)
        largest = tl.max(tl.abs(blocks), 1) / 127.0
        scales = (((largest.to(tl.int32, bitcast=True) + 0xFFFF) >> 16) << 16).to(tl.float32, bitcast=True)
        divisors = tl.where(scales > 0, scales, 1.0)[:, None] + tl.zeros_like(blocks)  # zeros have no scale
        codes = tl.math.div_rn(blocks, divisors)
        value = ((codes + MAGIC) - MAGIC).reshape(BC).to(tl.int8)
        key = row * (stride // 2) + C // 2
        block = tl.arange(0, COUNT)
        tl.store(halves + key + block, scales, block < SCALES)
        key += SCALES
    tl.store(latents + row * stride + c, value, c < C)
    tl.store(halves + key + p, rotated(kv_a + C, rotation + t * P, p, p < P), p < P)


def write_latents(
    latents: Tensor, block_table: Tensor, kv_a: Tensor, weight: Tensor, eps: float, rotation: Tensor
) -> None:
    """Fill the next rows of a sequence in a layer's cache; see `reference.write_latents`."""
    kv_a, C = contiguous(kv_a), len(weight)
    P = kv_a.shape[1] - C
    numbers, halves, stride, scales = views(latents, C)
    _write_latents[(len(kv_a),)](
        numbers, halves, block_table, kv_a, weight, torch.view_as_real(rotation), stride, kv_a.stride(0), P, eps,
        C=C, BC=triton.next_power_of_2(C), BP=triton.next_power_of_2(P), SCALES=scales, **early(latents.device),
    )  # fmt: skip
