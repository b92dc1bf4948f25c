"""The kernels in plain PyTorch: the reference that defines what every implementation computes; runs on any device.

Shapes: `T` tokens (queries), `S` positions in the cache, `H` heads, `N` qk_nope_head_dim, `P` qk_rope_head_dim,
`V` v_head_dim, `C` kv_lora_rank, `D` hidden_size, `E` experts, `K` experts per token, `R` rows, `B` blocks.
In `linear`, `C` is the number of columns.

Activations are float32 or bfloat16 (never float16, in which DeepSeek-V2 overflows); products keep the type of `x`.
Functions with a `linear` parameter use it for products with weights, so that `kernels.bnb` can replace that alone.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.kernels.format import BLOCK, MAX_CANDIDATES, ROWS, ExpertLayout, Format
from dsv2_local.kernels.latents import read_rows, write_rows
from dsv2_local.kernels.layout import NF4_LEVELS, Matrix, expert_matrices, unpack_int8, unpack_nf4
from dsv2_local.kernels.metadata import AttentionMetadata

CACHES = (torch.bfloat16, torch.float32, torch.uint8)  # types of a KV cache that `attention` reads
# Materialised attention computes as many heads at a time as keep scores, or keys and values, below this many numbers.
ATTENTION_WORKSPACE = 1 << 25

Linear = Callable[[Tensor, Matrix], Tensor]

_LEVELS = torch.tensor(NF4_LEVELS)


def dequantize(matrix: Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert a stored matrix to plain numbers [R, C]: level × scale in fp32, then rounded to `dtype`."""
    if matrix.scales is None:
        return matrix.codes.to(dtype)
    groups, blocks = matrix.codes.shape[:2]
    if matrix.format is Format.NF4:
        codes = unpack_nf4(matrix.codes)
        values = _LEVELS.to(codes.device).index_select(0, codes.view(-1).to(torch.int32)).view(codes.shape)
    else:
        values = unpack_int8(matrix.codes).float()
    values *= matrix.scales.float().transpose(1, 2)[..., None]
    return values.view(groups * ROWS, blocks * BLOCK)[: matrix.rows, : matrix.cols].to(dtype)


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [T, C] · weightᵀ -> [T, R]."""
    return F.linear(x, dequantize(weight, x.dtype))


def embedding(ids: Tensor, weight: Matrix, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int64 [T]) of the embedding -> [T, D]."""
    if weight.scales is None:
        return weight.codes[ids].to(dtype)
    groups = Matrix(weight.format, len(ids) * ROWS, weight.cols, weight.codes[ids // ROWS], weight.scales[ids // ROWS])
    rows = dequantize(groups, dtype).view(len(ids), ROWS, weight.cols)
    return rows[torch.arange(len(ids), device=ids.device), ids % ROWS]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, x / sqrt(mean(x²) + eps) · weight: in fp32, returned in the type of x."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [T, …, P] by complex numbers [T, P/2]: in fp32, returned in the type of x."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    rotation = rotation.view(len(x), *(1,) * (x.dim() - 2), -1)
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def swiglu(x: Tensor, gate: Matrix, up: Matrix, down: Matrix, linear: Linear = linear) -> Tensor:
    """down(silu(gate(x)) · up(x)) for x [T, D] -> [T, D]."""
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def experts(
    x: Tensor, records: Tensor, layout: ExpertLayout, ids: Tensor, weights: Tensor, linear: Linear = linear
) -> Tensor:
    """The routed experts of a mixture-of-experts layer: Σₖ weights[t, k] · expert[ids[t, k]](x[t]).

    Args:
        x: [T, D].
        records: uint8 [E, layout.nbytes], one record per expert.
        ids: int64 [T, K]; weights: float32 [T, K].

    Returns:
        [T, D] in the type of `x`; summed in fp32.
    """
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(ids).tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        out = swiglu(x[token], *expert_matrices(layout, records[expert]), linear)
        y.index_add_(0, token, out.float() * weights[token, slot, None])
    return y.to(x.dtype)


def expert_outputs(
    x: Tensor,
    records: Tensor,
    layout: ExpertLayout,
    tokens: Tensor,
    slots: Tensor,
    out: Tensor,
    distinct: int | None = None,
    linear: Linear = linear,
) -> None:
    """The outputs of n token-expert pairs: out[i] = the expert in records[slots[i]], applied to x[tokens[i]].

    Args:
        x: [T, D].
        records: uint8 [slots, layout.nbytes], one record per slot.
        tokens, slots: int64 [n]. Pairs with a negative slot are skipped, except in the native kernels, which do not
            accept them.
        out: fp32 [n, D], written to.
        distinct: how many slots occur among the pairs at most, if that is known; kernels choose their shape by it, and
            it changes no result.
    """
    for slot in torch.unique(slots[slots >= 0]).tolist():
        (pairs,) = (slots == slot).nonzero(as_tuple=True)
        out[pairs] = swiglu(x[tokens[pairs]], *expert_matrices(layout, records[slot]), linear).float()


def sorted_expert_outputs(
    x: Tensor,
    records: Tensor,
    layout: ExpertLayout,
    tokens: Tensor,
    runs: Sequence[tuple[int, int]],
    out: Tensor,
    linear: Linear = linear,
) -> None:
    """`expert_outputs` of pairs that are sorted by slot, whose number in each slot the host knows.

    Args:
        x: [T, D].
        records: uint8 [slots, layout.nbytes], one record per slot.
        tokens: int64 [n], the token of each pair.
        runs: (slot, number of pairs) of successive pairs; the numbers add up to n.
        out: fp32 [n, D], written to.
    """
    for (slot, count), end in zip(runs, accumulate(count for _, count in runs), strict=True):
        part = slice(end - count, end)
        out[part] = swiglu(x[tokens[part]], *expert_matrices(layout, records[slot]), linear).float()


def to_host(x: Tensor, ids: Tensor, host_x: Tensor, host_ids: Tensor) -> None:
    """Write x [T, D] and ids (int64 [T, K]) to page-locked RAM, x as fp32.

    They are there once the work that is queued on the device so far is done.
    """
    host_x.copy_(x.float(), non_blocking=True)
    host_ids.copy_(ids, non_blocking=True)


def combine(outputs: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, y: Tensor, first: int | None = None) -> None:
    """Add up the outputs of experts: y[t] += weights[t, k] · outputs[rows[t, k]] for all k, in ascending ids[t, k].

    The terms are added in the order of the experts' ids, whichever device computed them. So the sum can be split into
    several calls, each with higher ids than the one before, and has the same bits as a single call.

    Args:
        outputs: fp32 [n, D].
        rows: int64 [T, K]; negative rows are skipped. ids: int64 [T, K]; weights: float32 [T, K].
        y: fp32 [T, D], updated in place.
        first: the row that outputs[0] is; rows before it and after the last of `outputs` are skipped. None: all rows
            are rows of `outputs`.
    """
    rows = rows if first is None else part_of_rows(rows, first, len(outputs))
    order = ids.argsort(dim=1, stable=True)
    for row, weight in zip(rows.gather(1, order).T, weights.gather(1, order).T, strict=True):
        (tokens,) = (row >= 0).nonzero(as_tuple=True)
        y[tokens] += outputs[row[tokens]] * weight[tokens, None]


def part_of_rows(rows: Tensor, first: int, count: int) -> Tensor:
    """The rows relative to `first`; -1 for those that are not among the `count` rows from there on."""
    return torch.where((rows >= first) & (rows < first + count), rows - first, -1)


def route(x: Tensor, gate: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Choose the experts of x [T, D] by gate (fp32 [E, D]) -> ids int64 [T, K], weights fp32 [T, K].

    Scores are a softmax over all experts. group_limited_greedy selects the topk_group groups with the best single
    experts; the scores of experts in other groups count as 0 (arXiv 2405.04434, section 2.2.2). With norm_topk_prob the
    weights are normalised *instead of* multiplied by routed_scaling_factor.
    """
    scores = torch.softmax(x.float() @ gate.T, dim=1)  # [T, E]
    if config.topk_method == "group_limited_greedy":
        groups = scores.view(len(scores), config.n_group, -1)  # [T, G, E/G]
        selected = groups.amax(2).topk(config.topk_group, dim=1).indices
        outside = torch.ones(groups.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, selected, False)
        scores = groups.masked_fill(outside[..., None], 0.0).flatten(1)
    weights, ids = scores.topk(config.num_experts_per_tok, dim=1)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        return ids, weights / (weights.sum(1, keepdim=True) + 1e-20)
    return ids, weights * config.routed_scaling_factor


def top_candidates(logits: Tensor, limits: Tensor) -> Tensor:
    """Reduce each distribution to what sampling needs: its top candidates and the sum of all exponentials.

    Args:
        logits: fp32 [T, V], here V is the size of the vocabulary.
        limits: fp32 [T, 2], for each row 1 / temperature, and the margin: candidates are the tokens whose logits are at
            most this far below the largest.

    Returns:
        int32 [T, 3 + 2 * MAX_CANDIDATES], per row: the number of candidates; the bits of two fp32 numbers, the largest
        logit and Σ exp((logit - largest) / temperature) over all tokens; the token ids of the candidates; the bits of
        their logits. Candidates are in no particular order. If there are more than MAX_CANDIDATES, an arbitrary subset
        is returned. If a logit is NaN, the number of candidates may be 0.
    """
    out = torch.zeros(len(logits), 3 + 2 * MAX_CANDIDATES, dtype=torch.int32, device=logits.device)
    for row, packed, (inverse_temperature, margin) in zip(logits, out, limits, strict=True):
        largest = row.max()
        (ids,) = (row >= largest - margin).nonzero(as_tuple=True)
        mass = ((row - largest) * inverse_temperature).exp().sum()
        packed[0], packed[1:3] = len(ids), torch.stack((largest, mass)).view(torch.int32)
        ids = ids[:MAX_CANDIDATES]
        packed[3 : 3 + len(ids)] = ids
        packed[3 + MAX_CANDIDATES : 3 + MAX_CANDIDATES + len(ids)] = row[ids].view(torch.int32)
    return out


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + other [T, D], and the RMSNorm of that with weight [D]."""
    total = x + other
    return total, rms_norm(total, weight, eps)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b."""
    return a + b


def write_latents(
    latents: Tensor, metadata: AttentionMetadata, kv_a: Tensor, weight: Tensor, eps: float, rotation: Tensor
) -> None:
    """Append the rows of T tokens to their sequences in a layer's KV cache, computed from kv_a [T, C + P].

    The latent is normalised with weight [C], the rope key rotated; `latents`, `metadata` and `rotation` are as in
    `attention`. Lengths and block numbers are read from the block tables at run time, so that a recorded or captured
    step can be replayed at the next positions.
    """
    C = len(weight)
    rows = torch.cat((rms_norm(kv_a[:, :C], weight, eps), rotate(kv_a[:, C:], rotation)), 1)
    for part, block_table, _ in metadata.sequences():
        write_rows(latents, block_table, rows[part], C)


def attention(
    q: Tensor,
    rotation: Tensor,
    latents: Tensor,
    metadata: AttentionMetadata,
    w_uk: Matrix,
    w_uv: Matrix,
    scale: float,
) -> Tensor:
    """Causal multi-head latent attention of the tokens of several sequences, in either of its two forms.

    Args:
        q: [T, H, N + P], the rope part not yet rotated; rotation: complex64 [T, P/2].
        latents: a layer's KV cache, normalised latents and rotated rope keys: [blocks, CACHE_BLOCK, C + P], or 8-bit
            rows (`kernels.latents`).
        metadata: whose rows these are, and the form; a query sees the positions of its own sequence up to its own.
        w_uk: [H·C, N]; w_uv: [H·V, C].
        scale: multiplies the scores; the same in both forms, derived from N + P.

    Returns:
        [T, H·V].
    """
    P, C = 2 * rotation.shape[1], w_uv.cols
    q_nope, q_rope = torch.split(q, [q.shape[2] - P, P], dim=2)
    q_rope, out = rotate(q_rope, rotation), q.new_empty(len(q), w_uv.rows)
    for part, block_table, absorbed in metadata.sequences():
        form = absorbed_attention if absorbed else materialized_attention
        rows = read_rows(latents, block_table, int(block_table[0]) + part.stop - part.start, C, q.dtype)
        out[part] = form(q_nope[part], q_rope[part], rows, w_uk, w_uv, scale)
    return out


def absorbed_attention(
    q_nope: Tensor, q_rope: Tensor, latents: Tensor, w_uk: Matrix, w_uv: Matrix, scale: float
) -> Tensor:
    """Attention in latent space, which takes the fewest operations for few queries.

    q̃ = W_UKᵀ·q_nope; score = q̃·ĉ + q_rope·k_rope; out = W_UV·Σ p·ĉ (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    q_nope [T, H, N], rotated q_rope [T, H, P], latents [S, C + P] -> [T, H·V]; the rest as in `attention`.
    """
    T, H, N = q_nope.shape
    C = latents.shape[1] - q_rope.shape[2]
    q_latent = torch.einsum("thn,hcn->htc", q_nope, dequantize(w_uk, q_nope.dtype).view(H, C, N))
    query = torch.cat((q_latent, q_rope.transpose(0, 1)), dim=2)  # [H, T, C + P]
    scores = query @ latents.T * scale
    mixed = _causal_softmax(scores) @ latents[:, :C]  # [H, T, C]
    out = torch.einsum("htc,hvc->thv", mixed, dequantize(w_uv, mixed.dtype).view(H, -1, C))
    return out.reshape(T, -1)


def materialized_attention(
    q_nope: Tensor, q_rope: Tensor, latents: Tensor, w_uk: Matrix, w_uv: Matrix, scale: float
) -> Tensor:
    """The same result as `absorbed_attention`, from keys and values rebuilt from the latents; faster for many queries.

    Heads are computed in groups, so that memory stays bounded for any T, S and H.
    """
    T, H, N = q_nope.shape
    S = len(latents)
    C = latents.shape[1] - q_rope.shape[2]
    latent, k_rope = latents[:, :C], latents[:, C:]
    uk = dequantize(w_uk, q_nope.dtype).view(H, C, N)
    uv = dequantize(w_uv, q_nope.dtype).view(H, -1, C)
    out = q_nope.new_empty(T, H, uv.shape[1])
    step = max(1, ATTENTION_WORKSPACE // (S * max(T, N + uv.shape[1])))
    for start in range(0, H, step):
        heads = slice(start, start + step)
        scores = q_nope[:, heads].transpose(0, 1) @ (latent @ uk[heads]).transpose(1, 2)  # [h, T, S]
        scores = (scores + q_rope[:, heads].transpose(0, 1) @ k_rope.T) * scale
        out[:, heads] = (_causal_softmax(scores) @ (latent @ uv[heads].transpose(1, 2))).transpose(0, 1)
    return out.view(T, -1)


def _causal_softmax(scores: Tensor) -> Tensor:
    """Softmax in fp32 over scores [H, T, S]; the queries are the last T of S positions and see none after their own."""
    T, S = scores.shape[1:]
    if T > 1:
        hidden = torch.ones(T, S, dtype=torch.bool, device=scores.device).triu_(S - T + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(2, dtype=torch.float32).to(scores.dtype)
