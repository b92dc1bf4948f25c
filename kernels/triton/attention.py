"""Latent attention on the GPU: in absorbed form for few queries, from rebuilt keys and values for many.

Shapes as in `kernels.reference`. Kernels read block tables and query offsets on the device, so that a captured graph
can be replayed at the next positions: the grid covers all blocks that a table has room for, and programs past the last
position of their sequence do no work.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_local.kernels.format import CACHE_BLOCK, REBUILT_NUMBERS
from dsv2_local.kernels.layout import Matrix
from dsv2_local.kernels.metadata import AttentionMetadata
from dsv2_local.kernels.triton.latents import read_keys, read_latents, rows_of, views
from dsv2_local.kernels.triton.linear import Bank, dequantize, dot, multiply
from dsv2_local.kernels.triton.rows import rotated
from dsv2_local.kernels.triton.tuning import pdl_arguments, processors, shared_memory, wait_for_previous_kernel

MAX_SPLITS = 256  # parts of the cache in `_absorbed`, each with its own programs
LOG2_E = 1.4426950408889634


@triton.jit
def _softmax_step(scores, maximum, total):
    """One step of a running softmax in base 2: weights of scores [BM, BS], the factor for older sums, the new state."""
    new = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - new[:, None])
    older = tl.exp2(maximum - new)
    return weights, older, new, total * older + tl.sum(weights, 1)


@triton.jit
def _softmax_start(BM: tl.constexpr):
    """The initial (maximum, total): finite, so that a row without any visible position yields zeros, not NaN."""
    return tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)


@triton.jit(do_not_specialize=["M", "table_stride"])
def _absorbed(
    q_latent, q_rope, rotation, latents, halves, block_tables, offsets, parts, sums,
    M, H, q_stride, latents_stride, table_stride, scale,
    C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, SCALES: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of BM query rows of a sequence over one of SPLITS parts of its cache (as in flash decoding).

    A token has H query rows; there are M of all sequences together. Grid: blocks of rows, as many as the sequence with
    the most tokens has; parts; sequences.

    Writes to parts [SPLITS, M, C] the latents weighted by the softmax over that part, and to sums [SPLITS, M] the
    logarithm (base 2) of the softmax's denominator: -inf if the row sees no position of the part, whose result is then
    not written.
    """
    wait_for_previous_kernel(PDL)
    sequence = tl.program_id(2)
    before = tl.load(offsets + sequence)
    T = (tl.load(offsets + sequence + 1) - before).to(tl.int32)  # tokens of this sequence
    before = (before - tl.load(offsets)).to(tl.int32)  # tokens of the sequences before it
    local = tl.program_id(0) * BM + tl.arange(0, BM)
    if tl.program_id(0) * BM >= T * H:
        return
    block_table = block_tables + sequence.to(tl.int64) * table_stride
    valid = local < T * H
    row = before * H + local
    c, p = tl.arange(0, BC), tl.arange(0, BP)
    cached = tl.load(block_table)
    row64 = row.to(tl.int64)[:, None]
    query = tl.load(q_latent + row64 * C + c[None, :], valid[:, None] & (c < C)[None, :], 0.0)
    angles = rotation + (row // H)[:, None] * P
    rope = rotated(q_rope + row64 * q_stride, angles, p[None, :], valid[:, None] & (p < P)[None, :]).to(query.dtype)
    visible = cached + local // H + 1
    split_size = tl.cdiv(tl.cdiv(cached + T, SPLITS), BS) * BS
    first = tl.program_id(1) * split_size
    last_row = tl.minimum(tl.program_id(0) * BM + BM, T * H) - 1
    end = tl.minimum(first + split_size, cached + last_row // H + 1)
    sum_ = tl.zeros([BM, BC], tl.float32)
    maximum, total = _softmax_start(BM)
    for start in range(first, end, BS):
        s = start + tl.arange(0, BS)
        used = s < end
        cache_row = rows_of(block_table, start, BS)
        latent = read_latents(latents, halves, cache_row, used, latents_stride, 0, C, BC, SCALES, query.dtype)
        key = read_keys(halves, cache_row, used, latents_stride, C, P, BP, SCALES, query.dtype)
        scores = dot(rope, key.T, dot(query, latent.T, tl.zeros([BM, BS], tl.float32))) * scale
        scores = tl.where(s[None, :] < visible[:, None], scores, float("-inf"))
        weights, older, maximum, total = _softmax_step(scores, maximum, total)
        sum_ = dot(weights.to(query.dtype), latent, sum_ * older[:, None])
    nonempty = valid & (total > 0)
    index = tl.program_id(1).to(tl.int64) * M + row
    total = tl.where(nonempty, total, 1.0)
    tl.store(parts + index[:, None] * C + c[None, :], sum_ / total[:, None], nonempty[:, None] & (c < C)[None, :])
    tl.store(sums + index, tl.where(nonempty, maximum + tl.log2(total), float("-inf")), valid)


@triton.jit(do_not_specialize=["M"])
def _merge(
    parts, sums, mixed, M, C, SPLITS: tl.constexpr, BC: tl.constexpr, BSPLITS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Merge the SPLITS results of row m, for BC columns of mixed [M, C]."""
    wait_for_previous_kernel(PDL)
    m = tl.program_id(0).to(tl.int64)
    c, split = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, BSPLITS)
    sum_ = tl.load(sums + split * M + m, split < SPLITS, float("-inf"))
    weight = tl.exp2(sum_ - tl.max(sum_))
    valid = (weight > 0)[:, None] & (c < C)[None, :]
    part = tl.load(parts + (split * M + m)[:, None] * C + c[None, :], valid, 0.0)
    tl.store(mixed + m * C + c, tl.sum(weight[:, None] * part, 0) / tl.sum(weight), c < C)


@triton.jit(do_not_specialize=["T"])
def _rebuild(
    latents, halves, block_table, weights, y, T, S, latents_stride, head_stride, c_stride, n_stride, N,
    C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Rebuild the keys or the values y [heads, S, N] of a group of heads: y[h, s] = latents[s] · weights[h]."""
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    h = tl.program_id(1).to(tl.int64)
    end = tl.load(block_table) + T
    if tl.program_id(0) * BS >= end:
        return
    n = tl.arange(0, BN)
    used = s < end
    row = rows_of(block_table, tl.program_id(0) * BS, BS)
    weights += h * head_stride + n[None, :] * n_stride
    sum_ = tl.zeros([BS, BN], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        matrix = tl.load(weights + c[:, None] * c_stride, (c < C)[:, None] & (n < N)[None, :], 0.0)
        latent = read_latents(latents, halves, row, used, latents_stride, start, C, BC, SCALES, matrix.dtype)
        sum_ = dot(latent, matrix, sum_)
    tl.store(y + (h * S + s[:, None]) * N + n[None, :], sum_, (s < end)[:, None] & (n < N)[None, :])


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
    valid = (t < T)[:, None]
    q_row = q + (t.to(tl.int64) * H + h)[:, None] * q_stride
    query = tl.load(q_row + n[None, :], valid & (n < N)[None, :], 0.0)
    rope = rotated(q_row + N, rotation + t[:, None] * P, p[None, :], valid & (p < P)[None, :]).to(query.dtype)
    cached = tl.load(block_table)
    end = tl.minimum(cached + T, cached + tl.program_id(0) * BM + BM)
    sum_ = tl.zeros([BM, BV], tl.float32)
    maximum, total = _softmax_start(BM)
    for start in range(0, end, BS):
        s = start + tl.arange(0, BS)
        used = s < end
        index = group_head * S + s[:, None]
        key = tl.load(keys + index * N + n[None, :], used[:, None] & (n < N)[None, :], 0.0)
        rope_key = read_keys(
            halves, rows_of(block_table, start, BS), used, latents_stride, C, P, BP, SCALES, query.dtype
        )
        scores = dot(rope, rope_key.T, dot(query, key.T, tl.zeros([BM, BS], tl.float32))) * scale
        scores = tl.where(s[None, :] <= cached + t[:, None], scores, float("-inf"))
        weights, older, maximum, total = _softmax_step(scores, maximum, total)
        value = tl.load(values + index * V + v[None, :], used[:, None] & (v < V)[None, :], 0.0)
        sum_ = dot(weights.to(query.dtype), value, sum_ * older[:, None])
    index = (t.to(tl.int64) * H + h)[:, None] * V + v[None, :]
    tl.store(out + index, sum_ / total[:, None], valid & (v < V)[None, :])


def attention(
    q: Tensor,
    rotation: Tensor,
    latents: Tensor,
    metadata: AttentionMetadata,
    w_uk: Matrix,
    w_uv: Matrix,
    scale: float,
) -> Tensor:
    """Causal latent attention of several sequences, each in either form; see `reference.attention`.

    C and V must be multiples of 8, so that each head of the matrices is whole groups of rows of the stored layout.
    """
    q, angles = q.contiguous(), torch.view_as_real(rotation)
    if all(metadata.absorbed):
        return absorbed_attention(q, angles, latents, metadata, w_uk, w_uv, scale)
    out = q.new_empty(len(q), w_uv.rows)
    for rows, part, absorbed in _runs(metadata):
        form = absorbed_attention if absorbed else materialized_attention
        out[rows] = form(q[rows], angles[rows], latents, part, w_uk, w_uv, scale)
    return out


def _runs(metadata: AttentionMetadata) -> Iterator[tuple[slice, AttentionMetadata, bool]]:
    """Neighbouring sequences that are all absorbed, and every other one alone: rows, metadata, whether absorbed."""
    first, start = 0, 0
    while first < len(metadata.counts):
        absorbed, after = metadata.absorbed[first], first + 1
        while absorbed and after < len(metadata.counts) and metadata.absorbed[after]:
            after += 1
        counts = metadata.counts[first:after]
        end = start + sum(counts)
        if end > start:
            tables, offsets = metadata.block_tables[first:after], metadata.offsets[first : after + 1]
            yield slice(start, end), AttentionMetadata(tables, offsets, counts, (absorbed,) * len(counts)), absorbed
        first, start = after, end


def absorbed_attention(
    q: Tensor, rotation: Tensor, latents: Tensor, metadata: AttentionMetadata, w_uk: Matrix, w_uv: Matrix, scale: float
) -> Tensor:
    """Attention in latent space: q [T, H, N + P], not rotated, rotation float32 [T, P/2, 2] -> [T, H·V].

    One launch for all sequences. How many parts the caches are split into depends on shapes alone, so that a captured
    step is right at any lengths.
    """
    T, H, _ = q.shape
    M, C, P, tables = T * H, w_uv.cols, 2 * rotation.shape[1], metadata.block_tables
    rows = q.view(M, -1)
    q_latent = by_heads(rows, w_uk, H)
    numbers, halves, stride, scales = views(latents, C)
    most = max(metadata.counts)
    BM, BS = _absorbed_block(q, most * H)
    blocks = sum(triton.cdiv(count * H, BM) for count in metadata.counts)
    programs = processors(q.device) * (2 if BM == 16 else 1)
    splits = max(1, programs // blocks)
    if len(metadata.counts) > 1:
        # With some more programs than run at once, sequences that are longer than the others hold up less. A power of
        # two, since the kernel is compiled for each number.
        splits = triton.next_power_of_2(splits)
    splits = min(MAX_SPLITS, splits, triton.cdiv(max_context(tables), 64))
    parts = torch.empty(splits, M, C, device=q.device)
    sums, mixed = torch.empty(splits, M, device=q.device), torch.empty_like(q_latent)
    _absorbed[(triton.cdiv(most * H, BM), splits, len(metadata.counts))](
        q_latent, rows[:, w_uk.cols :], rotation, numbers, halves, tables, metadata.offsets, parts, sums,
        M, H, rows.stride(0), stride, tables.stride(0), scale * LOG2_E,
        C=C, P=P, BC=power_of_2(C), BP=power_of_2(P), SCALES=scales, BM=BM, BS=BS, SPLITS=splits,
        num_warps=4 if BM == 16 else 8, num_stages=2, **pdl_arguments(q.device),
    )  # fmt: skip
    _merge[(M, triton.cdiv(C, 64))](
        parts, sums, mixed, M, C, SPLITS=splits, BC=64, BSPLITS=triton.next_power_of_2(splits),
        **pdl_arguments(q.device),
    )  # fmt: skip
    return by_heads(mixed, w_uv, H).view(T, -1)


def by_heads(x: Tensor, weight: Matrix, heads: int) -> Tensor:
    """Multiply row t·H + h of x [T·H, ≥ cols] by head h of weight [H·R, cols] -> [T·H, R]."""
    if weight.scales is not None:
        return multiply(x, Bank.of(weight, heads))
    matrices = weight.codes.view(heads, -1, weight.cols).to(x.dtype)
    return torch.einsum("thc,hrc->thr", x[:, : weight.cols].view(-1, heads, weight.cols), matrices).flatten(0, 1)


def materialized_attention(
    q: Tensor, rotation: Tensor, latents: Tensor, metadata: AttentionMetadata, w_uk: Matrix, w_uv: Matrix, scale: float
) -> Tensor:
    """The same as `absorbed_attention`, for one sequence: keys and values are rebuilt, a group of heads at a time."""
    T, H, _ = q.shape
    (block_table,) = metadata.block_tables
    N, C, V, P = w_uk.cols, w_uv.cols, w_uv.rows // H, 2 * rotation.shape[1]
    context = max_context(metadata.block_tables)
    uk = dequantize(w_uk, q.dtype).view(H, C, N)
    uv = dequantize(w_uv, q.dtype).view(H, V, C).transpose(1, 2)  # [H, C, V]
    out = q.new_empty(T, H * V)
    heads = min(H, max(1, REBUILT_NUMBERS // (context * (N + V))))
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


def _absorbed_block(q: Tensor, rows: int) -> tuple[int, int]:
    """BM and BS, the query rows and the positions per step of a program of `_absorbed`, for `rows` rows of a sequence.

    A program needs BM rows of C fp32 sums in registers, and in shared memory BM query rows of C numbers and two steps
    of BS latents. For C = 512 in bf16 the shared memory is 55 KB with 16 rows (so that two programs fit on a
    multiprocessor), 74 KB with 32 rows, and with 64 rows 144 KB, or 229 KB with 64 positions; in fp32 it is 90 KB with
    16 rows. Consumer GPUs have 99 KB.
    """
    shared = shared_memory(q.device)
    if q.dtype == torch.float32 or rows <= 16:
        return 16, 64 // q.element_size()
    if rows <= 32 or shared < 150_000:
        return 32, 32
    return 64, 64 if shared > 230_000 else 32


def max_context(block_tables: Tensor) -> int:
    """The largest number of positions that each of the block tables [B, 1 + n] has room for."""
    return (block_tables.shape[1] - 1) * CACHE_BLOCK


def power_of_2(size: int) -> int:
    """The power of two that covers `size` numbers, at least 16, as tensor cores require."""
    return max(16, int(triton.next_power_of_2(size)))
