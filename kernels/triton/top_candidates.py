"""What sampling needs to know of a distribution: the likeliest tokens, and the mass of all."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_local.kernels.format import MAX_CANDIDATES
from dsv2_local.kernels.triton.tuning import early, wait_for_earlier

SIZE = 2048  # logits of a program


@triton.jit
def _peaks(logits, limits, peaks, sums, out, V, SIZE: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    """Of SIZE logits of a row the largest, and Σ exp((logit - largest) / temperature)."""
    wait_for_earlier(EARLY)
    part, row = tl.program_id(0), tl.program_id(1)
    i = part * SIZE + tl.arange(0, SIZE)
    value = tl.load(logits + row.to(tl.int64) * V + i, i < V, float("-inf"))
    peak = tl.max(value)
    place = row * tl.num_programs(0) + part
    tl.store(peaks + place, peak)
    tl.store(sums + place, tl.sum(tl.where(i < V, tl.exp((value - peak) * tl.load(limits)), 0.0)))
    if part == 0:
        tl.store(out + row * WIDTH, 0)


@triton.jit
def _candidates(
    logits, limits, peaks, sums, out, V, PARTS: tl.constexpr, BP: tl.constexpr, SIZE: tl.constexpr, MOST: tl.constexpr,
    WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Tell those of SIZE logits of a row that lie within the limit, after those that other programs told before."""
    wait_for_earlier(EARLY)
    part, row, p = tl.program_id(0), tl.program_id(1), tl.arange(0, BP)
    peak = tl.load(peaks + row * PARTS + p, p < PARTS, float("-inf"))
    largest = tl.max(peak)
    i = part * SIZE + tl.arange(0, SIZE)
    value = tl.load(logits + row.to(tl.int64) * V + i, i < V, float("-inf"))
    told = (value >= largest - tl.load(limits + 1)) & (i < V)
    count = told.to(tl.int32)
    out += row * WIDTH
    place = tl.atomic_add(out, tl.sum(count)) + tl.cumsum(count, 0) - 1
    told = told & (place < MOST)
    tl.store(out + 3 + place, i, told)
    tl.store(out + 3 + MOST + place, value.to(tl.int32, bitcast=True), told)
    if part == 0:
        weight = tl.exp((peak - largest) * tl.load(limits))
        mass = tl.sum(tl.load(sums + row * PARTS + p, p < PARTS, 0.0) * weight)
        tl.store(out + 1, largest.to(tl.int32, bitcast=True))
        tl.store(out + 2, mass.to(tl.int32, bitcast=True))


def top_candidates(logits: Tensor, limits: Tensor) -> Tensor:
    """The likeliest tokens of fp32 logits [T, V]; see `reference.top_candidates`."""
    (T, V), device, WIDTH = logits.shape, logits.device, 3 + 2 * MAX_CANDIDATES
    parts = triton.cdiv(V, SIZE)
    peaks, sums = torch.empty(2, T, parts, device=device)
    out = torch.empty(T, WIDTH, dtype=torch.int32, device=device)
    _peaks[(parts, T)](logits, limits, peaks, sums, out, V, SIZE=SIZE, WIDTH=WIDTH, **early(device))
    _candidates[(parts, T)](
        logits, limits, peaks, sums, out, V, PARTS=parts, BP=triton.next_power_of_2(parts), SIZE=SIZE,
        MOST=MAX_CANDIDATES, WIDTH=WIDTH, **early(device),
    )  # fmt: skip
    return out
