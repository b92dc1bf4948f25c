"""Checks of the Triton kernels for any shape and device: small shapes for the interpreter, those of models for GPUs."""

from typing import Any

import torch
from torch import Tensor

from dsv2_local.architectures.families import parse_config
from dsv2_local.kernels import reference, triton
from dsv2_local.kernels.format import MAX_CANDIDATES, CacheDtype, ExpertLayout, Format
from dsv2_local.kernels.latents import dequantize_latents, quantize_latents
from dsv2_local.kernels.layout import Matrix
from dsv2_local.kernels.metadata import AttentionMetadata
from dsv2_local.quant import int8, nf4
from tests.models import TINY
from tests.paging import gathered, moved, scattered_together

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


def sent_to_host(device: str, dtype: torch.dtype, rows: int, hidden: int, chosen: int) -> None:
    """Every number and every id is written, and nothing past them."""
    x, ids = torch.randn(rows, hidden).to(dtype), torch.randint(160, (rows, chosen))
    host_x, host_ids = torch.full((rows + 1, hidden), torch.nan), torch.full((rows + 1, chosen), -1)
    if device != "cpu":
        host_x, host_ids = host_x.pin_memory(), host_ids.pin_memory()
    triton.to_host(x.to(device), ids.to(device), host_x[:rows], host_ids[:rows])
    if device != "cpu":
        torch.cuda.synchronize()
    assert torch.equal(host_x[:rows], x.float())
    assert torch.equal(host_ids[:rows], ids)
    assert host_x[rows:].isnan().all()
    assert (host_ids[rows:] == -1).all()


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
    sequences: list[tuple[int, int, bool]],
    kind: CacheDtype = CacheDtype.BF16,
) -> None:
    """Sequences (tokens, cached positions, whether absorbed) in one call.

    The cache contains NaN past the last position of each; if it is not 8-bit, it has the type of the queries.
    """
    H, N, P, C, V = shape
    counts, lengths, absorbed = (list(part) for part in zip(*sequences, strict=True))
    w_uk, w_uv, tokens = matrix(formats[0], H * C, N), matrix(formats[1], H * V, C), sum(counts)
    q = (torch.randn(tokens, H, N + P) * 3).to(dtype)
    written = [torch.randn(cached + count, C + P) for count, cached, _ in sequences]
    in_bytes = kind is CacheDtype.INT8
    rows = [quantize_latents(part, C) if in_bytes else part.to(dtype) for part in written]
    latents, metadata = scattered_together(rows, lengths, absorbed, room=2)  # blocks that are not allocated yet
    rotation = torch.polar(torch.ones(tokens, P // 2), torch.randn(tokens, P // 2))
    rebuilt = AttentionMetadata.of(metadata.block_tables, counts, [False] * len(counts))
    exact = reference.attention(q.float(), rotation, latents if in_bytes else latents.float(), rebuilt, w_uk, w_uv, 0.1)
    arguments = [part.to(device) for part in (q, rotation, latents)]
    ours = triton.attention(*arguments, moved(metadata, device), on(device, w_uk), on(device, w_uv), 0.1)
    assert ours.dtype == dtype
    for part, _, _ in metadata.sequences():
        assert off(ours[part], exact[part]) < 2 * TOLERANCE[dtype]


def attention_in_company(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int], tokens: int, alone: bool
) -> None:
    """A sequence has the same bits whoever is computed in the same step, if the steps have the same shape.

    With `alone`, also in a step of its own: this holds if that splits caches and rows of queries in the same way.
    """
    H, N, P, C, V = shape
    w_uk, w_uv = (on(device, matrix(Format.INT8, *size)) for size in ((H * C, N), (H * V, C)))
    lengths = [70, 5, 130]
    q, cached = torch.randn(3, tokens, H, N + P).to(dtype), [torch.randn(n + tokens, C + P).to(dtype) for n in lengths]
    rotation = torch.polar(torch.ones(3, tokens, P // 2), torch.randn(3, tokens, P // 2))

    def attended(order: list[int], part: slice = slice(None)) -> Tensor:
        latents, metadata = scattered_together([cached[i] for i in order], [lengths[i] for i in order], [True] * 3)
        metadata = AttentionMetadata.of(metadata.block_tables[part], metadata.counts[part], metadata.absorbed[part])
        chosen = order[part]
        inputs = [some.to(device) for some in (q[chosen].flatten(0, 1), rotation[chosen].flatten(0, 1), latents)]
        return triton.attention(*inputs, moved(metadata, device), w_uk, w_uv, 0.1).cpu().view(len(chosen), tokens, -1)

    first = attended([0, 1, 2])
    for order in ([2, 1, 0], [0, 2, 2], [1, 2, 1]):
        assert torch.equal(attended(order), first[order])
        if alone:
            assert torch.equal(attended(order, slice(1, 2)), first[order[1:2]])


def rows(device: str, counts: list[int], hidden: int, C: int, P: int) -> None:
    """Norms, and rows that several sequences append to the cache, across block boundaries."""
    tokens = sum(counts)
    x, weight = torch.randn(tokens, hidden) * 3, torch.rand(hidden) + 0.5
    assert off(triton.rms_norm(x.to(device), weight.to(device), 1e-6), reference.rms_norm(x, weight, 1e-6)) < 1e-6
    kv_a, rotation = torch.randn(tokens, C + P), torch.polar(torch.ones(tokens, P // 2), torch.randn(tokens, P // 2))
    lengths = [(62 + 37 * i) % 130 for i in range(len(counts))]
    written = [torch.zeros(length + count, C + P) for count, length in zip(counts, lengths, strict=True)]
    blocks, metadata = scattered_together(written, lengths, [True] * len(counts), room=1)
    weights = torch.rand(C)
    ours, exact = blocks.to(device), blocks.clone()
    triton.write_latents(ours, moved(metadata, device), kv_a.to(device), weights.to(device), 1e-6, rotation.to(device))
    reference.write_latents(exact, metadata, kv_a, weights, 1e-6, rotation)
    ours = ours.cpu()
    assert torch.equal(ours.isnan(), blocks.isnan())
    first = 0
    for table, count, length in zip(metadata.block_tables, counts, lengths, strict=True):
        mine, theirs = (gathered(part, table, length + count) for part in (ours, exact))
        assert not mine[:length].any()
        assert count == 0 or off(mine[length:], theirs[length:]) < 1e-6
        first += count


def bytes_of_latents(device: str, C: int, P: int) -> None:
    """Codes may differ by one, since the norm is rounded differently; rows of zeros have scale 0."""
    kv_a = torch.randn(9, C + P) * torch.logspace(-3, 3, 9)[:, None]
    kv_a[4] = 0.0
    rotation = torch.polar(torch.ones(9, P // 2), torch.randn(9, P // 2))
    written = [torch.zeros(n, C + -(-C // 64) * 2 + 2 * P, dtype=torch.uint8) for n in (69, 3)]
    blocks, metadata = scattered_together(written, [63, 0], [True, True])
    ours, exact, weight = blocks.to(device), blocks.clone(), torch.rand(C) + 0.5
    triton.write_latents(ours, moved(metadata, device), kv_a.to(device), weight.to(device), 1e-6, rotation.to(device))
    reference.write_latents(exact, metadata, kv_a, weight, 1e-6, rotation)
    for table, length, count in zip(metadata.block_tables, (63, 0), (6, 3), strict=True):
        mine, theirs = (dequantize_latents(gathered(part.cpu(), table, length + count), C) for part in (ours, exact))
        assert off(mine, theirs) < 5e-3
        assert torch.equal(mine[:length], theirs[:length])
        if count == 6:
            assert not mine[length + 4, :C].any()


def route(device: str, tokens: int, experts: int, chosen: int, **changes: Any) -> None:
    raw = {**TINY, "model_type": "deepseek_v2", "routed_scaling_factor": 16.0, "n_routed_experts": experts}
    config = parse_config({**raw, "num_experts_per_tok": chosen, **changes})
    x, gate = torch.randn(tokens, 100), torch.randn(experts, 100) / 5
    ids, weights = triton.route(x.to(device), gate.to(device), config)
    exact_ids, exact_weights = reference.route(x, gate, config)
    assert torch.equal(ids.cpu(), exact_ids)
    assert off(weights, exact_weights) < 1e-5


def top_candidates(device: str, vocab: int, temperature: float, margin: float) -> None:
    """The limits differ from row to row."""
    logits = torch.randn(3, vocab) * 3
    limits = torch.tensor([[1 / temperature, margin], [1.0, 0.0], [0.5, margin / 2 + 1]])
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
