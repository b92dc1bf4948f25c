"""What sampling needs to know of a distribution: the top candidates, and the sum of all exponentials."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_local.kernels.format import MAX_CANDIDATES
from dsv2_local.kernels.triton.tuning import pdl_arguments, wait_for_previous_kernel

SIZE = 2048  # logits per program


@triton.jit
def _partial_sums(logits, limits, peaks, sums, out, V, SIZE: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """The largest of SIZE logits of a row, and their Σ exp((logit - largest) / temperature)."""
    wait_for_previous_kernel(PDL)
    part, row = tl.program_id(0), tl.program_id(1)
    i = part * SIZE + tl.arange(0, SIZE)
    value = tl.load(logits + row.to(tl.int64) * V + i, i < V, float("-inf"))
    peak = tl.max(value)
    index = row * tl.num_programs(0) + part
    tl.store(peaks + index, peak)
    tl.store(sums + index, tl.sum(tl.where(i < V, tl.exp((value - peak) * tl.load(limits + 2 * row)), 0.0)))
    if part == 0:
        tl.store(out + row * WIDTH, 0)


@triton.jit
def _candidates(
    logits, limits, peaks, sums, out, V, PARTS: tl.constexpr, BP: tl.constexpr, SIZE: tl.constexpr, MOST: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Append those of SIZE logits of a row that are within the margin to the candidates that other programs found."""
    wait_for_previous_kernel(PDL)
    part, row, p = tl.program_id(0), tl.program_id(1), tl.arange(0, BP)
    peak = tl.load(peaks + row * PARTS + p, p < PARTS, float("-inf"))
    largest = tl.max(peak)
    i = part * SIZE + tl.arange(0, SIZE)
    value = tl.load(logits + row.to(tl.int64) * V + i, i < V, float("-inf"))
    chosen = (value >= largest - tl.load(limits + 2 * row + 1)) & (i < V)
    count = chosen.to(tl.int32)
    out += row * WIDTH
    index = tl.atomic_add(out, tl.sum(count)) + tl.cumsum(count, 0) - 1
    chosen = chosen & (index < MOST)
    tl.store(out + 3 + index, i, chosen)
    tl.store(out + 3 + MOST + index, value.to(tl.int32, bitcast=True), chosen)
    if part == 0:
        weight = tl.exp((peak - largest) * tl.load(limits + 2 * row))
        mass = tl.sum(tl.load(sums + row * PARTS + p, p < PARTS, 0.0) * weight)
        tl.store(out + 1, largest.to(tl.int32, bitcast=True))
        tl.store(out + 2, mass.to(tl.int32, bitcast=True))


def top_candidates(logits: Tensor, limits: Tensor) -> Tensor:
    """The top candidates of fp32 logits [T, V], with limits [T, 2]; see `reference.top_candidates`."""
    (T, V), device, WIDTH = logits.shape, logits.device, 3 + 2 * MAX_CANDIDATES
    parts = triton.cdiv(V, SIZE)
    peaks, sums = torch.empty(2, T, parts, device=device)
    out = torch.empty(T, WIDTH, dtype=torch.int32, device=device)
    _partial_sums[(parts, T)](logits, limits, peaks, sums, out, V, SIZE=SIZE, WIDTH=WIDTH, **pdl_arguments(device))
    _candidates[(parts, T)](
        logits, limits, peaks, sums, out, V, PARTS=parts, BP=triton.next_power_of_2(parts), SIZE=SIZE,
        MOST=MAX_CANDIDATES, WIDTH=WIDTH, **pdl_arguments(device),
    )  # fmt: skip
    return out
