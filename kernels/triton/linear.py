"""Products with quantised matrices: `stream` for few tokens, `tile` on tensor cores for many.

Both multiply rows of x by the matrices of a `Bank`: one matrix (`linear`), the heads of one (`attention.by_heads`), or
the experts in their records (`kernels.triton.experts`). Given `up` matrices, they compute two products and write
silu(gate) · up.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from dsv2_local.kernels.format import BLOCK, ROWS, ExpertLayout, Format
from dsv2_local.kernels.layout import Matrix, expert_matrices
from dsv2_local.kernels.triton.dequantize import (
    BLOCK_,
    GATHER,
    ROWS_,
    SHUFFLE,
    joined,
    level_table,
    parted,
    unpack,
)
from dsv2_local.kernels.triton.tuning import INTERPRETED, pdl_arguments, processors, tuned, wait_for_previous_kernel

STREAMED_TOKENS = 4  # up to this many tokens, reading the weights hides the arithmetic, so `stream` is used
LIBRARY_TOKENS = 256  # from here on dequantising and cuBLAS is faster: 16 against 30 us on an H200
PROGRAMS_PER_PROCESSOR = 2  # launches with fewer programs than this split the columns


@dataclass(frozen=True)
class Bank:
    """`count` quantised matrices [rows, cols] at equal distances in memory.

    `strides` are the distances from one matrix to the next, in int32 words and in fp16 scales.
    """

    format: Format
    rows: int
    cols: int
    words: Tensor
    scales: Tensor
    strides: tuple[int, int] = (0, 0)
    count: int = 1

    @classmethod
    def of(cls, matrix: Matrix, count: int = 1) -> "Bank":
        """Cut the rows of a matrix into `count` equal slices, each of whole groups of 8 rows."""
        assert matrix.scales is not None
        rows = matrix.rows // count
        assert count == 1 or (rows * count == matrix.rows and rows % ROWS == 0)
        words = matrix.codes.view(torch.int32)
        strides = words.numel() // count, matrix.scales.numel() // count
        return cls(matrix.format, rows, matrix.cols, words, matrix.scales, strides, count)

    @classmethod
    def of_records(cls, layout: ExpertLayout, records: Tensor) -> tuple["Bank", "Bank", "Bank"]:
        """View records uint8 [slots, layout.nbytes] as the gate, up and down matrices of all slots, without a copy."""
        strides = layout.nbytes // 4, layout.nbytes // 2
        gate, up, down = (
            replace(cls.of(matrix), strides=strides, count=len(records))
            for matrix in expert_matrices(layout, records[0])
        )
        return gate, up, down

    @property
    def arguments(self) -> dict[str, Any]:
        """Shape, strides and level table, as keyword arguments of the kernels."""
        nf4 = self.format is Format.NF4
        blocks = -(-self.cols // BLOCK)
        word_stride, scale_stride = self.strides
        return {
            "table": level_table(self.words.device), "word_stride": word_stride, "scale_stride": scale_stride,
            "rows": self.rows, "cols": self.cols, "blocks": blocks, "NF4": nf4,
        }  # fmt: skip


@triton.jit
def _word_offsets(group, word, blocks, WORDS: tl.constexpr):
    """The offsets of words `word` [KW] of groups `group` [BG] of 8 rows, and of their scales: both [BG, KW, 8]."""
    tile = group[:, None, None] * blocks + (word // WORDS)[None, :, None]
    row = tl.arange(0, ROWS_)[None, None, :]
    return (tile * WORDS + (word % WORDS)[None, :, None]) * ROWS_ + row, tile * ROWS_ + row


@triton.jit
def _silu_product(gate, up):
    """silu(gate) · up."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _block_range(blocks, SPLIT: tl.constexpr, KB: tl.constexpr):
    """The first and last (exclusive) block of columns of this program, for SPLIT programs and steps of KB blocks."""
    count = tl.cdiv(tl.cdiv(blocks, SPLIT), KB) * KB
    first = tl.program_id(2) * count
    return first, tl.minimum(first + count, blocks)


@triton.jit
def _add_word(sum_, words, scale, numbers, table, NF4: tl.constexpr, LOOKUP: tl.constexpr):
    """sum_ [BT, BG, U] + scale · words [BG, U] times the numbers of x in their columns, a tuple of [BT, U]."""
    values = unpack(words, table, NF4, LOOKUP)
    product = numbers[0].to(tl.float32)[:, None, :] * values[0][None]
    for i in tl.static_range(1, 8 if NF4 else 4):
        product = tl.fma(numbers[i].to(tl.float32)[:, None, :], values[i][None], product)
    return tl.fma(product, scale.to(tl.float32)[None], sum_)


