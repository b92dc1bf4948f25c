"""The one place that chooses an implementation of each kernel; the model calls these and nothing below.

On a GPU that is Triton, without it bitsandbytes, on the CPU the native library where it was compiled and knows the
format, else the torch reference.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.kernels import cpu, reference
from dsv2_local.kernels.cpu.recording import Recording
from dsv2_local.kernels.format import CacheDtype, ExpertLayout, Format
from dsv2_local.kernels.layout import Matrix, planes
from dsv2_local.machine.numa import spread_memory
from dsv2_local.machine.resources import Threads, choose_threads

__all__ = [
    "add",
    "add_rms_norm",
    "attention",
    "cache_dtype",
    "capturable",
    "combine",
    "embedding",
    "expert_outputs",
    "experts",
    "gpu_notice",
    "linear",
    "recording",
    "rms_norm",
    "route",
    "set_threads",
    "slow_notice",
    "swiglu",
    "top_candidates",
    "use",
    "variant",
    "write_latents",
]  # fmt: skip

RAM = torch.device("cpu")
_REFERENCE = cast(cpu.Kernels, reference)
_MODULES = {
    cpu.REFERENCE: "dsv2_local.kernels.reference",
    cpu.TRITON: "dsv2_local.kernels.triton",
    cpu.BITSANDBYTES: "dsv2_local.kernels.bnb",
}


def variant() -> str:
    """The name of the kernels in use."""
    return native.variant if (native := cpu.kernels()) else cpu.asked() or cpu.REFERENCE


def slow_notice() -> str | None:
    """One line on how to get the native kernels, where they are missing unasked."""
    if cpu.libraries() or cpu.kernels():
        return None
    return (
        "the native CPU kernels were not compiled, so plain torch computes, 50 times slower; install a C++ compiler "
        "(Debian: apt install g++) and this package again"
    )


def gpu_notice(where: torch.device) -> str | None:
    """One line on what computes on this device, where that is a GPU and Triton is missing."""
    if where.type != "cuda" or _installed() == cpu.TRITON:
        return None
    if _installed() == cpu.BITSANDBYTES:
        return (
            "Triton is not installed, so bitsandbytes' 4-bit kernels and plain torch compute on the GPU, slower; "
            "pip install 'triton>=3.5'"
        )
    return (
        "Triton is not installed, so plain torch computes on the GPU, far slower; pip install 'triton>=3.5', or "
        "bitsandbytes where there is no Triton"
    )


def set_threads(requested: int | None, format: Format) -> Threads:
    """Compute with this many threads; None: one a physical core that this process may use. Call it before loading.

    Memory is spread over the NUMA nodes of the threads' cores.
    Where the native kernels do the work of weights in `format`, torch is left with one thread: two pools on the same
    cores would wait for each other.
    """
    threads = choose_threads(requested)
    spread_memory(threads.cpus or os.sched_getaffinity(0))
    native = cpu.kernels()
    if native:
        native.set_threads(threads)
    torch.set_num_threads(1 if native and format in cpu.FORMATS else threads.count)
    return threads


def use(where: torch.device) -> None:
    """Launch what follows on this device."""
    if where.type == "cuda":
        torch.cuda.set_device(where)


def capturable(where: torch.device) -> bool:
    """Whether steps on this device can be captured in graphs: all but Triton's kernels ask the device for numbers."""
    return where.type == "cuda" and _on_gpus() == cpu.TRITON


def cache_dtype(kv_b: Format, dtype: torch.dtype, asked: CacheDtype, where: torch.device = RAM) -> CacheDtype:
    """How latents will be kept: as asked, but where the torch reference computes in fp32 it keeps fp32 for bf16.

    The native kernels compute in RAM, where they know the format of both halves of kv_b.
    """
    native = where == RAM and cpu.kernels() and kv_b in cpu.FORMATS
    return CacheDtype.FP32 if asked is CacheDtype.BF16 and not native and dtype == torch.float32 else asked


def recording() -> Recording | None:
    """What can note a step's calls of kernels and make them again, where there are native ones."""
    native = cpu.kernels()
    return native.recording() if native else None


def _kernels(x: Tensor, format: Format | None = None) -> cpu.Kernels:
    """Who computes on x with weights of this format (None: with none), or a module that has the same functions.

    On a GPU the module that `_on_gpus` names; in RAM `kernels.cpu`, where it was compiled and knows the format; else
    `reference`, or what $DSV2_KERNELS names.
    """
    if not x.is_cpu:
        return _module(_on_gpus())
    native = cpu.kernels()
    if native is None:
        return _module(cpu.asked() or cpu.REFERENCE)
    return native if format is None or format in cpu.FORMATS else _REFERENCE


def _on_gpus() -> str:
    """The name of the kernels for GPUs; bitsandbytes' can be asked for, since Triton mostly comes with torch."""
    return cpu.BITSANDBYTES if cpu.asked() == cpu.BITSANDBYTES else _installed()


