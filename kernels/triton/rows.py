"""Kernels over rows of activations: norms, rotation, the router, the embedding."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.kernels.layout import Matrix
from dsv2_local.kernels.triton.dequantize import BLOCK_, GATHER, ROWS_, contiguous, joined, unpack
from dsv2_local.kernels.triton.linear import Bank
from dsv2_local.kernels.triton.tuning import pdl_arguments, wait_for_previous_kernel

FEW_TOKENS = 16  # up to this many tokens `_logits` is faster than cuBLAS


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b."""
    return a + b


@triton.jit
def normed(value, weight, n, eps, i):
    """RMSNorm of the first n numbers of value (fp32; the rest zeros), times weight; i are the indices."""
    return value * tl.rsqrt(tl.sum(value * value) / n + eps) * tl.load(weight + i, i < n, 0.0).to(tl.float32)


@triton.jit
def _rms_norm(x, other, weight, sums, y, x_stride, other_stride, n, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y = RMSNorm of x, or of x + other, which is first rounded and written to `sums`."""
    wait_for_previous_kernel(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + i, i < n, 0.0).to(tl.float32)
    if other is not None:
        value += tl.load(other + row * other_stride + i, i < n, 0.0).to(tl.float32)
        value = value.to(sums.dtype.element_ty)
        tl.store(sums + row * n + i, value, i < n)
        value = value.to(tl.float32)
    tl.store(y + row * n + i, normed(value, weight, n, eps, i), i < n)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: x [T, D] / sqrt(mean(x²) + eps) · weight, computed in fp32."""
    return _launch_rms_norm(contiguous(x), None, None, weight, eps)


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + other, and the RMSNorm of that."""
    sums = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return sums, _launch_rms_norm(contiguous(x), contiguous(other), sums, weight, eps)


def _launch_rms_norm(x: Tensor, other: Tensor | None, sums: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    T, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm[(T,)](
        x, other, weight, sums, y, x.stride(0), 0 if other is None else other.stride(0), D, eps,
        BLOCK=triton.next_power_of_2(D), num_warps=8 if D > 1024 else 4, **pdl_arguments(x.device),
    )  # fmt: skip
    return y


@triton.jit
def rotated(x, rotation, i, valid):
    """Load numbers i of a row x of pairs (a, b) and rotate them by the (cos, sin) at `rotation`, in fp32.

    (a, b) becomes (a·cos - b·sin, b·cos + a·sin), so each number is loaded with the other one of its pair.
    """
    own = tl.load(x + i, valid, 0.0).to(tl.float32)
    other = tl.load(x + (i ^ 1), valid, 0.0).to(tl.float32)
    cos = tl.load(rotation + i // 2 * 2, valid, 0.0)
    sin = tl.load(rotation + i // 2 * 2 + 1, valid, 0.0)
    return own * cos + tl.where(i % 2 == 0, -other, other) * sin


@triton.jit
def _logits(x, gate, logits, x_stride, E, D, BE: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr):
    """logits[t, e] = x[t] · gate[e] in fp32, BE experts per program."""
    t = tl.program_id(0).to(tl.int64)
    e, d = tl.program_id(1) * BE + tl.arange(0, BE), tl.arange(0, BD)
    row = gate + e[:, None] * D
    weights = tl.load(row + d[None, :], (e < E)[:, None] & (d < D)[None, :], 0.0)
    wait_for_previous_kernel(PDL)
    x += t * x_stride
    sum_ = tl.zeros([BE, BD], tl.float32)
    for start in range(0, D, BD):
        now = weights
        column = start + BD + d
        weights = tl.load(row + column[None, :], (e < E)[:, None] & (column < D)[None, :], 0.0)
        sum_ += now * tl.load(x + start + d, start + d < D, 0.0).to(tl.float32)[None, :]
    tl.store(logits + t * E + e, tl.sum(sum_, 1), e < E)


def _router_logits(x: Tensor, gate: Tensor) -> Tensor:
    """x [T, D] · gateᵀ (fp32 [E, D]) in fp32 -> [T, E]."""
    if len(x) > FEW_TOKENS:
        return F.linear(x.float(), gate)
    E, D = gate.shape
    x, logits = contiguous(x), torch.empty(len(x), E, device=x.device)
    _logits[(len(x), E)](x, gate, logits, x.stride(0), E, D, BE=1, BD=2048, **pdl_arguments(x.device))
    return logits


@triton.jit
def _choose(
    logits, ids, weights, factor,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr, NORMED: tl.constexpr,
    BG: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax over GROUPS groups of SIZE experts; choose the KEPT groups with the best experts, then the K best."""
    wait_for_previous_kernel(PDL)
    t = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, BG), tl.arange(0, BS)
    expert = group[:, None] * SIZE + member[None, :]
    valid = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    logit = tl.load(logits + t * GROUPS * SIZE + expert, valid, float("-inf"))  # [BG, BS]
    score = tl.exp(logit - tl.max(logit))
    score /= tl.sum(score)
    if KEPT < GROUPS:
        best = tl.where(group < GROUPS, tl.max(score, 1), -1.0)
        selected = group < 0
        for _ in tl.static_range(KEPT):
            found = group == tl.argmax(best, 0)
            selected = selected | found
            best = tl.where(found, -1.0, best)
        score = tl.where(selected[:, None], score, 0.0)
    score = tl.where(valid, score, -1.0).reshape(BG * BS)
    expert = expert.reshape(BG * BS)
    k = tl.arange(0, BK)
    chosen, weight = tl.zeros([BK], tl.int64), tl.zeros([BK], tl.float32)
    for i in tl.static_range(K):
        at = tl.argmax(score, 0)
        is_best = tl.arange(0, BG * BS) == at
        chosen = tl.where(k == i, tl.sum(tl.where(is_best, expert, 0)), chosen)
        weight = tl.where(k == i, tl.max(score, 0), weight)
        score = tl.where(is_best, -1.0, score)
    weight = weight / (tl.sum(weight) + 1e-20) if NORMED else weight * factor
    tl.store(ids + t * K + k, chosen, k < K)
    tl.store(weights + t * K + k, weight, k < K)