@triton.jit
def _add_units(sums, units, scales, numbers, table, NF4: tl.constexpr, LOOKUP: tl.constexpr):
    """The sums of four rows, a tuple of [BT, BG, U], + units [BG, U, 4] times the numbers of x in their columns.

    Each of the four rows is a tensor of its own, so that a thread reuses the numbers of x that it has read. With the
    row as a dimension, the compiler would distribute it over threads, which then read each number of x several times or
    exchange sums through shared memory.
    """
    words, scale = parted(units, 4), parted(scales, 4)
    return (
        _add_word(sums[0], words[0], scale[0], numbers, table, NF4, LOOKUP),
        _add_word(sums[1], words[1], scale[1], numbers, table, NF4, LOOKUP),
        _add_word(sums[2], words[2], scale[2], numbers, table, NF4, LOOKUP),
        _add_word(sums[3], words[3], scale[3], numbers, table, NF4, LOOKUP),
    )


@triton.jit
def _row_sums(sums):
    """Add up the sums of four rows, a tuple of [BT, BG, U], along the columns: [BT, BG, 8]."""
    units = joined(sums, 4)
    BT: tl.constexpr = units.shape[0]
    BG: tl.constexpr = units.shape[1]
    HALF: tl.constexpr = units.shape[2] // 2
    return tl.sum(units.reshape(BT, BG, HALF, ROWS_), 2)


LOOKUP = GATHER if INTERPRETED else SHUFFLE

# Groups of rows, blocks of columns and warps of a program of `stream`: for short rows, for few rows, for many rows.
_SHORT, _FEW, _MANY = ((4, 2, 4), (8, 2, 4)), ((1, 32, 8), (1, 16, 8)), ((1, 8, 4), (1, 8, 2))
_STREAM_CONFIGS = [
    triton.Config({"BG": groups, "KB": blocks}, num_warps=warps) for groups, blocks, warps in (*_SHORT, *_FEW, *_MANY)
]


def _configs_to_try(configs: list[triton.Config], given: dict[str, Any], **more: Any) -> list[triton.Config]:
    """The configurations of `stream` that may be the fastest for a shape, as measured on an H200 (docs/log.md)."""
    given = given | more
    groups = triton.cdiv(given["rows"], ROWS) * given["COUNT"]
    many = given["slots"] is not None or groups > 1024
    kind = _SHORT if given["cols"] <= 4 * BLOCK else _MANY if many or given["cols"] <= 16 * BLOCK else _FEW
    # For a short prompt, tuning would take longer than it saves. 32 blocks of two int8 matrices overflow the registers.
    first = kind is _FEW and not given["NF4"] and given["up_words"] is not None
    tried = kind if given["BT"] == 1 else kind[first : first + 1]
    return [config for config in configs if (config.kwargs["BG"], config.kwargs["KB"], config.num_warps) in tried]


@triton.jit
def _read_units(words, scales, offset, scale_offset, block, last, unit, mask, NF4: tl.constexpr):
    """Load the units [BG, U, 4] of the blocks from `block` on, and their scales; zeros from block `last` on."""
    WORDS: tl.constexpr = 8 if NF4 else 16
    stored = mask & (block * WORDS * 2 + unit < last * WORDS * 2)[None, :, None]
    units = tl.load(words + block * (WORDS * ROWS_) + offset, stored, 0)
    return units, tl.load(scales + block * ROWS_ + scale_offset, stored, 0.0)