@cache
def _installed() -> str:
    """The best kernels for GPUs that are installed."""
    return next((name for name in (cpu.TRITON, cpu.BITSANDBYTES) if find_spec(name)), cpu.REFERENCE)


@cache
def _module(name: str) -> cpu.Kernels:
    """The module of these kernels, imported when there is need of it."""
    return cast(cpu.Kernels, import_module(_MODULES[name]))


def quantize(weight: Tensor, format: Format, reference: Callable[[Tensor], Matrix]) -> Matrix:
    """Quantise [R, C] to nf4 or int8, on the calling thread; `reference` does it if there are no native kernels."""
    native = cpu.kernels()
    if native is None:
        return reference(weight)
    rows, cols = weight.shape
    parts = [torch.empty(plane.shape, dtype=plane.dtype) for plane in planes(format, rows, cols)]
    matrix = Matrix(format, rows, cols, *parts)
    native.quantize(weight, matrix)
    return matrix


def read(data: Tensor) -> None:
    """Read contiguous `data` once with all CPU threads and discard it, to measure the memory's bandwidth."""
    if native := cpu.kernels():
        native.read(data)
    else:
        data.view(-1)[: data.nbytes // 8 * 8].view(torch.int64).sum()


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [T, C] · weightᵀ -> [T, R]."""
    return _kernels(x, weight.format).linear(x, weight)


def embedding(ids: Tensor, weight: Matrix, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int64 [T]) of the embedding -> [T, D]."""
    return _kernels(ids, weight.format).embedding(ids, weight, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D] / sqrt(mean(x²) + eps) · weight (fp32 [D]), in fp32."""
    return _kernels(x).rms_norm(x, weight, eps)


def swiglu(x: Tensor, gate: Matrix, up: Matrix, down: Matrix) -> Tensor:
    """down(silu(gate(x)) · up(x)) for x [T, D] -> [T, D]."""
    return _kernels(x, down.format).swiglu(x, gate, up, down)


def route(x: Tensor, gate: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Choose the experts; see `reference.route`."""
    return _kernels(x).route(x, gate, config)


def experts(x: Tensor, records: Tensor, layout: ExpertLayout, ids: Tensor, weights: Tensor) -> Tensor:
    """The routed half of a mixture; see `reference.experts`."""
    return _kernels(x, layout.format).experts(x, records, layout, ids, weights)


def expert_outputs(
    x: Tensor, records: Tensor, layout: ExpertLayout, tokens: Tensor, slots: Tensor, out: Tensor
) -> None:
    """What single experts make of single tokens; see `reference.expert_outputs`."""
    _kernels(x, layout.format).expert_outputs(x, records, layout, tokens, slots, out)


def combine(outputs: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, y: Tensor) -> None:
    """Add up experts' outputs; see `reference.combine`."""
    _kernels(y).combine(outputs, rows, ids, weights, y)


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + other, and its norm; see `reference.add_rms_norm`."""
    return _kernels(x).add_rms_norm(x, other, weight, eps)


def top_candidates(logits: Tensor, limits: Tensor) -> Tensor:
    """The likeliest tokens of distributions on a GPU; see `reference.top_candidates`."""
    return _kernels(logits).top_candidates(logits, limits)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of one shape."""
    return _kernels(a).add(a, b)


def write_latents(
    latents: Tensor, block_table: Tensor, kv_a: Tensor, weight: Tensor, eps: float, rotation: Tensor
) -> None:
    """Fill the next rows of a sequence in a layer's cache; see `reference.write_latents`."""
    chosen = _kernels(kv_a)
    if latents.dtype not in chosen.CACHES:
        chosen = _REFERENCE
    chosen.write_latents(latents, block_table, kv_a, weight, eps, rotation)


def attention(
    q: Tensor, rotation: Tensor, latents: Tensor, block_table: Tensor, w_uk: Matrix, w_uv: Matrix, scale: float
) -> Tensor:
    """Latent attention in the form that takes fewer operations; see `reference.attention`.

    Per head and cached position, absorbed attention does T·(2C + P) multiplications; the materialised form
    T·(N + P + V) and C·(N + V) once to rebuild key and value.
    """
    T, N, C, V = len(q), w_uk.cols, w_uv.cols, w_uv.rows // q.shape[1]
    P = q.shape[2] - N
    absorb = T * (2 * C + P) <= T * (N + P + V) + C * (N + V)
    chosen = _kernels(q, w_uk.format)
    # The products of one head take whole groups of 8 rows.
    if C % 8 or V % 8 or latents.dtype not in chosen.CACHES:
        chosen = _REFERENCE
    return chosen.attention(q, rotation, latents, block_table, w_uk, w_uv, scale, absorb)
