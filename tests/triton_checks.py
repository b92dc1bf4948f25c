"""Checks of the Triton kernels for any shape and device: small shapes for the interpreter, those of models for GPUs."""

from typing import Any

import torch
from torch import Tensor

from dsv2_local.architectures.families import parse_config
from dsv2_local.kernels import reference, triton
from dsv2_local.kernels.format import MAX_CANDIDATES, CacheDtype, ExpertLayout, Format
from dsv2_local.kernels.latents import dequantize_latents, quantize_latents
from dsv2_local.kernels.layout import Matrix
from dsv2_local.quant import int8, nf4
from tests.models import TINY
from tests.paging import gathered, scattered

# Relative error of one product. The interpreter rounds bf16 towards zero, so the errors of several products add up.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def off(ours: Tensor, exact: Tensor) -> float:
    """The relative error in norm; infinite if a number is not finite."""
    ours = ours.to(exact.device, torch.float32)
    return float((ours - exact).norm() / exact.norm()) if ours.isfinite().all() else float("inf")


def matrix(format: Format, rows: int, cols: int) -> Matrix:
    values = torch.randn(rows, cols) / cols**0.5
    if format is Format.BF16:
        return Matrix(format, rows, cols, values.bfloat16())
    return (nf4 if format is Format.NF4 else int8).quantize(values)


def on(device: str, matrix: Matrix) -> Matrix:
    return Matrix(matrix.format, matrix.rows, matrix.cols, *(part.to(device) for part in matrix.parts))


def record(layout: ExpertLayout) -> Tensor:
    parts = [part for shape in layout.shapes.values() for part in matrix(layout.format, *shape).parts]
    return torch.cat([part.view(-1).view(torch.uint8) for part in parts])


def linear(device: str, dtype: torch.dtype, format: Format, rows: int, cols: int, tokens: int) -> None:
    weight, x = matrix(format, rows, cols), torch.randn(tokens, cols).to(dtype)
    ours = triton.linear(x.to(device), on(device, weight))
    assert ours.dtype == dtype
    assert off(ours, reference.linear(x.float(), weight)) < TOLERANCE[dtype]


def dequantized_and_embedded(device: str, format: Format, rows: int, cols: int) -> None:
    """Both are exact, in every row and column."""
    weight, ids = matrix(format, rows, cols), torch.randint(0, rows, (5,))
    ours, exact = triton.dequantize(on(device, weight)).cpu(), reference.dequantize(weight)
    assert torch.equal(ours, exact)
    taken = triton.embedding(ids.to(device), on(device, weight), torch.float32).cpu()
    assert torch.equal(taken, exact[ids])


def swiglu(device: str, dtype: torch.dtype, format: Format, hidden: int, inner: int, tokens: int) -> None:
    gate, up, down = (matrix(format, *shape) for shape in ExpertLayout(format, hidden, inner).shapes.values())
    x = torch.randn(tokens, hidden).to(dtype)
    ours = triton.swiglu(x.to(device), *(on(device, m) for m in (gate, up, down)))
    assert off(ours, reference.swiglu(x.float(), gate, up, down)) < 2 * TOLERANCE[dtype]


