"""Speed of the CPU kernels: GB/s for one token and GFLOP/s for many, compared with torch's int4 and bitsandbytes.

Matrix products come first, then the experts of a MoE layer and latent attention in V2-Lite's shape.

    python benchmarks/cpu_kernels.py [--threads 2] [--seconds 0.3]

Each measurement cycles through several matrices of one shape, more than fit in the CPU's caches, as a model would. All
results are medians; the first line is the bandwidth of a plain read of memory with the same threads.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from dsv2_local.kernels import cpu, ops
from dsv2_local.kernels.format import CACHE_BLOCK, CacheDtype, ExpertLayout, Format, blocks_for, matrix_nbytes
from dsv2_local.kernels.latents import row_shape, write_rows
from dsv2_local.kernels.layout import Matrix, expert_matrices, planes
from dsv2_local.kernels.metadata import AttentionMetadata
from dsv2_local.quant import int8

SHAPES = {"Lite's expert": (1408, 2048), "Lite's q_proj": (3072, 2048), "236B's expert": (1536, 5120)}  # [R, C]
TOKENS = (1, 8, 64, 512)
WORKING_SET = 300 << 20  # bytes of all weights of one shape


def ours(format: Format, rows: int, cols: int) -> tuple[Callable[[Tensor, int], Tensor], int]:
    """dsv2's product with the i-th of several matrices, and the number of matrices."""
    count = WORKING_SET // matrix_nbytes(format, rows, cols)
    matrices = []
    for _ in range(count):
        codes, scales = planes(format, rows, cols)
        parts = (torch.randint(0, 100, codes.shape).to(codes.dtype), torch.full(scales.shape, 0.01, dtype=scales.dtype))
        matrices.append(Matrix(format, rows, cols, *parts))
    return lambda x, i: ops.linear(x, matrices[i]), count


