"""The Triton kernels on a GPU: errors against the torch reference, then speed relative to memory bandwidth.

    python benchmarks/gpu_kernels.py [--json FILE]
    python benchmarks/gpu_kernels.py --interpret --tiny    # tests this program without a GPU; its times mean nothing

Each measurement cycles through several sets of weights or caches of one shape, more than fit in the L2 cache. One call
per set ("turn") is captured in a CUDA graph, so that launches from Python cost nothing; a result is the median time of
the graph's replays divided by the number of turns.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dsv2_local.kernels import reference
from dsv2_local.kernels.format import CACHE_BLOCK, CacheDtype, ExpertLayout, Format, blocks_for, matrix_nbytes
from dsv2_local.kernels.latents import quantize_latents, row_shape
from dsv2_local.kernels.layout import Matrix, expert_matrices, planes
from dsv2_local.kernels.metadata import AttentionMetadata

SHAPES = {
    "Lite expert": (1408, 2048),
    "Lite o_proj": (2048, 2048),
    "Lite q_proj": (3072, 2048),
    "236B expert": (1536, 5120),
    "236B q_b_proj": (24576, 1536),
    "236B o_proj": (5120, 16384),
}  # [R, C]; fmt: skip
EXPERTS = {"Lite": (2048, 1408), "236B": (5120, 1536)}  # hidden, intermediate
HEADS = {"Lite": 16, "236B": 128}
WORKING_SET = 400 << 20  # bytes of all sets of weights or caches
MANY = 4096  # tokens of prefill
TURNS = 64  # maximum
REPLAYS = 20

Turn = Callable[[int], Any]
"""Launches a kernel on the i-th set of inputs."""
Case = tuple[str, int, Turn, int, float, float]
"""Name, tokens, turn, number of turns, bytes read, and floating-point operations."""


def random_matrix(format: Format, rows: int, cols: int, device: str) -> Matrix:
    """A matrix of random codes, with scales that keep products near 1."""
    codes, scales = planes(format, rows, cols)
    low, high = (0, 256) if format is Format.NF4 else (-127, 128)
    size = 1.0 if format is Format.NF4 else 1 / 127
    return Matrix(
        format, rows, cols,
        torch.randint(low, high, codes.shape, dtype=codes.dtype, device=device),
        torch.rand(scales.shape, device=device).add(0.5).mul(2 * size / cols**0.5).to(scales.dtype),
    )  # fmt: skip


def random_records(layout: ExpertLayout, count: int, device: str) -> Tensor:
    records = torch.randint(0, 256, (count, layout.nbytes), dtype=torch.uint8, device=device)
    for record in records:
        for matrix in expert_matrices(layout, record):
            assert matrix.scales is not None
            matrix.scales.copy_(torch.rand(matrix.scales.shape).add(0.5).mul(2 / matrix.cols**0.5))
    return records


def latent_weights(heads: int, tiny: bool, device: str) -> tuple[Matrix, Matrix, int, int]:
    """w_uk, w_uv, N (qk_nope_head_dim) and P (qk_rope_head_dim) of a model's attention."""
    N, P, C, V = (16, 8, 32, 16) if tiny else (128, 64, 512, 128)
    uk, uv = (random_matrix(Format.INT8, heads * rows, cols, device) for rows, cols in ((C, N), (V, C)))
    return uk, uv, N, P


def seconds_of(turn: Turn, turns: int, device: str) -> float:
    """Median seconds of one turn, over `turns` different turns."""
    turn(0)  # compiles and autotunes
    if device == "cpu":
        start = time.perf_counter()
        turn(turns - 1)
        return time.perf_counter() - start
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for i in range(turns):
            turn(i)
    for _ in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / turns)
    return median(times[2:])


def copy_rate(device: str, tiny: bool) -> float:
    """Bytes per second read and written by a kernel that adds 1 to a tensor; a plain copy is slower on an H200."""
    source = torch.ones(1 << (20 if tiny else 30), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda i: torch.add(source, 1, out=target), 1, device)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """‖ours - exact‖ / ‖exact‖; infinite if a value is not finite."""
    ours = ours.to(exact.device, torch.float32)
    return float((ours - exact).norm() / exact.norm()) if ours.isfinite().all() else float("inf")


