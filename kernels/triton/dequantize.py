"""Dequantising NF4 and int8 weights in Triton, from stored words to numbers.

A tile of `kernels.layout` has 8 rows × 64 columns. It is read as int32 words, each with PER columns of one row: in nf4
a row has 8 words of 8 columns per block, in int8 16 words of 4 columns. Words are numbered along a row: word w covers
columns w·PER to w·PER + PER - 1. The words w of the 8 rows of a group are adjacent in memory.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_local.kernels.format import BLOCK, ROWS
from dsv2_local.kernels.layout import NF4_LEVELS

BLOCK_ = tl.constexpr(BLOCK)
ROWS_ = tl.constexpr(ROWS)

# Two ways to convert a code to its level, both exact. GATHER loads from a table of 16 numbers in memory: for kernels
# that read few weights, and for the interpreter, which cannot run inline assembly. SHUFFLE exchanges registers within a
# warp: the fastest way on an H200 (docs/log.md).
GATHER, SHUFFLE = 0, 1
SHUFFLE_ = tl.constexpr(SHUFFLE)


@cache
def level_table(device: torch.device) -> Tensor:
    """The levels of NF4 on `device`, float32 [16]."""
    return torch.tensor(NF4_LEVELS, device=device)


def contiguous(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; the kernels need no more than that."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _level(words, SHIFT: tl.constexpr, table):
    """The level of the code at bit SHIFT."""
    code = (words >> SHIFT) & 15
    return tl.load(table + code)


@triton.jit
def _shuffled_levels(words, table):
    """The levels of each word's 8 codes, in column order, by warp shuffles: lane i of each half warp holds level i.

    shfl.idx within segments of 16 lanes (mask 0x10) uses only the low four bits of its index, so the codes need no
    masking.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 lane, level, code;
        .reg .b64 place;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 15;
        mad.wide.u32 place, lane, 4, $9;
        ld.global.nc.b32 level, [place];
        shfl.sync.idx.b32 $0, level, $8, 0x101f, 0xffffffff;
        shr.u32 code, $8, 8;
        shfl.sync.idx.b32 $1, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 16;
        shfl.sync.idx.b32 $2, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 24;
        shfl.sync.idx.b32 $3, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 4;
        shfl.sync.idx.b32 $4, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 12;
        shfl.sync.idx.b32 $5, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 20;
        shfl.sync.idx.b32 $6, level, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 28;
        shfl.sync.idx.b32 $7, level, code, 0x101f, 0xffffffff;
        }
        """,
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,l",
        [words, table],
        dtype=(tl.float32,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _byte(words, INDEX: tl.constexpr):
    """The signed byte INDEX of int32 words, as fp32."""
    return ((words << (24 - 8 * INDEX)) >> 24).to(tl.float32)


@triton.jit
def unpack(words, table, NF4: tl.constexpr, LOOKUP: tl.constexpr):
    """Unpack words into a tuple of 8 (nf4) or 4 (int8) fp32 tensors, one per column, not yet scaled."""
    if NF4 and LOOKUP == SHUFFLE_:
        values = _shuffled_levels(words, table)
    elif not NF4:
        values = (_byte(words, 0), _byte(words, 1), _byte(words, 2), _byte(words, 3))
    else:
        values = (
            _level(words, 0, table),
            _level(words, 8, table),
            _level(words, 16, table),
            _level(words, 24, table),
            _level(words, 4, table),
            _level(words, 12, table),
            _level(words, 20, table),
            _level(words, 28, table),
        )
    return values


@triton.jit
def joined(v, PER: tl.constexpr):
    """Stack a tuple of 4 or 8 tensors [...] into a tensor [..., PER]: the inverse of `parted`."""
    even, odd = tl.join(v[0], v[2]), tl.join(v[1], v[3])
    if PER == 8:
        even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
        odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
    columns = tl.join(even, odd)
    shape: tl.constexpr = v[0].shape
    return columns.reshape(shape + (PER,))  # noqa: RUF005 - Triton cannot unpack


@triton.jit
def _quarters(x):
    """Split x [..., 2, 2] into a tuple of 4 tensors [...]."""
    even, odd = tl.split(x)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def parted(x, PER: tl.constexpr):
    """Split x [A, B, PER] into a tuple of 4 or 8 columns [A, B]; free if a thread holds all PER numbers."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    if PER == 4:
        columns = _quarters(x.reshape(A, B, 2, 2))
    else:
        even, odd = tl.split(x.reshape(A, B, 2, 2, 2))
        a, b, c, d = _quarters(even)
        e, f, g, h = _quarters(odd)
        columns = (a, e, b, f, c, g, d, h)
    return columns