def torch_int4(rows: int, cols: int) -> tuple[Callable[[Tensor, int], Tensor], int]:
    """torch's 4-bit product (groups of 64, bf16 activations)."""
    count = WORKING_SET // (rows * cols // 2)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (rows, cols), dtype=torch.int32), 1
    )
    weights = [packed.clone() for _ in range(count)]
    scales = torch.full((cols // 64, rows, 2), 0.01, dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x, i: product(x.bfloat16(), weights[i], 64, scales), count


def bitsandbytes_nf4(rows: int, cols: int) -> tuple[Callable[[Tensor, int], Tensor], int]:
    """bitsandbytes' NF4 product on the CPU."""
    import bitsandbytes.functional as bnb
    from bitsandbytes import matmul_4bit

    packed, state = bnb.quantize_4bit(torch.randn(rows, cols), blocksize=64, quant_type="nf4")
    weights = [packed.clone() for _ in range(8)]  # few, since it is much slower than memory
    return lambda x, i: matmul_4bit(x, weights[i].t(), quant_state=state), len(weights)


def mixture(format: Format) -> tuple[Callable[[Tensor, int], Tensor], int]:
    """V2-Lite's routed experts, six per token, different ones in each call, out of more than fit in the caches."""
    layout = ExpertLayout(format, 2048, 1408)
    count = WORKING_SET // layout.nbytes
    records = torch.randint(0, 100, (count, layout.nbytes), dtype=torch.uint8)
    for record in records:
        for matrix in expert_matrices(layout, record):
            matrix.scales.fill_(0.01)
    return lambda x, i: ops.experts(x, records, layout, *choice(len(x), count, i)), count


def choice(tokens: int, experts: int, i: int) -> tuple[Tensor, Tensor]:
    """Expert ids and weights: six experts per token, cycling through all experts."""
    ids = (torch.arange(6 * tokens).view(tokens, 6) + 6 * i) % experts
    return ids, torch.full((tokens, 6), 1 / 6)


def attention(tokens: int, context: int, cache: CacheDtype) -> tuple[Callable[[Tensor, int], Tensor], int, float]:
    """V2-Lite's attention of the last `tokens` of `context` with the i-th of several caches; their number; FLOPs."""
    H, N, P, C, V = 16, 128, 64, 512, 128
    width, dtype = row_shape(cache, C, P)
    count, blocks = max(2, WORKING_SET // (context * width * dtype.itemsize)), blocks_for(context)
    caches, block_table = torch.empty(count, blocks, CACHE_BLOCK, width, dtype=dtype), torch.tensor([0, *range(blocks)])
    for pool in caches:
        write_rows(pool, block_table, torch.randn(context, C + P), C)
    block_table[0] = context - tokens
    metadata = AttentionMetadata.of(block_table[None], [tokens], [tokens == 1])
    w_uk, w_uv = (int8.quantize(torch.randn(H * rows, cols) / cols**0.5) for rows, cols in ((C, N), (V, C)))
    rotation = torch.ones(tokens, P // 2, dtype=torch.complex64)

    def product(q: Tensor, i: int) -> Tensor:
        return ops.attention(q.view(tokens, H, N + P), rotation, caches[i], metadata, w_uk, w_uv, 0.1)

    absorbed = tokens * context * H * (2 * C + P)
    rebuilt = H * (tokens * (context - tokens / 2) * (N + P + V) + context * C * (N + V))
    return product, count, 2 * (absorbed if tokens == 1 else rebuilt)


def seconds_of(product: Callable[[Tensor, int], Tensor], count: int, x: Tensor, budget: float) -> float:
    """Median seconds of one product, cycling through the matrices for about `budget` seconds."""
    product(x, 0)
    times: list[float] = []
    while sum(times) < budget or len(times) < 3:
        start = time.perf_counter()
        product(x, len(times) % count)
        times.append(time.perf_counter() - start)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per physical core)")
    parser.add_argument("--seconds", type=float, default=0.3, help="duration of each measurement (default: 0.3)")
    args = parser.parse_args()
    threads = ops.set_threads(args.threads, Format.NF4).count
    if native := cpu.kernels():
        buffer = torch.ones(1 << 30, dtype=torch.uint8)
        seconds = seconds_of(lambda x, _: native.read(buffer) or x, 1, buffer, 1.0)
        print(f"{ops.variant()}, {threads} threads, plain read {buffer.nbytes / seconds / 1e9:.1f} GB/s")
    for name, (rows, cols) in SHAPES.items():
        rivals = {
            "dsv2 nf4": (1, ours(Format.NF4, rows, cols)),
            "dsv2 int8": (1, ours(Format.INT8, rows, cols)),
            "torch int4": (threads, torch_int4(rows, cols)),
            "bitsandbytes nf4": (threads, bitsandbytes_nf4(rows, cols)),
        }
        for rival, (torch_threads, (product, count)) in rivals.items():
            torch.set_num_threads(torch_threads)
            bits = 8.25 if rival == "dsv2 int8" else 4.25
            speeds = []
            for tokens in TOKENS:
                seconds = seconds_of(product, count, torch.randn(tokens, cols), args.seconds)
                rate = f"{rows * cols * bits / 8 / seconds / 1e9:.1f} GB/s" if tokens == 1 else ""
                speeds.append(rate or f"{2 * tokens * rows * cols / seconds / 1e9:.0f}")
            print(f"{name:16}{rival:18}1 token {speeds[0]:>10}; {TOKENS[1:]} tokens {', '.join(speeds[1:])} GFLOP/s")
    torch.set_num_threads(1)
    for format in (Format.NF4, Format.INT8):
        show_mixture(format, args.seconds)
    for tokens, context in ((1, 1024), (1, 4096), (1, 32768), (512, 512), (512, 4096)):
        for cache in (CacheDtype.BF16, CacheDtype.INT8):
            show_attention(tokens, context, cache, args.seconds)


def show_mixture(format: Format, budget: float) -> None:
    product, count = mixture(format)
    seconds = [seconds_of(product, count, torch.randn(tokens, 2048), budget) for tokens in TOKENS]
    rate = 6 * ExpertLayout(format, 2048, 1408).nbytes / seconds[0] / 1e9
    rates = (2 * n * 3 * 6 * 2048 * 1408 / s / 1e9 for n, s in zip(TOKENS[1:], seconds[1:], strict=True))
    many = ", ".join(f"{gflops:.0f}" for gflops in rates)
    print(f"{'Lite mixture':16}{f'dsv2 {format}':18}1 token {rate:>5.1f} GB/s; {TOKENS[1:]} tokens {many} GFLOP/s")


def show_attention(tokens: int, context: int, cache: CacheDtype, budget: float) -> None:
    product, count, operations = attention(tokens, context, cache)
    seconds = seconds_of(product, count, torch.randn(tokens, 16 * 192), budget)
    width, dtype = row_shape(cache, 512, 64)
    rate = f", {context * width * dtype.itemsize / seconds / 1e9:.1f} GB/s of cache" if tokens == 1 else ""
    gflops = operations / seconds / 1e9
    print(f"Lite attention, {cache}, the last {tokens} of {context} tokens: {gflops:.0f} GFLOP/s{rate}")


if __name__ == "__main__":
    main()
