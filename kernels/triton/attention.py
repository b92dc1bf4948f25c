"""Latent attention on the GPU: absorbed for few queries, over rebuilt keys and values for many.

Shapes as in `kernels.reference`. The sequence is read on the device, so that a captured graph can be replayed at the
next position: launches are sized by the pages that it may have, and what lies after the last position does no work.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_local.kernels.format import CACHE_BLOCK
from dsv2_local.kernels.layout import Matrix
from dsv2_local.kernels.triton.latents import read_keys, read_latents, rows_of, views
from dsv2_local.kernels.triton.linear import Bank, dequantize, dot, multiply
from dsv2_local.kernels.triton.rows import rotated
from dsv2_local.kernels.triton.tuning import early, processors, shared_memory, wait_for_earlier

# Rebuilt keys and values of one group of heads, in numbers; heads are taken in groups below this.
WORKSPACE = 1 << 27
MOST_SPLITS = 256
LOG2_E = 1.4426950408889634


@triton.jit
def _soften(scores, maximum, total):
    """A step of a running softmax in base 2: weights of scores [BM, BS], factor of older sums, the new state."""
    new = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - new[:, None])
    older = tl.exp2(maximum - new)
    return weights, older, new, total * older + tl.sum(weights, 1)


@triton.jit
def _start(BM: tl.constexpr):
    """The state of a softmax of nothing: finite, so that a row which sees no position yields zeros, not NaN."""
    return tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)


@triton.jit(do_not_specialize=["M", "T"])
def _absorbed(
    q_latent, q_rope, rotation, latents, halves, block_table, parts, sums,
    M, T, H, q_stride, latents_stride, scale,
    C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, SCALES: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attention of BM of the M = T·H rows (queries' heads) over one of SPLITS stretches of the cache.

    parts [SPLITS, M, C] are means of latents under the stretch's softmax, sums [SPLITS, M] the logarithms (base 2) of
    what that was divided by, -inf for a stretch that a row does not see, whose part is left as it was.
    """
    wait_for_earlier(EARLY)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = row < M
    c, p = tl.arange(0, BC), tl.arange(0, BP)
    before = tl.load(block_table)
    at = row.to(tl.int64)[:, None]
    query = tl.load(q_latent + at * C + c[None, :], there[:, None] & (c < C)[None, :], 0.0)
    turns = rotation + (row // H)[:, None] * P
    rope = rotated(q_rope + at * q_stride, turns, p[None, :], there[:, None] & (p < P)[None, :]).to(query.dtype)
    seen = before + row // H + 1
    share = tl.cdiv(tl.cdiv(before + T, SPLITS), BS) * BS
    first = tl.program_id(1) * share
    last_row = tl.minimum(tl.program_id(0) * BM + BM, M) - 1
    last = tl.minimum(first + share, before + last_row // H + 1)
    sum_ = tl.zeros([BM, BC], tl.float32)
    maximum, total = _start(BM)
    for start in range(first, last, BS):
        s = start + tl.arange(0, BS)
        used = s < last
        line = rows_of(block_table, start, BS)
        latent = read_latents(latents, halves, line, used, latents_stride, 0, C, BC, SCALES, query.dtype)
        key = read_keys(halves, line, used, latents_stride, C, P, BP, SCALES, query.dtype)
        scores = dot(rope, key.T, dot(query, latent.T, tl.zeros([BM, BS], tl.float32))) * scale
        scores = tl.where(s[None, :] < seen[:, None], scores, float("-inf"))
        weights, older, maximum, total = _soften(scores, maximum, total)
        sum_ = dot(weights.to(query.dtype), latent, sum_ * older[:, None])
    some = there & (total > 0)
    place = tl.program_id(1).to(tl.int64) * M + row
    total = tl.where(some, total, 1.0)
    tl.store(parts + place[:, None] * C + c[None, :], sum_ / total[:, None], some[:, None] & (c < C)[None, :])
    tl.store(sums + place, tl.where(some, maximum + tl.log2(total), float("-inf")), there)


@triton.jit(do_not_specialize=["M"])
def _merge(
    parts, sums, mixed, M, C, SPLITS: tl.constexpr, BC: tl.constexpr, BSPLITS: tl.constexpr, EARLY: tl.constexpr
):
    """The stretches of row m put together, BC of the columns of mixed [M, C]."""
    wait_for_earlier(EARLY)
    m = tl.program_id(0).to(tl.int64)
    c, split = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, BSPLITS)
    sum_ = tl.load(sums + split * M + m, split < SPLITS, float("-inf"))
    weight = tl.exp2(sum_ - tl.max(sum_))
    there = (weight > 0)[:, None] & (c < C)[None, :]
    part = tl.load(parts + (split * M + m)[:, None] * C + c[None, :], there, 0.0)
    tl.store(mixed + m * C + c, tl.sum(weight[:, None] * part, 0) / tl.sum(weight), c < C)


@triton.jit(do_not_specialize=["T"])
def _rebuild(
    latents, halves, block_table, weights, y, T, S, latents_stride, head_stride, c_stride, n_stride, N,
    C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """y[h, s] = latents[s] · weights[h] for the positions in use: keys or values [heads, S, N] of a group of heads."""
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    h = tl.program_id(1).to(tl.int64)
    last = tl.load(block_table) + T
    if tl.program_id(0) * BS >= last:
        return
    n = tl.arange(0, BN)
    used = s < last
    row = rows_of(block_table, tl.program_id(0) * BS, BS)
    weights += h * head_stride + n[None, :] * n_stride
    sum_ = tl.zeros([BS, BN], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        matrix = tl.load(weights + c[:, None] * c_stride, (c < C)[:, None] & (n < N)[None, :], 0.0)
        latent = read_latents(latents, halves, row, used, latents_stride, start, C, BC, SCALES, matrix.dtype)
        sum_ = dot(latent, matrix, sum_)
    tl.store(y + (h * S + s[:, None]) * N + n[None, :], sum_, (s < last)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["T", "first_head"])
def _materialized(
    q, rotation, halves, block_table, keys, values, out,
    T, H, S, first_head, q_stride, latents_stride, scale,
    C: tl.constexpr, SCALES: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Attention of BM queries of one head over keys [heads, S, N] and values [heads, S, V] of its group."""
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    group_head = tl.program_id(1).to(tl.int64)
    h = first_head + group_head
    n, p, v = tl.arange(0, BN), tl.arange(0, BP), tl.arange(0, BV)
    there = (t < T)[:, None]
    line = q + (t.to(tl.int64) * H + h)[:, None] * q_stride
    query = tl.load(line + n[None, :], there & (n < N)[None, :], 0.0)
    rope = rotated(line + N, rotation + t[:, None] * P, p[None, :], there & (p < P)[None, :]).to(query.dtype)
    before = tl.load(block_table)
    last = tl.minimum(before + T, before + tl.program_id(0) * BM + BM)
    sum_ = tl.zeros([BM, BV], tl.float32)
    maximum, total = _start(BM)
    for start in range(0, last, BS):
        s = start + tl.arange(0, BS)
        used = s < last
        place = group_head * S + s[:, None]
        key = tl.load(keys + place * N + n[None, :], used[:, None] & (n < N)[None, :], 0.0)
        rope_key = read_keys(
            halves, rows_of(block_table, start, BS), used, latents_stride, C, P, BP, SCALES, query.dtype
        )
        scores = dot(rope, rope_key.T, dot(query, key.T, tl.zeros([BM, BS], tl.float32))) * scale
        scores = tl.where(s[None, :] <= before + t[:, None], scores, float("-inf"))
        weights, older, maximum, total = _soften(scores, maximum, total)
        value = tl.load(values + place * V + v[None, :], used[:, None] & (v < V)[None, :], 0.0)
        sum_ = dot(weights.to(query.dtype), value, sum_ * older[:, None])
    place = (t.to(tl.int64) * H + h)[:, None] * V + v[None, :]
    tl.store(out + place, sum_ / total[:, None], there & (v < V)[None, :])


def attention(
    q: Tensor,
    rotation: Tensor,
    latents: Tensor,
    block_table: Tensor,
    w_uk: Matrix,
    w_uv: Matrix,
    scale: float,
    absorb: bool,
) -> Tensor:
    """Causal latent attention, in either of its forms; see `reference.attention`.

    C and V are multiples of 8, so that a head's rows are whole groups of the stored layout.
    """
    form = absorbed_attention if absorb else materialized_attention
    return form(q.contiguous(), torch.view_as_real(rotation), latents, block_table, w_uk, w_uv, scale)


def absorbed_attention(
    q: Tensor, rotation: Tensor, latents: Tensor, block_table: Tensor, w_uk: Matrix, w_uv: Matrix, scale: float
) -> Tensor:
    """Attention in the latent space; q [T, H, N + P] not rotated, rotation float32 [T, P/2, 2] -> [T, H·V]."""
    T, H, _ = q.shape
    M, C, P, context = T * H, w_uv.cols, 2 * rotation.shape[1], most(block_table)
    rows = q.view(M, -1)
    q_latent = by_heads(rows, w_uk, H)
    numbers, halves, stride, scales = views(latents, C)
    BM, BS = _absorbed_block(q)
    programs = processors(q.device) * (2 if BM == 16 else 1)
    splits = min(MOST_SPLITS, max(1, programs // triton.cdiv(M, BM)), triton.cdiv(context, 64))
    parts = torch.empty(splits, M, C, device=q.device)
    sums, mixed = torch.empty(splits, M, device=q.device), torch.empty_like(q_latent)
    _absorbed[(triton.cdiv(M, BM), splits)](
        q_latent, rows[:, w_uk.cols :], rotation, numbers, halves, block_table, parts, sums,
        M, T, H, rows.stride(0), stride, scale * LOG2_E,
        C=C, P=P, BC=power_of_2(C), BP=power_of_2(P), SCALES=scales, BM=BM, BS=BS, SPLITS=splits,
        num_warps=4 if BM == 16 else 8, num_stages=2, **early(q.device),
    )  # fmt: skip
    _merge[(M, triton.cdiv(C, 64))](
        parts, sums, mixed, M, C, SPLITS=splits, BC=64, BSPLITS=triton.next_power_of_2(splits), **early(q.device)
    )
    return by_heads(mixed, w_uv, H).view(T, -1)


def by_heads(x: Tensor, weight: Matrix, heads: int) -> Tensor:
    """Row t·H + h of x [T·H, ≥ cols] times head h of weight [H·R, cols] -> [T·H, R]."""
    if weight.scales is not None:
        return multiply(x, Bank.of(weight, heads))
    matrices = weight.codes.view(heads, -1, weight.cols).to(x.dtype)
    return torch.einsum("thc,hrc->thr", x[:, : weight.cols].view(-1, heads, weight.cols), matrices).flatten(0, 1)


def materialized_attention(
    q: Tensor, rotation: Tensor, latents: Tensor, block_table: Tensor, w_uk: Matrix, w_uv: Matrix, scale: float
) -> Tensor:
    """The same as `absorbed_attention`, over keys and values rebuilt for a group of heads at a time."""
    T, H, _ = q.shape
    N, C, V, P, context = w_uk.cols, w_uv.cols, w_uv.rows // H, 2 * rotation.shape[1], most(block_table)
    uk = dequantize(w_uk, q.dtype).view(H, C, N)
    uv = dequantize(w_uv, q.dtype).view(H, V, C).transpose(1, 2)  # [H, C, V]
    out = q.new_empty(T, H * V)
    heads = min(H, max(1, WORKSPACE // (context * (N + V))))
    keys, values = q.new_empty(heads, context, N), q.new_empty(heads, context, V)
    BM, BS = 64, 64 // q.element_size()
    numbers, halves, stride, scales = views(latents, C)
    for first in range(0, H, heads):
        group = min(heads, H - first)
        for weights, rebuilt in ((uk[first:], keys), (uv[first:], values)):
            n = weights.shape[2]
            _rebuild[(triton.cdiv(context, 64), group)](
                numbers, halves, block_table, weights, rebuilt, T, context, stride, *weights.stride(), n,
                C=C, BS=64, BC=32, BN=power_of_2(n), SCALES=scales,
            )  # fmt: skip
        _materialized[(triton.cdiv(T, BM), group)](
            q, rotation, halves, block_table, keys, values, out,
            T, H, context, first, q.stride(1), stride, scale * LOG2_E, C=C, SCALES=scales,
            N=N, P=P, V=V, BN=power_of_2(N), BP=power_of_2(P), BV=power_of_2(V), BM=BM, BS=BS,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def _absorbed_block(q: Tensor) -> tuple[int, int]:
    """Rows and positions of a program of `_absorbed`.

    A program holds BM rows of 4·C bytes in registers and of C numbers in shared memory, beside two steps of BS latents:
    for C = 512 in bf16 55 KB with 16 rows, so that two share a multiprocessor, 74 with 32, 144 or (64 positions) 229
    with 64, where consumer GPUs have 99; in fp32 90 with 16.
    """
    rows, shared = q.shape[0] * q.shape[1], shared_memory(q.device)
    if q.dtype == torch.float32 or rows <= 16:
        return 16, 64 // q.element_size()
    if rows <= 32 or shared < 150_000:
        return 32, 32
    return 64, 64 if shared > 230_000 else 32


def most(block_table: Tensor) -> int:
    """Positions that a sequence may have."""
    return (len(block_table) - 1) * CACHE_BLOCK


def power_of_2(size: int) -> int:
    """The side of a tile that holds `size` numbers; tensor cores take no less than 16."""
    return max(16, int(triton.next_power_of_2(size)))
