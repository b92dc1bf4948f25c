"""Routed experts from their records in GPU slots: two launches for any number of pairs of a token and an expert."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from dsv2_local.kernels.format import ExpertLayout, Format
from dsv2_local.kernels.triton.dequantize import contiguous
from dsv2_local.kernels.triton.linear import Bank, launch, stream, tile, token_block

STREAMED_PAIRS = 32  # up to here pairs seldom share an expert, so that each reads its own
COPIED_EXPERTS = 8  # unquantised experts in memory beside their slots


def expert_outputs(
    x: Tensor, records: Tensor, layout: ExpertLayout, tokens: Tensor, slots: Tensor, out: Tensor
) -> None:
    """What single experts make of single tokens; see `reference.expert_outputs`. `slots` are read on the device."""
    n, x = len(tokens), contiguous(x)
    if n == 0:
        return
    if layout.format is Format.BF16:
        out.copy_(_plain_outputs(x, records, layout, tokens, slots))
        return
    gate, up, down = Bank.of_records(layout, records)
    hidden = x.new_empty(n, gate.rows)
    if n <= STREAMED_PAIRS:
        shape = {"SPLIT": 1, "BT": 1, "COUNT": 1}
        launch(stream, x, hidden, gate, up, n, n, tokens=tokens, slots=slots, **shape)
        launch(stream, hidden, out, down, None, n, n, slots=slots, **shape)
        return
    block = min(64, token_block(n // min(n, len(records))))
    order, pieces = group_pairs(slots, len(records), block)
    shape = {"SPLIT": 1, "BT": block, "COUNT": 1}
    launch(tile, x, hidden, gate, up, n, len(pieces), pieces=pieces, sources=tokens[order], **shape)
    launch(tile, hidden, out, down, None, n, len(pieces), pieces=pieces, targets=order, **shape)


def group_pairs(slots: Tensor, count: int, block: int) -> tuple[Tensor, Tensor]:
    """The pairs of each slot cut into blocks of one size, on the device and without asking it anything.

    Args:
        slots: int64 [n], below `count`.
        block: pairs in a block; the last of a slot may have fewer.

    Returns:
        order: int64 [n], pairs sorted by slot.
        pieces: int64 [the most that there can be, 3]: slot, and the first and last (exclusive) place in `order`; the
            last pieces may be empty.
    """
    n = len(slots)
    in_order, order = slots.sort(stable=True)
    starts = torch.searchsorted(in_order, torch.arange(count + 1, device=slots.device))  # [S + 1]
    sizes = starts.diff()
    ends = ((sizes + block - 1) // block).cumsum(0)  # blocks up to and with each slot
    item = torch.arange(triton.cdiv(n, block) + min(n, count), device=slots.device)
    slot = torch.searchsorted(ends, item, right=True).clamp_(max=count - 1)
    last_block = ends[slot] - item  # 1 for a slot's last block, more before, less after all
    size = sizes[slot]
    blocks = (size + block - 1) // block
    first = starts[slot] + (blocks - last_block) * block
    last = torch.where(last_block > 0, torch.minimum(first + block, starts[slot] + size), first)
    return order, torch.stack((slot, first, last), 1)


def _plain_outputs(x: Tensor, records: Tensor, layout: ExpertLayout, tokens: Tensor, slots: Tensor) -> Tensor:
    """Outputs [n, D] of unquantised experts, which are copied to where a product wants them: a format for checks."""
    y, sizes = [], [rows * cols for rows, cols in layout.shapes.values()]
    for some in torch.arange(len(tokens), device=x.device).split(COPIED_EXPERTS):
        copies = records[slots[some]].view(torch.bfloat16).to(x.dtype).split(sizes, 1)
        gate, up, down = (m.view(len(some), *shape) for m, shape in zip(copies, layout.shapes.values(), strict=True))
        row = x[tokens[some], :, None]  # [m, D, 1]
        y.append((down @ (F.silu(gate @ row) * (up @ row)))[:, :, 0])
    return torch.cat(y)


@triton.jit
def _combine(outputs, rows, ids, weights, y, D, K, BD: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.load(y + t * D + d, d < D, 0.0)
    last = tl.full([], -1, tl.int64)
    for _ in range(K):  # the next by number, as few as they are
        next_key, at = tl.full([], 1 << 60, tl.int64), tl.full([], 0, tl.int64)
        for k in range(K):
            key = tl.load(ids + t * K + k) * K + k
            nearer = (key > last) & (key < next_key)
            at = tl.where(nearer, t * K + k, at)
            next_key = tl.where(nearer, key, next_key)
        row = tl.load(rows + at)
        output = tl.load(outputs + row * D + d, d < tl.where(row >= 0, D, 0), 0.0).to(tl.float32)
        total = tl.where(row >= 0, tl.fma(tl.load(weights + at), output, total), total)
        last = next_key
    tl.store(y + t * D + d, total, d < D)


def combine(outputs: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, y: Tensor) -> None:
    """Add up experts' outputs; see `reference.combine`. Each is one fused multiply-add in fp32."""
    T, K = rows.shape
    D = y.shape[1]
    BD = min(1024, triton.next_power_of_2(D))
    _combine[(T, triton.cdiv(D, BD))](outputs, rows, ids.contiguous(), weights.contiguous(), y, D, K, BD=BD)


def experts(x: Tensor, records: Tensor, layout: ExpertLayout, ids: Tensor, weights: Tensor) -> Tensor:
    """The routed half of a mixture, added in the order of the experts' numbers; see `reference.experts`."""
    T, K = ids.shape
    pairs = torch.arange(T * K, device=x.device)
    outputs, y = torch.empty(T * K, x.shape[1], device=x.device), torch.zeros(x.shape, device=x.device)
    expert_outputs(x, records, layout, pairs // K, ids.flatten(), outputs)
    combine(outputs, pairs.view(T, K), ids, weights, y)
    return y.to(x.dtype)
