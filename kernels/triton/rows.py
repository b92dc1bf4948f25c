"""Kernels over rows of activations: norms, the latent cache, the router's choice, the embedding."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from dsv2_local.config import ModelConfig
from dsv2_local.kernels.format import PAGE
from dsv2_local.kernels.layout import Matrix
from dsv2_local.kernels.triton.dequantize import BLOCK_, GATHER, ROWS_, contiguous, joined, unpack
from dsv2_local.kernels.triton.linear import Bank

PAGE_ = tl.constexpr(PAGE)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b."""
    return a + b


@triton.jit
def _normed(x, weight, n, eps, BLOCK: tl.constexpr):
    """RMSNorm of the n numbers from x on, times weight, in fp32: [BLOCK]."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, i < n, 0.0).to(tl.float32)
    return value * tl.rsqrt(tl.sum(value * value) / n + eps) * tl.load(weight + i, i < n, 0.0).to(tl.float32)


@triton.jit
def _rms_norm(x, weight, y, x_stride, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    tl.store(y + row * n + i, _normed(x + row * x_stride, weight, n, eps, BLOCK), i < n)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D] / sqrt(mean(x²) + eps) · weight, in fp32."""
    x = contiguous(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm[(len(x),)](x, weight, y, x.stride(0), x.shape[1], eps, BLOCK=triton.next_power_of_2(x.shape[1]))
    return y


@triton.jit
def rotated(x, rotation, i, there):
    """Numbers i of rows of interleaved pairs from x on, rotated by the (cos, sin) from `rotation` on, in fp32.

    (a, b) becomes (a·cos - b·sin, b·cos + a·sin): each number needs its pair's other one.
    """
    own = tl.load(x + i, there, 0.0).to(tl.float32)
    other = tl.load(x + (i ^ 1), there, 0.0).to(tl.float32)
    cos = tl.load(rotation + i // 2 * 2, there, 0.0)
    sin = tl.load(rotation + i // 2 * 2 + 1, there, 0.0)
    return own * cos + tl.where(i % 2 == 0, -other, other) * sin


@triton.jit
def line_of(latents, sequence, s, stride):
    """Where the row of position s of a sequence begins in a layer's cache; those after it follow, to the page's end."""
    i = s // PAGE_
    return latents + ((tl.load(sequence + 1 + i) - i) * PAGE_ + s) * stride


@triton.jit
def lines_of(latents, sequence, start, stride, BS: tl.constexpr):
    """The same for the BS positions from `start` on, which is a multiple of BS: [BS, 1]. All lie in one page."""
    tl.static_assert(PAGE_ % BS == 0)
    return (line_of(latents, sequence, start, stride) + tl.arange(0, BS) * stride)[:, None]


@triton.jit
def _write_latents(
    latents, sequence, kv_a, weight, rotation, latents_stride, kv_a_stride, C, P, eps,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    kv_a += t * kv_a_stride
    latents = line_of(latents, sequence, tl.load(sequence) + t, latents_stride)
    c, p = tl.arange(0, BC), tl.arange(0, BP)
    tl.store(latents + c, _normed(kv_a, weight, C, eps, BC), c < C)
    tl.store(latents + C + p, rotated(kv_a + C, rotation + t * P, p, p < P), p < P)


def write_latents(
    latents: Tensor, sequence: Tensor, kv_a: Tensor, weight: Tensor, eps: float, rotation: Tensor
) -> None:
    """Fill the next rows of a sequence in a layer's cache; see `reference.write_latents`."""
    kv_a, C = contiguous(kv_a), len(weight)
    P = kv_a.shape[1] - C
    _write_latents[(len(kv_a),)](
        latents, sequence, kv_a, weight, torch.view_as_real(rotation), latents.stride(1), kv_a.stride(0), C, P, eps,
        BC=triton.next_power_of_2(C), BP=triton.next_power_of_2(P),
    )  # fmt: skip


@triton.jit
def _choose(
    logits, ids, weights, factor,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr, NORMED: tl.constexpr,
    BG: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The softmax over GROUPS groups of SIZE experts, the KEPT groups with the best expert, the K best of these."""
    t = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, BG), tl.arange(0, BS)
    expert = group[:, None] * SIZE + member[None, :]
    there = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    logit = tl.load(logits + t * GROUPS * SIZE + expert, there, float("-inf"))  # [BG, BS]
    score = tl.exp(logit - tl.max(logit))
    score /= tl.sum(score)
    if KEPT < GROUPS:
        best = tl.where(group < GROUPS, tl.max(score, 1), -1.0)
        kept = group < 0
        for _ in tl.static_range(KEPT):
            found = group == tl.argmax(best, 0)
            kept = kept | found
            best = tl.where(found, -1.0, best)
        score = tl.where(kept[:, None], score, 0.0)
    score = tl.where(there, score, -1.0).reshape(BG * BS)
    expert = expert.reshape(BG * BS)
    k = tl.arange(0, BK)
    chosen, weight = tl.zeros([BK], tl.int64), tl.zeros([BK], tl.float32)
    for i in tl.static_range(K):
        at = tl.argmax(score, 0)
        here = tl.arange(0, BG * BS) == at
        chosen = tl.where(k == i, tl.sum(tl.where(here, expert, 0)), chosen)
        weight = tl.where(k == i, tl.max(score, 0), weight)
        score = tl.where(here, -1.0, score)
    weight = weight / (tl.sum(weight) + 1e-20) if NORMED else weight * factor
    tl.store(ids + t * K + k, chosen, k < K)
    tl.store(weights + t * K + k, weight, k < K)


def route(x: Tensor, gate: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Choose the experts of x [T, D] by gate (fp32 [E, D]); see `reference.route`. One launch after the product."""
    logits, K = F.linear(x.float(), gate), config.num_experts_per_tok
    ids = torch.empty(len(x), K, dtype=torch.int64, device=x.device)
    weights = torch.empty(len(x), K, device=x.device)
    grouped = config.topk_method == "group_limited_greedy"
    groups = config.n_group if grouped else 1
    size = len(gate) // groups
    _choose[(len(x),)](
        logits, ids, weights, config.routed_scaling_factor, GROUPS=groups, SIZE=size,
        KEPT=config.topk_group if grouped else 1, K=K, NORMED=config.norm_topk_prob and K > 1,
        BG=triton.next_power_of_2(groups), BS=triton.next_power_of_2(size), BK=triton.next_power_of_2(K),
    )  # fmt: skip
    return ids, weights


@triton.jit
def _embedding(ids, y, words, scales, table, cols, blocks, NF4: tl.constexpr, LOOKUP: tl.constexpr, KB: tl.constexpr):
    WORDS: tl.constexpr = 8 if NF4 else 16
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + t)
    word = tl.program_id(1) * KB * WORDS + tl.arange(0, KB * WORDS)
    tile = row // ROWS_ * blocks + word // WORDS
    there = word < blocks * WORDS
    place = (tile * WORDS + word % WORDS) * ROWS_ + row % ROWS_
    values = joined(unpack(tl.load(words + place, there, 0), table, NF4, LOOKUP), 8 if NF4 else 4)
    values *= tl.load(scales + tile * ROWS_ + row % ROWS_, there, 0.0).to(tl.float32)[:, None]
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