def check_all(device: str, tiny: bool) -> dict[str, float]:
    """The error of each kernel in bf16 on random inputs."""
    from dsv2_local.kernels import triton as kernels

    errors = {}
    for format in (Format.NF4, Format.INT8):
        weight = random_matrix(format, *((40, 200) if tiny else (1408, 2048)), "cpu")
        moved = Matrix(format, weight.rows, weight.cols, *(part.to(device) for part in weight.parts))
        for tokens in (1, 3, 40):
            x = torch.randn(tokens, weight.cols).bfloat16()
            ours = kernels.linear(x.to(device), moved)
            errors[f"linear {format}, {tokens} tokens"] = relative_error(ours, reference.linear(x.float(), weight))
    layout = ExpertLayout(Format.NF4, *((64, 40) if tiny else EXPERTS["Lite"]))
    records = random_records(layout, 8, "cpu")
    for tokens in (1, 20):
        x, weights = torch.randn(tokens, layout.hidden_size).bfloat16(), torch.rand(tokens, 3)
        ids = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)])
        ours = kernels.experts(x.to(device), records.to(device), layout, ids.to(device), weights.to(device))
        exact = reference.experts(x.float(), records, layout, ids, weights)
        errors[f"experts nf4, {tokens} tokens"] = relative_error(ours, exact)
    uk, uv, N, P = latent_weights(4 if tiny else 16, tiny, "cpu")
    heads = 4 if tiny else 16
    moved_weights = (Matrix(m.format, m.rows, m.cols, *(part.to(device) for part in m.parts)) for m in (uk, uv))
    w_uk, w_uv = moved_weights
    q, latents = torch.randn(3, heads, N + P).bfloat16(), torch.randn(3, CACHE_BLOCK, uv.cols + P).bfloat16()
    rotation, tables = torch.polar(torch.ones(3, P // 2), torch.randn(3, P // 2)), torch.tensor([[97, 1, 0], [9, 2, 2]])
    for absorbed, name in ((True, "absorbed"), (False, "materialised")):
        metadata = AttentionMetadata.of(tables, (2, 1), (absorbed, absorbed))
        exact = reference.attention(q.float(), rotation, latents.float(), metadata, uk, uv, 0.1)
        inputs = [part.to(device) for part in (q, rotation, latents)]
        metadata = AttentionMetadata.of(tables.to(device), (2, 1), (absorbed, absorbed))
        errors[f"attention, {name}"] = relative_error(kernels.attention(*inputs, metadata, w_uk, w_uv, 0.1), exact)
    return errors


def linears(device: str, tiny: bool) -> Iterator[Case]:
    """Matrix products, with those of bitsandbytes if it is installed."""
    from dsv2_local.kernels import triton as kernels

    shapes = {"tiny": (40, 128)} if tiny else SHAPES
    for name, (rows, cols) in shapes.items():
        for tokens in (1, 20 if tiny else MANY):
            x = torch.randn(tokens, cols, device=device).bfloat16()
            for format in (Format.NF4, Format.INT8):
                size = matrix_nbytes(format, rows, cols)
                count = 2 if tiny else turns_of(size, tokens)
                weights = [random_matrix(format, rows, cols, device) for _ in range(count)]
                turn = partial(lambda i, x, weights: kernels.linear(x, weights[i]), x=x, weights=weights)
                yield f"{format} {name}", tokens, turn, count, size, 2 * tokens * rows * cols
            if device != "cpu" and (rival := bitsandbytes_turn(rows, cols, x)):
                size = rows * cols // 2 + rows * cols // 64 * 4
                yield f"bitsandbytes {name}", tokens, *rival, size, 2 * tokens * rows * cols


def bitsandbytes_turn(rows: int, cols: int, x: Tensor) -> tuple[Turn, int] | None:
    """bitsandbytes' NF4 product and its number of turns; None if bitsandbytes is not installed."""
    try:
        import bitsandbytes
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return None
    packed, state = quantize_4bit(torch.randn(rows, cols, device=x.device).bfloat16(), blocksize=64, quant_type="nf4")
    weights = [packed.clone() for _ in range(turns_of(packed.nbytes, len(x)))]
    return lambda i: bitsandbytes.matmul_4bit(x, weights[i].t(), quant_state=state), len(weights)


def turns_of(size: int, tokens: int) -> int:
    """How many sets of `size` bytes to cycle through; few with many tokens, which are not bound by memory."""
    return 4 if tokens > 1 else max(2, min(TURNS, WORKING_SET // size))


def mixtures(device: str, tiny: bool) -> Iterator[Case]:
    """The six routed experts of one token, out of more than fit in the L2 cache."""
    from dsv2_local.kernels import triton as kernels

    for name, shape in ({"tiny": (64, 40)} if tiny else EXPERTS).items():
        layout = ExpertLayout(Format.NF4, *shape)
        count = 12 if tiny else WORKING_SET // layout.nbytes // 6 * 6
        records = random_records(layout, count, device)
        x, tokens = torch.randn(1, layout.hidden_size, device=device).bfloat16(), torch.zeros(6, dtype=torch.int64)
        slots = torch.arange(count, device=device).view(-1, 6)
        turn = partial(
            lambda i, x, records, layout, tokens, slots, out: kernels.expert_outputs(
                x, records, layout, tokens, slots[i], out
            ),
            x=x, records=records, layout=layout, tokens=tokens.to(device), slots=slots,
            out=torch.empty(6, layout.hidden_size, device=device),
        )  # fmt: skip
        yield f"6 experts {name}", 1, turn, len(slots), 6 * layout.nbytes, 36 * shape[0] * shape[1]


def attentions(device: str, tiny: bool) -> Iterator[Case]:
    """Absorbed attention of the last token of contexts; the block tables have the blocks of these contexts only."""
    from dsv2_local.kernels import triton as kernels

    sizes = [(1, 100), (3, 100)] if tiny else [(1, 4096), (1, 32768), (16, 4096)]  # sequences, positions of each
    for name, heads in ({"tiny": 4} if tiny else HEADS).items():
        uk, uv, N, P = latent_weights(heads, tiny, device)
        for (sequences, context), kind in product(sizes, (CacheDtype.BF16, CacheDtype.INT8)):
            C, blocks = uv.cols, blocks_for(context)
            width, dtype = row_shape(kind, C, P)
            size = sequences * context * width * dtype.itemsize
            count = 2 if tiny else turns_of(size, 1)
            rows = (torch.randn(sequences * blocks * CACHE_BLOCK, C + P, device=device) for _ in range(count))
            written = [quantize_latents(part, C) if kind is CacheDtype.INT8 else part.bfloat16() for part in rows]
            caches = [part.view(sequences * blocks, CACHE_BLOCK, width) for part in written]
            q = torch.randn(sequences, heads, N + P, device=device).bfloat16()
            rotation = torch.ones(sequences, P // 2, dtype=torch.complex64, device=device)
            tables = torch.arange(sequences * blocks).view(sequences, blocks)
            tables = torch.cat((torch.full((sequences, 1), context - 1), tables), 1).to(device)
            metadata = AttentionMetadata.of(tables, [1] * sequences, [True] * sequences)
            turn = partial(
                lambda i, q, rotation, caches, metadata, uk, uv: kernels.attention(
                    q, rotation, caches[i], metadata, uk, uv, 0.1
                ),
                q=q, rotation=rotation, caches=caches, metadata=metadata, uk=uk, uv=uv,
            )  # fmt: skip
            weights = sum(part.nbytes for matrix in (uk, uv) for part in matrix.parts)
            operations = 2 * sequences * heads * (context * (2 * C + P) + C * (N + uv.rows // heads))
            label = f"attention {name}, {f'{sequences} x ' if sequences > 1 else ''}{context}, {kind}"
            yield label, sequences, turn, len(caches), size + weights, operations


def measure(device: str, tiny: bool) -> dict[str, Any]:
    """Check and time every kernel.

    Returns:
        device: name of the device; copy: GB/s of `copy_rate`; errors: error by kernel; figures: a list of name, tokens,
        microseconds, gb_s, fraction (of `copy`) and tflop_s.
    """
    copy = copy_rate(device, tiny)
    errors = check_all(device, tiny)
    timings = []
    for cases in (linears, mixtures, attentions):
        for name, tokens, turn, turns, size, operations in cases(device, tiny):
            seconds = seconds_of(turn, turns, device)
            timings.append({
                "name": name, "tokens": tokens, "microseconds": seconds * 1e6, "gb_s": size / seconds / 1e9,
                "fraction": size / seconds / copy, "tflop_s": operations / seconds / 1e12,
            })  # fmt: skip
    name = "interpreted" if device == "cpu" else torch.cuda.get_device_name()
    return {"device": name, "copy": copy / 1e9, "errors": errors, "figures": timings}


def show(measured: dict[str, Any]) -> None:
    print(f"{measured['device']}, read and written {measured['copy']:.0f} GB/s")
    for name, error in measured["errors"].items():
        print(f"  {name:30} error {error:.4f}")
    print(f"{'':30}{'tokens':>7}{'µs':>12}{'GB/s':>9}{'of copy':>9}{'TFLOP/s':>9}")
    for row in measured["figures"]:
        print(
            f"{row['name']:30}{row['tokens']:>7}{row['microseconds']:>12.1f}{row['gb_s']:>9.1f}"
            f"{row['fraction']:>8.0%} {row['tflop_s']:>8.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="run on the CPU, in Triton's interpreter")
    parser.add_argument("--tiny", action="store_true", help="use small shapes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    measured = measure("cpu" if args.interpret else "cuda", args.tiny)
    show(measured)
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1))
    worst = max(measured["errors"].values())
    if worst > 0.02:
        raise SystemExit(f"a kernel is wrong: error {worst:.3f}")


if __name__ == "__main__":
    main()