def route(x: Tensor, gate: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token of x [T, D] by gate (fp32 [E, D]); see `reference.route`."""
    logits, K = _router_logits(x, gate), config.num_experts_per_tok
    ids = torch.empty(len(x), K, dtype=torch.int64, device=x.device)
    weights = torch.empty(len(x), K, device=x.device)
    grouped = config.topk_method == "group_limited_greedy"
    groups = config.n_group if grouped else 1
    size = len(gate) // groups
    _choose[(len(x),)](
        logits, ids, weights, config.routed_scaling_factor, GROUPS=groups, SIZE=size,
        KEPT=config.topk_group if grouped else 1, K=K, NORMED=config.norm_topk_prob and K > 1,
        BG=triton.next_power_of_2(groups), BS=triton.next_power_of_2(size), BK=triton.next_power_of_2(K),
        **pdl_arguments(x.device),
    )  # fmt: skip
    return ids, weights


@triton.jit
def _embedding(ids, y, words, scales, table, cols, blocks, NF4: tl.constexpr, LOOKUP: tl.constexpr, KB: tl.constexpr):
    """Dequantise KB blocks of columns of row ids[t] to y [T, cols]."""
    WORDS: tl.constexpr = 8 if NF4 else 16
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + t)
    word = tl.program_id(1) * KB * WORDS + tl.arange(0, KB * WORDS)
    tile = row // ROWS_ * blocks + word // WORDS
    valid = word < blocks * WORDS
    offset = (tile * WORDS + word % WORDS) * ROWS_ + row % ROWS_
    values = joined(unpack(tl.load(words + offset, valid, 0), table, NF4, LOOKUP), 8 if NF4 else 4)
    values *= tl.load(scales + tile * ROWS_ + row % ROWS_, valid, 0.0).to(tl.float32)[:, None]
    column = tl.program_id(1) * KB * BLOCK_ + tl.arange(0, KB * BLOCK_)
    tl.store(y + t * cols + column, values.reshape(KB * BLOCK_), column < cols)


def embedding(ids: Tensor, weight: Matrix, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int64 [T]) of the embedding -> [T, D]."""
    if weight.scales is None:
        return weight.codes[ids].to(dtype)
    y = torch.empty(len(ids), weight.cols, dtype=dtype, device=ids.device)
    shape = Bank.of(weight).arguments
    taken = {name: shape[name] for name in ("table", "cols", "blocks", "NF4")}
    grid = (len(ids), triton.cdiv(shape["blocks"], 4))
    _embedding[grid](ids, y, weight.codes.view(torch.int32), weight.scales, **taken, LOOKUP=GATHER, KB=4)
    return y


@triton.jit(do_not_specialize=["K"])
def _to_host(x, ids, host_x, host_ids, D, K, BD: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """Write BD of D numbers of x to host_x as fp32, and BK of K ids to host_ids."""
    wait_for_previous_kernel(PDL)
    part = tl.program_id(0)
    d, k = part * BD + tl.arange(0, BD), part * BK + tl.arange(0, BK)
    tl.store(host_x + d, tl.load(x + d, d < D, 0.0).to(tl.float32), d < D)
    tl.store(host_ids + k, tl.load(ids + k, k < K, 0), k < K)


def to_host(x: Tensor, ids: Tensor, host_x: Tensor, host_ids: Tensor) -> None:
    """Write x [T, D] and ids [T, K] to page-locked RAM; one launch, where copies would take three."""
    D, K, BD, BK = x.numel(), ids.numel(), 1024, 64
    _to_host[(max(triton.cdiv(D, BD), triton.cdiv(K, BK)),)](
        x.contiguous(), ids.contiguous(), host_x, host_ids, D, K, BD=BD, BK=BK, **pdl_arguments(x.device)
    )
