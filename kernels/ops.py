"""Kernel dispatch: the model calls these functions, and only they choose an implementation.

On a GPU that is Triton, else bitsandbytes if it is installed; on the CPU the native library, if it is compiled and
supports the weight format; otherwise the PyTorch reference. $DSV2_KERNELS overrides the choice.
"""

import os
from collections.abc import Callable, Sequence
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
from dsv2_local.kernels.metadata import AttentionMetadata
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
    "sorted_expert_outputs",
    "swiglu",
    "to_host",
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
    """A line of advice if the native CPU kernels are missing and were not turned off; else None."""
    if cpu.libraries() or cpu.kernels():
        return None
    return (
        "the native CPU kernels are not compiled, so plain PyTorch computes, about 50 times slower; install a C++ "
        "compiler (Debian and Ubuntu: apt install g++), then reinstall dsv2-local"
    )


def gpu_notice(device: torch.device) -> str | None:
    """A line on the slower kernels in use if the device is a GPU and Triton is not installed; else None."""
    if device.type != "cuda" or _installed() == cpu.TRITON:
        return None
    if _installed() == cpu.BITSANDBYTES:
        return (
            "Triton is not installed, so bitsandbytes' 4-bit kernels and plain PyTorch compute on the GPU, which is "
            "slower; pip install 'triton>=3.5'"
        )
    return (
        "Triton is not installed, so plain PyTorch computes on the GPU, which is far slower; "
        "pip install 'triton>=3.5', or bitsandbytes if there is no Triton for this system"
    )


def set_threads(requested: int | None, format: Format) -> Threads:
    """Set the number of CPU threads; None: one per physical core that this process may use. Call it before loading.

    Memory is interleaved over the NUMA nodes of these cores. If the native kernels support weights in `format`, torch
    gets a single thread, since two thread pools on the same cores would slow each other down.

    Returns:
        The threads, with the cores that they are pinned to.
    """
    threads = choose_threads(requested)
    spread_memory(threads.cpus or os.sched_getaffinity(0))
    native = cpu.kernels()
    if native:
        native.set_threads(threads)
    torch.set_num_threads(1 if native and format in cpu.FORMATS else threads.count)
    return threads


def use(device: torch.device) -> None:
    """Make a GPU the current device, on which kernels are launched; does nothing for the CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def capturable(device: torch.device) -> bool:
    """Whether steps on this device can be captured in CUDA graphs: only Triton's kernels never wait for the device."""
    return device.type == "cuda" and _on_gpus() == cpu.TRITON


def cache_dtype(kv_b: Format, dtype: torch.dtype, requested: CacheDtype, device: torch.device = RAM) -> CacheDtype:
    """The type of the KV cache: as requested, but fp32 instead of bf16 if the reference computes attention in fp32.

    `kv_b` is the weight format of the kv_b projection, `dtype` the type of activations. On the CPU the native kernels
    compute attention if they support that format.
    """
    native = device == RAM and cpu.kernels() and kv_b in cpu.FORMATS
    return CacheDtype.FP32 if requested is CacheDtype.BF16 and not native and dtype == torch.float32 else requested


def recording() -> Recording | None:
    """A new recording for a step's kernel calls, or None if there are no native kernels."""
    native = cpu.kernels()
    return native.recording() if native else None


def _kernels(x: Tensor, format: Format | None = None) -> cpu.Kernels:
    """The implementation for x and weights in this format (None: a kernel without weights).

    It is a `cpu.Kernels` or a module with the same functions. On a GPU: what `_on_gpus` names. In RAM: the native
    kernels, if they are compiled and support the format; else `reference`, or what $DSV2_KERNELS names.
    """
    if not x.is_cpu:
        return _module(_on_gpus())
    native = cpu.kernels()
    if native is None:
        return _module(cpu.asked() or cpu.REFERENCE)
    return native if format is None or format in cpu.FORMATS else _REFERENCE


def _on_gpus() -> str:
    """The name of the kernels for GPUs. $DSV2_KERNELS can choose bitsandbytes', since torch mostly brings Triton."""
    return cpu.BITSANDBYTES if cpu.asked() == cpu.BITSANDBYTES else _installed()


