"""Routed experts, read from their records in GPU memory: two launches for any number of token-expert pairs."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from dsv2_local.kernels.format import ExpertLayout, Format
from dsv2_local.kernels.graphs import to_device
from dsv2_local.kernels.triton.dequantize import contiguous
from dsv2_local.kernels.triton.linear import Bank, launch_stream, launch_tile, token_block
from dsv2_local.kernels.triton.tuning import pdl_arguments, wait_for_previous_kernel

STREAMED_PAIRS = 32  # up to this many pairs seldom share an expert, so each pair reads its expert's weights itself
FEW_TOKENS = 16  # up to this many tokens, `_combine` takes few columns per program to occupy all multiprocessors
GROUPED_AT_ONCE = (
    128  # up to this many pairs, as decode steps have, one program groups them; torch takes a dozen launches
)
COPIED_EXPERTS = 8  # unquantised experts that are copied at a time


def expert_outputs(
    x: Tensor,
    records: Tensor,
    layout: ExpertLayout,
    tokens: Tensor,
    slots: Tensor,
    out: Tensor,
    distinct: int | None = None,
) -> None:
    """The outputs of token-expert pairs; see `reference.expert_outputs`. `slots` is read on the device."""
    n, x = len(tokens), contiguous(x)
    if n == 0:
        return
    if layout.format is Format.BF16:
        out.copy_(_plain_outputs(x, records, layout, tokens, slots))
        return
    gate, up, down = Bank.of_records(layout, records)
    hidden = x.new_empty(n, gate.rows)
    if n <= STREAMED_PAIRS:
        shape = {"n": n, "slots": slots, "BT": 1, "COUNT": 1}
        launch_stream(x, hidden, gate, up, n, tokens=tokens, **shape)
        launch_stream(hidden, out, down, None, n, **shape)
        return
    distinct = min(n, len(records), distinct or n)
    block = token_block(n // distinct)
    sources, order, pieces = group_pairs(tokens, slots, len(records), block, distinct)
    shape = {"n": n, "pieces": pieces, "SPLIT": 1, "BT": block, "COUNT": 1}
    launch_tile(x, hidden, gate, up, len(pieces), sources=sources, **shape)
    launch_tile(hidden, out, down, None, len(pieces), targets=order, **shape)


def sorted_expert_outputs(
    x: Tensor, records: Tensor, layout: ExpertLayout, tokens: Tensor, runs: Sequence[tuple[int, int]], out: Tensor
) -> None:
    """The outputs of pairs that are sorted by slot; see `reference.sorted_expert_outputs`."""
    n, x = len(tokens), contiguous(x)
    if n <= STREAMED_PAIRS or layout.format is Format.BF16:
        slots = np.repeat(*np.array(runs, dtype=np.int64).T)
        expert_outputs(x, records, layout, tokens, to_device(torch.from_numpy(slots), x.device), out)
        return
    gate, up, down = Bank.of_records(layout, records)
    hidden, block = x.new_empty(n, gate.rows), token_block(n // len(runs))
    pieces = to_device(torch.from_numpy(cut_runs(runs, block)), x.device)
    shape = {"n": n, "pieces": pieces, "SPLIT": 1, "BT": block, "COUNT": 1}
    launch_tile(x, hidden, gate, up, len(pieces), sources=tokens, **shape)
    launch_tile(hidden, out, down, None, len(pieces), **shape)


def cut_runs(runs: Sequence[tuple[int, int]], block: int) -> NDArray[np.int64]:
    """Cut runs of pairs into pieces of at most `block` pairs -> int64 [pieces, 3]: slot, first and last (exclusive)."""
    pieces, first = [], 0
    for slot, count in runs:
        end = first + count
        pieces += [(slot, start, min(start + block, end)) for start in range(first, end, block)]
        first = end
    return np.array(pieces, dtype=np.int64)


@triton.jit(do_not_specialize=["n", "count"])
def _group_pairs(
    tokens, slots, sources, order, pieces, n, count, block, BN: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr
):
    """`group_pairs` for n <= BN pairs and `count` <= BP pieces, in one program that compares every pair with every."""
    wait_for_previous_kernel(PDL)
    i = tl.arange(0, BN)
    slot = tl.load(slots + i, i < n, -1).to(tl.int32)
    used = slot >= 0
    key = tl.where(used, slot, 1 << 23) * BN + i  # skipped pairs come last
    earlier = key[None, :] < key[:, None]
    rank = tl.sum(earlier.to(tl.int32), 1)
    same = slot[None, :] == slot[:, None]
    position = tl.sum((same & earlier).to(tl.int32), 1)  # among the pairs of the slot
    starts = used & (position % block == 0)
    piece = tl.sum((earlier & starts[None, :]).to(tl.int32), 1)
    last = tl.minimum(rank + block, rank - position + tl.sum(same.to(tl.int32), 1))
    tl.store(order + rank, i, i < n)
    tl.store(sources + rank, tl.load(tokens + i, i < n, 0), i < n)
    tl.store(pieces + piece * 3, slot, starts)
    tl.store(pieces + piece * 3 + 1, rank, starts)
    tl.store(pieces + piece * 3 + 2, last, starts)
    p = tl.arange(0, BP)
    unused = (p >= tl.sum(starts.to(tl.int32))) & (p < count)
    for part in tl.static_range(3):
        tl.store(pieces + p * 3 + part, tl.zeros([BP], tl.int64), unused)


def group_pairs(tokens: Tensor, slots: Tensor, count: int, block: int, distinct: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort pairs by slot and cut the pairs of each slot into pieces, on the device and without waiting for it.

    Args:
        tokens: int64 [n], the token of each pair.
        slots: int64 [n], the slot of each pair, below `count`; pairs with a negative one are in no piece.
        block: pairs per piece; the last piece of a slot may have fewer.
        distinct: how many slots occur at most.

    Returns:
        sources, order: int64 [n], the tokens of the pairs sorted by slot, and these pairs.
        pieces: int64 [the largest possible number, 3]: slot, first and last (exclusive) index into `order`; pieces at
            the end may be empty.
    """
    n = len(slots)
    if n <= GROUPED_AT_ONCE:
        sources, order = torch.empty(2, n, dtype=torch.int64, device=slots.device)
        pieces = slots.new_empty(triton.cdiv(n, block) + distinct, 3)
        _group_pairs[(1,)](
            tokens, slots, sources, order, pieces, n, len(pieces), block, BN=triton.next_power_of_2(n),
            BP=triton.next_power_of_2(len(pieces)), num_warps=8, **pdl_arguments(slots.device),
        )  # fmt: skip
        return sources, order, pieces
    in_order, order = slots.sort(stable=True)
    starts = torch.searchsorted(in_order, torch.arange(count + 1, device=slots.device))  # [S + 1]
    sizes = starts.diff()
    ends = ((sizes + block - 1) // block).cumsum(0)  # pieces of all slots up to this one
    item = torch.arange(triton.cdiv(n, block) + distinct, device=slots.device)
    slot = torch.searchsorted(ends, item, right=True).clamp_(max=count - 1)
    last_block = ends[slot] - item  # 1 for a slot's last piece, larger before it, smaller past the last slot
    size = sizes[slot]
    blocks = (size + block - 1) // block
    first = starts[slot] + (blocks - last_block) * block
    last = torch.where(last_block > 0, torch.minimum(first + block, starts[slot] + size), first)
    return tokens[order], order, torch.stack((slot, first, last), 1)


def _plain_outputs(x: Tensor, records: Tensor, layout: ExpertLayout, tokens: Tensor, slots: Tensor) -> Tensor:
    """Outputs [n, D] of bf16 experts by batched products on copies of their weights; bf16 serves only for checks."""
    y, sizes = [], [rows * cols for rows, cols in layout.shapes.values()]
    for some in torch.arange(len(tokens), device=x.device).split(COPIED_EXPERTS):
        copies = records[slots[some]].view(torch.bfloat16).to(x.dtype).split(sizes, 1)
        gate, up, down = (m.view(len(some), *shape) for m, shape in zip(copies, layout.shapes.values(), strict=True))
        row = x[tokens[some], :, None]  # [m, D, 1]
        y.append((down @ (F.silu(gate @ row) * (up @ row)))[:, :, 0])
    return torch.cat(y)


@triton.jit(do_not_specialize=["first", "count"])  # they differ from call to call
def _combine(
    outputs, rows, ids, weights, start, y, D, first, count,
    K: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BD columns of y[t] = start[t] (or 0) + the weighted outputs of token t, in the order of the experts' ids.

    Of `outputs`, which has `count` rows, the first is the one that `rows` calls `first`.
    """
    wait_for_previous_kernel(PDL)
    t = tl.program_id(0).to(tl.int64)
    d, k = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BK)
    key = tl.load(ids + t * K + k, k < K, 1 << 40) * K + k
    rank = tl.sum((key[None, :] < key[:, None]).to(tl.int32), 1)
    row = t * K + k if rows is None else tl.load(rows + t * K + k, k < K, -1) - first
    row = tl.where(row < count, row, -1)
    weight = tl.load(weights + t * K + k, (k < K) & (row >= 0), 0.0)
    output = tl.load(outputs + row[:, None] * D + d[None, :], ((k < K) & (row >= 0))[:, None] & (d < D)[None, :], 0.0)
    total = tl.zeros([BD], tl.float32) if start is None else tl.load(start + t * D + d, d < D, 0.0)
    for i in tl.static_range(K):
        is_next = rank == i
        part = tl.sum(tl.where(is_next[:, None], output, 0.0), 0)
        total = tl.fma(tl.zeros([BD], tl.float32) + tl.sum(tl.where(is_next, weight, 0.0)), part, total)
    tl.store(y + t * D + d, total, d < D)


def combine(outputs: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, y: Tensor, first: int | None = None) -> None:
    """Add up the outputs of experts; see `reference.combine`. Each term is one fused multiply-add in fp32."""
    _launch_combine(outputs, rows, ids, weights, y, y, first or 0)


def _launch_combine(
    outputs: Tensor,
    rows: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    start: Tensor | None,
    y: Tensor,
    first: int = 0,
) -> None:
    T, K = ids.shape
    D = y.shape[1]
    BD = 256 if T <= FEW_TOKENS else 1024
    _combine[(T, triton.cdiv(D, BD))](
        outputs, rows, ids.contiguous(), weights.contiguous(), start, y, D, first, len(outputs),
        K=K, BK=triton.next_power_of_2(K), BD=BD, **pdl_arguments(y.device),
    )  # fmt: skip


@cache
def _few_tokens(T: int, K: int, device: torch.device) -> Tensor:
    """The token of each pair of few tokens; cached forever, since CUDA graphs read this memory."""
    return torch.arange(T, device=device).repeat_interleave(K)


def experts(x: Tensor, records: Tensor, layout: ExpertLayout, ids: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the routed experts, added in the order of their ids; see `reference.experts`."""
    T, K = ids.shape
    outputs, y = torch.empty(T * K, x.shape[1], device=x.device), torch.empty_like(x)
    tokens = _few_tokens(T, K, x.device) if T <= FEW_TOKENS else torch.arange(T * K, device=x.device) // K
    expert_outputs(x, records, layout, tokens, ids.flatten(), outputs)
    _launch_combine(outputs, None, ids, weights, None, y)
    return y