def experts(
    device: str, dtype: torch.dtype, format: Format, hidden: int, inner: int, tokens: int, slots: int, chosen: int = 3
) -> None:
    """Some slots have many pairs and the first has none, so that there are groups of pairs of all sizes."""
    layout = ExpertLayout(format, hidden, inner)
    records, x = torch.stack([record(layout) for _ in range(slots)]), torch.randn(tokens, hidden).to(dtype)
    ids = torch.stack([1 + (torch.rand(slots - 1) ** 4).argsort()[:chosen] for _ in range(tokens)])
    ids[: tokens // 2, 0] = slots - 1
    weights = torch.rand(tokens, chosen)
    exact = reference.experts(x.float(), records, layout, ids, weights)
    ours = triton.experts(x.to(device), records.to(device), layout, ids.to(device), weights.to(device))
    assert off(ours, exact) < 2 * TOLERANCE[dtype]
    pairs = torch.arange(tokens * chosen)
    out, y = torch.full((tokens * chosen, hidden), torch.nan, device=device), torch.zeros(x.shape, device=device)
    moved = [part.to(device) for part in (pairs // chosen, ids.flatten())]
    triton.expert_outputs(x.to(device), records.to(device), layout, *moved, out)
    triton.combine(out, *(part.to(device) for part in (pairs.view(tokens, chosen), ids, weights)), y)
    assert dtype != torch.float32 or torch.equal(ours, y)  # the same bits, wherever experts are placed
    hinted = torch.full_like(out, torch.nan)
    triton.expert_outputs(x.to(device), records.to(device), layout, *moved, hinted, len(ids.unique()))
    assert off(hinted, out) < TOLERANCE[dtype]
    order = ids.flatten().argsort(stable=True)
    runs = list(zip(*(part.tolist() for part in ids.flatten()[order].unique(return_counts=True)), strict=True))
    in_order = torch.full_like(out, torch.nan)
    triton.sorted_expert_outputs(x.to(device), records.to(device), layout, (order // chosen).to(device), runs, in_order)
    assert off(in_order, out[order.to(device)]) < TOLERANCE[dtype]


def sent_to_host(device: str, dtype: torch.dtype, hidden: int, chosen: int) -> None:
    """Every number and every id is written, and nothing past them."""
    x, ids = torch.randn(1, hidden).to(dtype), torch.randint(160, (1, chosen))
    host_x, host_ids = torch.full((1, hidden + 8), torch.nan), torch.full((1, chosen + 2), -1)
    if device != "cpu":
        host_x, host_ids = host_x.pin_memory(), host_ids.pin_memory()
    triton.to_host(x.to(device), ids.to(device), host_x, host_ids)
    if device != "cpu":
        torch.cuda.synchronize()
    assert torch.equal(host_x[:, :hidden], x.float())
    assert torch.equal(host_ids[:, :chosen], ids)
    assert host_x[:, hidden:].isnan().all()
    assert (host_ids[:, chosen:] == -1).all()


def combined(device: str, dtype: torch.dtype, tokens: int, hidden: int) -> None:
    """One call, and several calls by ascending expert id, which must give the same bits; negative rows add nothing."""
    outputs, weights = torch.randn(9, hidden).to(dtype), torch.randn(tokens, 4)
    rows, y = torch.randint(-1, 9, (tokens, 4)), torch.randn(tokens, hidden)
    ids = torch.stack([torch.randperm(20)[:4] for _ in range(tokens)])
    exact = y + ((rows >= 0) * weights).unsqueeze(2).mul(outputs.float()[rows]).sum(1)
    moved = [part.to(device) for part in (outputs, rows, ids, weights)]
    whole, turns = y.to(device, copy=True), y.to(device, copy=True)
    triton.combine(*moved, whole)
    for first in range(0, 20, 5):
        some = torch.where((ids >= first) & (ids < first + 5), rows, -1)
        triton.combine(moved[0], some.to(device), *moved[2:], turns)
    assert off(whole, exact) < 1e-6
    assert torch.equal(whole, turns)
    part = torch.where((rows >= 3) & (rows < 7), rows, -1)
    expected, ours = y.to(device, copy=True), y.to(device, copy=True)
    triton.combine(moved[0], part.to(device), *moved[2:], expected)
    triton.combine(moved[0][3:7], *moved[1:], ours, 3)
    assert torch.equal(ours, expected)


def attention(
    device: str,
    dtype: torch.dtype,
    formats: tuple[Format, Format],
    shape: tuple[int, int, int, int, int],
    tokens: int,
    cached: int,
    absorb: bool,
    kind: CacheDtype = CacheDtype.BF16,
) -> None:
    """The cache contains NaN past the last position; if it is not 8-bit, it has the type of the queries."""
    H, N, P, C, V = shape
    w_uk, w_uv = matrix(formats[0], H * C, N), matrix(formats[1], H * V, C)
    q = (torch.randn(tokens, H, N + P) * 3).to(dtype)
    written = torch.randn(cached + tokens, C + P)
    in_bytes = kind is CacheDtype.INT8
    latents, block_table = scattered(quantize_latents(written, C) if in_bytes else written.to(dtype), cached)
    block_table = torch.cat((block_table, torch.full((2,), -1)))  # room for blocks that are not allocated yet
    rotation = torch.polar(torch.ones(tokens, P // 2), torch.randn(tokens, P // 2))
    exact = reference.attention(
        q.float(), rotation, latents if in_bytes else latents.float(), block_table, w_uk, w_uv, 0.1, absorb=False
    )
    moved = [part.to(device) for part in (q, rotation, latents, block_table)]
    ours = triton.attention(*moved, on(device, w_uk), on(device, w_uv), 0.1, absorb)
    assert ours.dtype == dtype
    assert off(ours, exact) < 2 * TOLERANCE[dtype]


def rows(device: str, tokens: int, hidden: int, C: int, P: int) -> None:
    x, weight = torch.randn(tokens, hidden) * 3, torch.rand(hidden) + 0.5
    assert off(triton.rms_norm(x.to(device), weight.to(device), 1e-6), reference.rms_norm(x, weight, 1e-6)) < 1e-6
    kv_a, rotation = torch.randn(tokens, C + P), torch.polar(torch.ones(tokens, P // 2), torch.randn(tokens, P // 2))
    blocks, block_table = scattered(torch.zeros(70 + tokens, C + P), 62)  # across a block boundary
    arguments: tuple[Any, ...] = (block_table, kv_a, torch.rand(C), 1e-6, rotation)
    ours, exact = blocks.to(device), blocks.clone()
    triton.write_latents(ours, *(part.to(device) if isinstance(part, Tensor) else part for part in arguments))
    reference.write_latents(exact, *arguments)
    assert torch.equal(ours.isnan().cpu(), blocks.isnan())
    ours, exact = (gathered(written.cpu(), block_table, 70 + tokens) for written in (ours, exact))
    assert off(ours, exact) < 1e-6
    assert torch.equal(ours[:62], exact[:62])
    assert torch.equal(ours[62 + tokens :], exact[62 + tokens :])


def bytes_of_latents(device: str, C: int, P: int) -> None:
    """Codes may differ by one, since the norm is rounded differently; rows of zeros have scale 0."""
    kv_a = torch.randn(9, C + P) * torch.logspace(-3, 3, 9)[:, None]
    kv_a[4] = 0.0
    rotation = torch.polar(torch.ones(9, P // 2), torch.randn(9, P // 2))
    blocks, block_table = scattered(torch.zeros(73, C + -(-C // 64) * 2 + 2 * P, dtype=torch.uint8), 60)
    arguments: tuple[Any, ...] = (block_table, kv_a, torch.rand(C) + 0.5, 1e-6, rotation)
    ours, exact = blocks.to(device), blocks.clone()
    triton.write_latents(ours, *(part.to(device) if isinstance(part, Tensor) else part for part in arguments))
    reference.write_latents(exact, *arguments)
    ours, exact = (dequantize_latents(gathered(part.cpu(), block_table, 69), C) for part in (ours, exact))
    assert off(ours, exact) < 5e-3
    assert torch.equal(ours[:60], exact[:60])
    assert not ours[64, :C].any()


def route(device: str, tokens: int, experts: int, chosen: int, **changes: Any) -> None:
    raw = {**TINY, "model_type": "deepseek_v2", "routed_scaling_factor": 16.0, "n_routed_experts": experts}
    config = parse_config({**raw, "num_experts_per_tok": chosen, **changes})
    x, gate = torch.randn(tokens, 100), torch.randn(experts, 100) / 5
    ids, weights = triton.route(x.to(device), gate.to(device), config)
    exact_ids, exact_weights = reference.route(x, gate, config)
    assert torch.equal(ids.cpu(), exact_ids)
    assert off(weights, exact_weights) < 1e-5


def top_candidates(device: str, vocab: int, temperature: float, margin: float) -> None:
    logits, limits = torch.randn(3, vocab) * 3, torch.tensor([1 / temperature, margin])
    ours, exact = (
        triton.top_candidates(logits.to(device), limits.to(device)).cpu(),
        reference.top_candidates(logits, limits),
    )
    assert torch.equal(ours[:, :2], exact[:, :2])
    torch.testing.assert_close(ours[:, 2:3].view(torch.float32), exact[:, 2:3].view(torch.float32), rtol=1e-5, atol=0)
    for row, packed, wanted in zip(logits, ours, exact, strict=True):
        count = min(int(packed[0]), MAX_CANDIDATES)
        ids = packed[3 : 3 + count]
        values = packed[3 + MAX_CANDIDATES : 3 + MAX_CANDIDATES + count].view(torch.float32)
        assert torch.equal(values, row[ids])
        assert len(ids.unique()) == count
        if int(packed[0]) <= MAX_CANDIDATES:
            assert sorted(ids.tolist()) == sorted(wanted[3 : 3 + count].tolist())