@cache
def _installed() -> str:
    """The name of the best installed kernels for GPUs."""
    return next((name for name in (cpu.TRITON, cpu.BITSANDBYTES) if find_spec(name)), cpu.REFERENCE)


@cache
def _module(name: str) -> cpu.Kernels:
    """The module of these kernels, imported on first use."""
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


def stay_awake() -> None:
    """Let idle threads of the CPU kernels spin for longer, when the GPU computes between any two of their calls."""
    if native := cpu.kernels():
        native.stay_awake()


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
    """Choose the experts of each token; see `reference.route`."""
    return _kernels(x).route(x, gate, config)


def experts(x: Tensor, records: Tensor, layout: ExpertLayout, ids: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the routed experts; see `reference.experts`."""
    return _kernels(x, layout.format).experts(x, records, layout, ids, weights)


def expert_outputs(
    x: Tensor,
    records: Tensor,
    layout: ExpertLayout,
    tokens: Tensor,
    slots: Tensor,
    out: Tensor,
    distinct: int | None = None,
) -> None:
    """The outputs of token-expert pairs; see `reference.expert_outputs`."""
    _kernels(x, layout.format).expert_outputs(x, records, layout, tokens, slots, out, distinct)


def sorted_expert_outputs(
    x: Tensor, records: Tensor, layout: ExpertLayout, tokens: Tensor, runs: Sequence[tuple[int, int]], out: Tensor
) -> None:
    """The outputs of token-expert pairs that are sorted by slot; see `reference.sorted_expert_outputs`."""
    _kernels(x, layout.format).sorted_expert_outputs(x, records, layout, tokens, runs, out)


def to_host(x: Tensor, ids: Tensor, host_x: Tensor, host_ids: Tensor) -> None:
    """Write the input of experts to page-locked RAM; see `reference.to_host`."""
    _kernels(x).to_host(x, ids, host_x, host_ids)


def combine(outputs: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, y: Tensor, first: int | None = None) -> None:
    """Add up the outputs of experts with their weights; see `reference.combine`."""
    _kernels(y).combine(outputs, rows, ids, weights, y, first)


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + other, and the RMSNorm of that; see `reference.add_rms_norm`."""
    return _kernels(x).add_rms_norm(x, other, weight, eps)


def top_candidates(logits: Tensor, limits: Tensor) -> Tensor:
    """The top candidates of each distribution, for sampling; see `reference.top_candidates`."""
    return _kernels(logits).top_candidates(logits, limits)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b for tensors of the same shape."""
    return _kernels(a).add(a, b)


def write_latents(
    latents: Tensor, metadata: AttentionMetadata, kv_a: Tensor, weight: Tensor, eps: float, rotation: Tensor
) -> None:
    """Append rows to the sequences of a step in a layer's KV cache; see `reference.write_latents`."""
    chosen = _kernels(kv_a)
    if latents.dtype not in chosen.CACHES:
        chosen = _REFERENCE
    chosen.write_latents(latents, metadata, kv_a, weight, eps, rotation)


def attention(
    q: Tensor, rotation: Tensor, latents: Tensor, metadata: AttentionMetadata, w_uk: Matrix, w_uv: Matrix, scale: float
) -> Tensor:
    """Latent attention of the sequences of a step; see `reference.attention`."""
    C, V = w_uv.cols, w_uv.rows // q.shape[1]
    chosen = _kernels(q, w_uk.format)
    # The native and Triton kernels divide the matrices among heads in whole groups of 8 rows.
    if C % 8 or V % 8 or latents.dtype not in chosen.CACHES:
        chosen = _REFERENCE
    return chosen.attention(q, rotation, latents, metadata, w_uk, w_uv, scale)


def most_absorbed(config: ModelConfig) -> int:
    """The most tokens of a sequence for which absorbed attention takes no more multiplications than the other form.

    Per head and cached position, the absorbed form takes T·(2C + P) of them, the materialised form T·(N + P + V), plus
    C·(N + V) to rebuild the key and the value.
    """
    C, rebuilt = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    return C * rebuilt // (2 * C - rebuilt) if rebuilt < 2 * C else 1 << 62