@tuned(_STREAM_CONFIGS, key=["rows", "cols", "NF4", "COUNT", "BT"], candidates=_configs_to_try)
@triton.jit(do_not_specialize=["n"])
def stream(
    x, y, words, scales, up_words, up_scales, table, tokens, slots,
    n, x_stride, word_stride, scale_stride, rows, cols, blocks,
    NF4: tl.constexpr, COUNT: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    BG: tl.constexpr, KB: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """Products of few rows of x, limited by memory bandwidth: a program computes BG groups of rows of one matrix.

    It reads units of 16 bytes, the same columns of the lower or the upper four rows of a group. It loads the units of
    the next step before it computes with the last ones, so that the loads never wait for arithmetic.

    Grid: items, groups / BG. Without `slots`, item i is BT rows of x, a stride of COUNT apart, times matrix i % COUNT.
    With `slots`, it is row tokens[i] of x (or i, without `tokens`) times matrix slots[i], and BT is 1.
    """
    WORDS: tl.constexpr = 8 if NF4 else 16
    PER: tl.constexpr = 8 if NF4 else 4
    item = tl.program_id(0)
    if slots is not None:
        wait_for_previous_kernel(PDL)
    if slots is None:
        slot = (item % COUNT).to(tl.int64)
        index = item // COUNT * BT + tl.arange(0, BT)
        target = index * COUNT + slot
        source = target
    else:
        slot = tl.load(slots + item)
        if slot < 0:
            return
        index = item + tl.arange(0, BT)
        target = index.to(tl.int64)
        source = target if tokens is None else tl.load(tokens + index)
    group = tl.program_id(1) * BG + tl.arange(0, BG)
    words += slot * word_stride
    scales += slot * scale_stride
    if up_words is not None:
        up_words += slot * word_stride
        up_scales += slot * scale_stride
    UNITS: tl.constexpr = KB * WORDS * 2
    unit, four = tl.arange(0, UNITS), tl.arange(0, 4)[None, None, :]
    unit_offset = ((group * blocks * WORDS * 2)[:, None] + unit[None, :])[:, :, None] * 4 + four
    tile_ = (group * blocks)[:, None] + (unit // (2 * WORDS))[None, :]
    scale_offset = (tile_ * ROWS_ + (unit % 2 * 4)[None, :])[:, :, None] + four
    valid = (group * ROWS_ < rows)[:, None, None]
    zero = tl.zeros([BT, BG, UNITS], tl.float32)
    sums, up_sums = (zero, zero, zero, zero), (zero, zero, zero, zero)
    units, scale = _read_units(words, scales, unit_offset, scale_offset, 0, blocks, unit, valid, NF4)
    if up_words is not None:
        up_units, up_scale = _read_units(up_words, up_scales, unit_offset, scale_offset, 0, blocks, unit, valid, NF4)
    if slots is None:
        wait_for_previous_kernel(PDL)
    x += source * x_stride
    part = (unit // 2 * PER)[:, None] + tl.arange(0, PER)[None, :]
    for block in range(0, blocks, KB):
        column = block * BLOCK_ + part
        read = (index < n)[:, None, None] & (column < cols)[None, :, :]
        numbers = parted(tl.load(x[:, None, None] + column[None, :, :], read, 0.0), PER)
        now, now_scale = units, scale
        units, scale = _read_units(words, scales, unit_offset, scale_offset, block + KB, blocks, unit, valid, NF4)
        if up_words is not None:
            up_now, up_now_scale = up_units, up_scale
            up_units, up_scale = _read_units(
                up_words, up_scales, unit_offset, scale_offset, block + KB, blocks, unit, valid, NF4
            )
            up_sums = _add_units(up_sums, up_now, up_now_scale, numbers, table, NF4, LOOKUP)
        sums = _add_units(sums, now, now_scale, numbers, table, NF4, LOOKUP)
    result = _row_sums(sums)
    if up_words is not None:
        result = _silu_product(result, _row_sums(up_sums))
    row = (group * ROWS_)[None, :, None] + tl.arange(0, ROWS_)[None, None, :]
    tl.store(y + target[:, None, None] * rows + row, result, (index < n)[:, None, None] & (row < rows))


@triton.jit
def weight_tile(
    words, scales, table, group, word, stored, blocks, DTYPE: tl.constexpr, NF4: tl.constexpr, LOOKUP: tl.constexpr
):
    """Dequantise words `word` [KW] of groups `group` [BG] to weights [8·BG, KW·PER] in DTYPE."""
    word_offset, scale_offset = _word_offsets(group, word, blocks, 8 if NF4 else 16)
    PER: tl.constexpr = 8 if NF4 else 4
    values = joined(unpack(tl.load(words + word_offset, stored, 0), table, NF4, LOOKUP), PER)  # [BG, KW, 8, PER]
    values *= tl.load(scales + scale_offset, stored, 0.0).to(tl.float32)[:, :, :, None]
    BG: tl.constexpr = values.shape[0]
    COLS: tl.constexpr = values.shape[1] * values.shape[3]
    return values.to(DTYPE).permute(0, 2, 1, 3).reshape(BG * ROWS_, COLS)


@triton.jit
def dot(a, b, acc):
    """acc + a · b in fp32. The interpreter would multiply the bits of bf16 as integers, so valid it is converted."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["n"])
def tile(
    x, y, words, scales, up_words, up_scales, table, sources, targets, pieces,
    n, x_stride, word_stride, scale_stride, rows, cols, blocks,
    NF4: tl.constexpr, COUNT: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr,
    BG: tl.constexpr, KB: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """Products of many rows of x on tensor cores: a program computes BT rows of x times 8·BG rows of one matrix.

    Grid: items, groups / BG, SPLIT. Without `pieces`, items are as in `stream`. With `pieces` (int64 [items, 3]: slot,
    first, last), an item is the indices first to last (exclusive; at most BT) times matrix `slot`: index i reads row
    sources[i] of x (or i, without `sources`) and writes row targets[i] of y (or i).
    """
    WORDS: tl.constexpr = 8 if NF4 else 16
    item = tl.program_id(0)
    if pieces is None:
        slot = (item % COUNT).to(tl.int64)
        index = item // COUNT * BT + tl.arange(0, BT)
        valid = index < n
        target = index * COUNT + slot
        source = target
    else:
        slot = tl.load(pieces + item * 3)
        first_index, last_index = tl.load(pieces + item * 3 + 1), tl.load(pieces + item * 3 + 2)
        if first_index >= last_index:
            return
        index = first_index + tl.arange(0, BT)
        valid = index < last_index
        source = index if sources is None else tl.load(sources + index, valid, 0)
        target = index if targets is None else tl.load(targets + index, valid, 0)
    group = tl.program_id(1) * BG + tl.arange(0, BG)
    words += slot * word_stride
    scales += slot * scale_stride
    if up_words is not None:
        up_words += slot * word_stride
        up_scales += slot * scale_stride
    x += (source * x_stride)[None, :]
    sum_ = tl.zeros([BG * ROWS_, BT], tl.float32)
    up_sum = sum_
    first, last = _block_range(blocks, SPLIT, KB)
    for block in range(first, last, KB):
        word = block * WORDS + tl.arange(0, KB * WORDS)
        stored = (group * ROWS_ < rows)[:, None, None] & (word < last * WORDS)[None, :, None]
        column = block * BLOCK_ + tl.arange(0, KB * BLOCK_)
        numbers = tl.load(x + column[:, None], (column < cols)[:, None] & valid[None, :], 0.0)  # [BK, BT]
        weights = weight_tile(words, scales, table, group, word, stored, blocks, numbers.dtype, NF4, LOOKUP)
        sum_ = dot(weights, numbers, sum_)
        if up_words is not None:
            weights = weight_tile(up_words, up_scales, table, group, word, stored, blocks, numbers.dtype, NF4, LOOKUP)
            up_sum = dot(weights, numbers, up_sum)
    if up_words is not None:
        sum_ = _silu_product(sum_, up_sum)
    row = tl.program_id(1) * BG * ROWS_ + tl.arange(0, BG * ROWS_)
    y += tl.program_id(2).to(tl.int64) * n * COUNT * rows
    tl.store(y + target[None, :] * rows + row[:, None], sum_, valid[None, :] & (row < rows)[:, None])


def _split(programs: int, cols: int, device: torch.device) -> int:
    """The number of parts to split the columns into so that the launch fills the GPU; a part is at least 8 blocks."""
    return max(1, min(PROGRAMS_PER_PROCESSOR * processors(device) // programs, cols // (8 * BLOCK)))


def token_block(tokens: int) -> int:
    """BT, the rows of x per program of `tile`: one of few sizes, since each is compiled separately."""
    return 16 if tokens <= 16 else 64 if tokens <= 64 else 128


def multiply(x: Tensor, bank: Bank, up: Bank | None = None) -> Tensor:
    """Multiply row i of x [n·count, ≥ cols] by matrix i % count -> [n·count, rows]; with `up`, silu(gate) · up."""
    n = len(x) // bank.count
    if n <= STREAMED_TOKENS:
        y = x.new_empty(len(x), bank.rows)
        launch_stream(x, y, bank, up, bank.count, n=n, COUNT=bank.count, BT=1 if n == 1 else STREAMED_TOKENS)
        return y
    BT = token_block(n)
    items, groups = triton.cdiv(n, BT) * bank.count, triton.cdiv(bank.rows, ROWS)
    split = 1 if up else _split(items * triton.cdiv(groups, 8), bank.cols, x.device)
    y = x.new_empty(split, len(x), bank.rows, dtype=x.dtype if split == 1 else torch.float32)
    launch_tile(x, y, bank, up, items, n=n, COUNT=bank.count, BT=BT, SPLIT=split)
    return y[0] if split == 1 else y.sum(0).to(x.dtype)


def launch_stream(x: Tensor, y: Tensor, bank: Bank, up: Bank | None, items: int, **arguments: Any) -> None:
    """Launch `stream` for `items` items."""
    groups = triton.cdiv(bank.rows, ROWS)
    stream[lambda meta: (items, triton.cdiv(groups, meta["BG"]))](
        x=x, y=y, words=bank.words, scales=bank.scales, up_words=up and up.words, up_scales=up and up.scales,
        x_stride=x.stride(0), **bank.arguments, **dict.fromkeys(("tokens", "slots")) | arguments,
        LOOKUP=LOOKUP, **pdl_arguments(x.device),
    )  # fmt: skip


def launch_tile(x: Tensor, y: Tensor, bank: Bank, up: Bank | None, items: int, **arguments: Any) -> None:
    """Launch `tile` for `items` items."""
    groups = triton.cdiv(bank.rows, ROWS)
    BG = 8
    tile[(items, triton.cdiv(groups, BG), arguments["SPLIT"])](
        x=x, y=y, words=bank.words, scales=bank.scales, up_words=up and up.words, up_scales=up and up.scales,
        x_stride=x.stride(0), **bank.arguments, **dict.fromkeys(("sources", "targets", "pieces")) | arguments,
        BG=BG, KB=1, LOOKUP=LOOKUP, num_warps=4, num_stages=3,
    )  # fmt: skip


@triton.jit
def _dequantize(
    words, scales, table, y, rows, cols, blocks,
    NF4: tl.constexpr, BG: tl.constexpr, KB: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """Dequantise BG groups of rows × KB blocks of columns to y [rows, cols]."""
    WORDS: tl.constexpr = 8 if NF4 else 16
    group = tl.program_id(0) * BG + tl.arange(0, BG)
    word = tl.program_id(1) * KB * WORDS + tl.arange(0, KB * WORDS)
    stored = (group * ROWS_ < rows)[:, None, None] & (word < blocks * WORDS)[None, :, None]
    values = weight_tile(words, scales, table, group, word, stored, blocks, y.dtype.element_ty, NF4, LOOKUP)
    row = tl.program_id(0).to(tl.int64) * BG * ROWS_ + tl.arange(0, BG * ROWS_)
    column = tl.program_id(1) * KB * BLOCK_ + tl.arange(0, KB * BLOCK_)
    valid = (row < rows)[:, None] & (column < cols)[None, :]
    tl.store(y + row[:, None] * cols + column[None, :], values, valid)


def dequantize(matrix: Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert a stored matrix to plain numbers [R, C]: level × scale in fp32, then rounded to `dtype`."""
    if matrix.scales is None:
        return matrix.codes.to(dtype)
    bank = Bank.of(matrix)
    y = torch.empty(matrix.rows, matrix.cols, dtype=dtype, device=bank.words.device)
    shape = {name: bank.arguments[name] for name in ("table", "rows", "cols", "blocks", "NF4")}
    grid = (triton.cdiv(matrix.rows, 8 * ROWS), triton.cdiv(matrix.cols, 2 * BLOCK))
    _dequantize[grid](words=bank.words, scales=bank.scales, y=y, **shape, BG=8, KB=2, LOOKUP=GATHER)
    return y


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [T, C] · weightᵀ -> [T, R]."""
    if weight.scales is None or len(x) >= LIBRARY_TOKENS:
        return F.linear(x, dequantize(weight, x.dtype))
    return multiply(x, Bank.of(weight))


def swiglu(x: Tensor, gate: Matrix, up: Matrix, down: Matrix) -> Tensor:
    """down(silu(gate(x)) · up(x)) for x [T, D] -> [T, D]."""
    if gate.scales is None or len(x) >= LIBRARY_TOKENS:
        return linear(F.silu(linear(x, gate)) * linear(x, up), down)
    return linear(multiply(x, Bank.of(gate), Bank.of(up)), down)
