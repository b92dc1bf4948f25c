"""Reading and writing the KV cache on the GPU, in the layout of `kernels.latents`.

Kernels get the cache twice. For an 8-bit cache, `latents` is the cache viewed as int8, `halves` the same memory viewed
as bf16, and SCALES the number of scales per row, one per 64 numbers. Otherwise both are the cache itself; SCALES is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_local.kernels.format import BLOCK, CACHE_BLOCK
from dsv2_local.kernels.metadata import AttentionMetadata
from dsv2_local.kernels.triton.dequantize import BLOCK_, contiguous
from dsv2_local.kernels.triton.rows import normed, rotated
from dsv2_local.kernels.triton.tuning import pdl_arguments, wait_for_previous_kernel

CACHE_BLOCK_ = tl.constexpr(CACHE_BLOCK)
MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds to the nearest integer, ties to even


def views(latents: Tensor, C: int) -> tuple[Tensor, Tensor, int, int]:
    """A layer's cache as kernel arguments: `latents`, `halves`, the stride between rows of `latents`, SCALES."""
    if latents.dtype != torch.uint8:
        return latents, latents, latents.stride(1), 0
    return latents.view(torch.int8), latents.view(torch.bfloat16), latents.stride(1), -(-C // BLOCK)


@triton.jit
def row_of(block_table, s):
    """The index of position s among all rows of a layer's cache; later positions of the same block follow it."""
    i = s // CACHE_BLOCK_
    return (tl.load(block_table + 1 + i) - i) * CACHE_BLOCK_ + s


@triton.jit
def rows_of(block_table, start, BS: tl.constexpr):
    """The row indices of positions [start, start + BS), int64 [BS]; start is a multiple of BS, so one block has all."""
    tl.static_assert(CACHE_BLOCK_ % BS == 0)
    return row_of(block_table, start) + tl.arange(0, BS)


@triton.jit
def read_latents(
    latents, halves, row, mask, stride, start, C: tl.constexpr, BC: tl.constexpr, SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Columns start to start + BC of the latents of rows [BS] -> [BS, BC] in DTYPE; zeros if masked or past C."""
    c = start + tl.arange(0, BC)
    numbers = tl.load(latents + (row * stride)[:, None] + c[None, :], mask[:, None] & (c < C)[None, :], 0)
    if SCALES > 0:
        WIDTH: tl.constexpr = min(BC, BLOCK_)
        COUNT: tl.constexpr = BC // WIDTH
        BS: tl.constexpr = row.shape[0]
        block = start // BLOCK_ + tl.arange(0, COUNT)
        index = (row * (stride // 2))[:, None] + C // 2 + block[None, :]
        scales = tl.load(halves + index, mask[:, None] & (block < SCALES)[None, :], 0.0).to(tl.float32)
        numbers = (numbers.to(tl.float32).reshape(BS, COUNT, WIDTH) * scales[:, :, None]).reshape(BS, BC)
    return numbers.to(DTYPE)


@triton.jit
def read_keys(
    halves, row, mask, stride, C: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The rotated rope keys of rows [BS] -> [BS, BP] in DTYPE; zeros if masked or past P."""
    p = tl.arange(0, BP)
    index = row * (stride // 2) + (C // 2 + SCALES) if SCALES > 0 else row * stride + C
    return tl.load(halves + index[:, None] + p[None, :], mask[:, None] & (p < P)[None, :], 0.0).to(DTYPE)


@triton.jit(do_not_specialize=["table_stride", "sequences"])
def _write_latents(
    latents, halves, block_tables, offsets, kv_a, weight, rotation,
    stride, kv_a_stride, table_stride, sequences, P, eps,
    BB: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, SCALES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the row of token t: the normalised latent, quantised if the cache is 8-bit, and the rotated rope key."""
    wait_for_previous_kernel(PDL)
    t = tl.program_id(0).to(tl.int64)
    kv_a += t * kv_a_stride
    b = tl.arange(0, BB)
    sequence = tl.sum((tl.load(offsets + 1 + b, b < sequences, 1 << 40) <= t).to(tl.int64))
    block_tables += sequence * table_stride
    row = row_of(block_tables, tl.load(block_tables) + t - tl.load(offsets + sequence))
    c, p = tl.arange(0, BC), tl.arange(0, BP)
    value = normed(tl.load(kv_a + c, c < C, 0.0).to(tl.float32), weight, C, eps, c)
    key = row * stride + C
    if SCALES > 0:
        WIDTH: tl.constexpr = min(BC, BLOCK_)
        COUNT: tl.constexpr = BC // WIDTH
        blocks = tl.where(c < C, value, 0.0).reshape(COUNT, WIDTH)
        largest = tl.max(tl.abs(blocks), 1) / 127.0
        scales = (((largest.to(tl.int32, bitcast=True) + 0xFFFF) >> 16) << 16).to(tl.float32, bitcast=True)
        divisors = tl.where(scales > 0, scales, 1.0)[:, None] + tl.zeros_like(blocks)  # all zeros: avoid 0 / 0
        codes = tl.math.div_rn(blocks, divisors)
        value = ((codes + MAGIC) - MAGIC).reshape(BC).to(tl.int8)
        key = row * (stride // 2) + C // 2
        block = tl.arange(0, COUNT)
        tl.store(halves + key + block, scales, block < SCALES)
        key += SCALES
    tl.store(latents + row * stride + c, value, c < C)
    tl.store(halves + key + p, rotated(kv_a + C, rotation + t * P, p, p < P), p < P)


def write_latents(
    latents: Tensor, metadata: AttentionMetadata, kv_a: Tensor, weight: Tensor, eps: float, rotation: Tensor
) -> None:
    """Append rows to the sequences of a step in a layer's KV cache; see `reference.write_latents`."""
    kv_a, C, tables = contiguous(kv_a), len(weight), metadata.block_tables
    P, B = kv_a.shape[1] - C, len(metadata.counts)
    numbers, halves, stride, scales = views(latents, C)
    _write_latents[(len(kv_a),)](
        numbers, halves, tables, metadata.offsets, kv_a, weight, torch.view_as_real(rotation), stride, kv_a.stride(0),
        tables.stride(0), B, P, eps, BB=max(16, triton.next_power_of_2(B)),
        C=C, BC=triton.next_power_of_2(C), BP=triton.next_power_of_2(P), SCALES=scales, **pdl_arguments(latents.device),
    )  # fmt: skip
