"""Compile every Triton kernel for the shapes of the models, without a GPU, and print its use of registers and memory.

    python tools/compile_triton.py [--capability 80] [--quick]

Prints one line per kernel and configuration: registers per thread, bytes spilled to local memory, shared memory. With
--quick, only some shapes and the first configuration of each kernel are compiled. Fails if a kernel does not compile,
or needs more shared memory than a GPU of that capability has.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from dsv2_local.kernels import triton as kernels
from dsv2_local.kernels.format import ExpertLayout, Format, latent_nbytes
from dsv2_local.kernels.layout import Matrix, planes
from dsv2_local.kernels.metadata import AttentionMetadata

# For a GPU of each compute capability: the number of multiprocessors, and bytes of shared memory per program.
GPUS = {80: (108, 166_912), 86: (28, 101_376), 89: (128, 101_376), 90: (132, 232_448), 120: (170, 101_376)}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoGpu:
    """A driver that claims a GPU of the given compute capability; it is enough for compiling."""

    def __init__(self, capability: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=0: 0


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", output).groups()
    return int(registers), int(stack)


def compile_instead_of_launching(quick: bool, shared_memory: int) -> None:
    """Patch Triton so that a launch only compiles and prints; autotuned kernels do so for all their configurations.

    A kernel that needs more than `shared_memory` bytes ends the program.
    """
    launch, reported = JITFunction.run, set()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in reported:
            reported.add(kernel.hash)
            registers, spilled = usage(kernel.asm["cubin"])
            meta, shape = kernel.metadata, {name: kwargs[name] for name in kwargs if name.isupper()}
            print(
                f"{self.__name__:14} {registers:3} registers, {spilled:4} B spilled, {meta.shared / 1024:5.1f} KiB "
                f"shared, {meta.num_warps} warps, {meta.num_stages} stages, {shape}"
            )
            if meta.shared > shared_memory:
                sys.exit(
                    f"{self.__name__} needs more shared memory than the {shared_memory / 1024:.0f} KiB of this GPU"
                )
        return kernel

    def run_all(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        for config in self.configs[:1] if quick else self.configs:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = run, run_all


def zeros(format: Format, rows: int, cols: int) -> Matrix:
    return Matrix(
        format, rows, cols, *(torch.zeros(plane.shape, dtype=plane.dtype) for plane in planes(format, rows, cols))
    )


def activations(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def call_products(quick: bool) -> None:
    for format in (Format.NF4,) if quick else (Format.NF4, Format.INT8):
        wide, tall = zeros(format, 256, 2048), zeros(format, 2048, 256)
        for tokens in (1, 512) if quick else (1, 4, 16, 512):
            kernels.swiglu(activations(tokens, 2048), wide, wide, tall)
        kernels.dequantize(wide, torch.bfloat16)
        kernels.embedding(torch.zeros(3, dtype=torch.int64), wide, torch.bfloat16)


def call_experts(quick: bool) -> None:
    layout = ExpertLayout(Format.NF4, 2048, 1408)
    records = torch.zeros(8, layout.nbytes, dtype=torch.uint8)
    for tokens in (16, 256) if quick else (1, 16, 256):
        ids, weights = torch.zeros(tokens, 6, dtype=torch.int64), torch.zeros(tokens, 6)
        kernels.experts(activations(tokens, 2048), records, layout, ids, weights)


def call_attention(quick: bool) -> None:
    N, P, C, V = 128, 64, 512, 128
    for H in (16,) if quick else (16, 128):
        w_uk, w_uv = zeros(Format.INT8, H * C, N), zeros(Format.INT8, H * V, C)
        for counts, absorbed in (([1], True), ([200], False), ([1] * 16, True), ([5], True)):
            rotation = torch.zeros(sum(counts), P // 2, dtype=torch.complex64)
            metadata = AttentionMetadata.of(
                torch.zeros(len(counts), 65, dtype=torch.int64), counts, [absorbed] * len(counts)
            )
            q, bytes_ = activations(sum(counts), H, N + P), latent_nbytes(C, P)
            for latents in (activations(64, 64, C + P), torch.zeros(64, 64, bytes_, dtype=torch.uint8)):
                kernels.attention(q, rotation, latents, metadata, w_uk, w_uv, 0.1)


def call_rows() -> None:
    x, rotation = activations(4, 2048), torch.zeros(4, 32, dtype=torch.complex64)
    kernels.rms_norm(x, torch.ones(2048), 1e-6)
    kernels.add_rms_norm(x, x, torch.ones(2048), 1e-6)
    for latents in (activations(2, 64, 576), torch.zeros(2, 64, latent_nbytes(512, 64), dtype=torch.uint8)):
        metadata = AttentionMetadata.of(torch.zeros(2, 3, dtype=torch.int64), [3, 1], [True, True])
        kernels.write_latents(latents, metadata, x[:, :576], x[0, :512], 1e-6, rotation)
    for groups, method in ((1, "greedy"), (8, "group_limited_greedy")):
        config: Any = SimpleNamespace(
            num_experts_per_tok=6, topk_method=method, n_group=groups, topk_group=3, norm_topk_prob=False,
            routed_scaling_factor=16.0,
        )  # fmt: skip
        kernels.route(x, torch.zeros(160, 2048), config)
    kernels.top_candidates(torch.zeros(1, 102_400), torch.zeros(1, 2))
    chosen = torch.zeros(1, 6, dtype=torch.int64)
    kernels.to_host(activations(1, 2048), chosen, torch.zeros(1, 2048), torch.zeros_like(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=80, choices=GPUS)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    triton.runtime.driver.set_active(NoGpu(given.capability))
    compile_instead_of_launching(given.quick, GPUS[given.capability][1])
    launch = {"PDL": True, "launch_pdl": True} if given.capability >= 90 else {"PDL": False}
    for module in ("linear", "experts", "rows", "top_candidates", "latents", "attention"):
        part: Any = sys.modules[f"dsv2_local.kernels.triton.{module}"]
        part.processors, part.shared_memory = (lambda device, is_=is_: is_ for is_ in GPUS[given.capability])
        part.pdl_arguments = lambda device: launch
    for call in (call_products, call_experts, call_attention):
        call(given.quick)
    call_rows()


if __name__ == "__main__":
    main()
