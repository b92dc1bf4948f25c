"""The native CPU kernels: one shared library per instruction set, called through ctypes.

Same functions as `kernels.reference`, which explains the shapes. Inputs and outputs are float32 (other types are cast).
Matrix products quantise their input to int8 in blocks of 64, which costs 0.7 % of the result's norm on Gaussian numbers
with nf4 weights, 0.6 % with int8 weights. The KV cache is bfloat16 or 8-bit. Calls release the GIL while they run.
"""

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.errors import InputError
from dsv2_local.kernels import reference
from dsv2_local.kernels.cpu.recording import ActiveRecording, Recording
from dsv2_local.kernels.format import ExpertLayout, Format
from dsv2_local.kernels.layout import Matrix
from dsv2_local.kernels.metadata import AttentionMetadata
from dsv2_local.machine.resources import Threads, choose_threads, cpu_features

_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
# From best to worst, with the CPU features that each needs (the compiler flags are in setup.py).
VARIANTS = {
    "avx512bf16": _AVX512 | {"avx512_bf16", "avx512vbmi"},
    "avx512": _AVX512,
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}
REFERENCE, TRITON, BITSANDBYTES = "reference", "triton", "bitsandbytes"
VARIABLE = "DSV2_KERNELS"

SPIN_BESIDE_GPU = 2000  # microseconds
FORMATS = {Format.NF4: 0, Format.INT8: 1}
CACHES = {torch.bfloat16: 0, torch.uint8: 1}  # `LatentDtype` in latents.hpp


class _Matrix(ctypes.Structure):
    """`Matrix` in matrix.hpp."""

    _fields_ = (("codes", c_void_p), ("scales", c_void_p), ("rows", c_int64), ("cols", c_int64), ("format", c_int32))


_M, _P, _I, _F = POINTER(_Matrix), c_void_p, c_int64, c_float
# The prototypes in api.hpp, without the "dsv2_" of the names; those that return something are in _RESULTS too.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "linear": (_P, _I, _I, _M, _P),
    "swiglu": (_P, _I, _M, _M, _M, _P),
    "experts": (_P, _I, _P, _I, _I, c_int32, _I, _I, _P, _P, _I, _P),
    "expert_outputs": (_P, _I, _P, _I, _I, c_int32, _I, _I, _P, _P, _I, _P),
    "combine": (_P, _I, _I, _I, _P, _P, _P, _P),
    "attention": (_P, _P, _P, c_int32, _P, _I, _P, _P, _I, _M, _M, _F, _I, _I, _P),
    "rms_norm": (_P, _I, _I, _P, _F, _P),
    "add": (_P, _P, _I, _P),
    "latents": (_P, _I, _I, _P, _F, _P, _P, _I, _P, _I, _P, c_int32),
    "route": (_P, _I, _I, _P, _I, _I, _I, _I, c_int32, _F, _P, _P),
    "embedding": (_P, _I, _M, _P),
    "quantize_nf4": (_P, _I, _I, _P, _P),
    "quantize_int8": (_P, _I, _I, _P, _P),
    "recordable": (_I,),
    "replay": (_P, _I, _P),
    "set_threads": (c_int32, POINTER(c_int32)),
    "set_spin": (_I,),
    "read": (_P, _I),
}
_RESULTS: dict[str, Any] = {"recordable": c_char_p, "read": c_uint64}


def _input(x: Tensor) -> Tensor:
    """x as contiguous float32. Decoding calls this hundreds of times per token, so it avoids needless torch calls."""
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


def _output(y: Tensor, like: Tensor) -> Tensor:
    return y if y.dtype is like.dtype else y.to(like.dtype)


def _struct(matrix: Matrix) -> "ctypes._Pointer[_Matrix]":
    """The C struct of a matrix. It is cached in the matrix, whose tensors never move."""
    struct = matrix.__dict__.get("_struct")
    if struct is None:
        assert matrix.scales is not None
        codes, scales = matrix.codes.data_ptr(), matrix.scales.data_ptr()
        view = _Matrix(codes, scales, matrix.rows, matrix.cols, FORMATS[matrix.format])
        struct = matrix.__dict__["_struct"] = ctypes.pointer(view)
    return struct


def _rows_of(metadata: AttentionMetadata) -> tuple[int, int]:
    """The addresses of the offsets and of the forms of attention; the metadata keeps both alive."""
    absorbed = metadata.__dict__.get("_absorbed")
    if absorbed is None:
        absorbed = metadata.__dict__["_absorbed"] = (c_int64 * len(metadata.absorbed))(*metadata.absorbed)
    return metadata.offsets.data_ptr(), ctypes.addressof(absorbed)


class Kernels:
    """One variant of the library, loaded, with its thread pool; the kernels are explained in `kernels.reference`."""

    CACHES = tuple(CACHES)
    to_host = staticmethod(reference.to_host)
    top_candidates = staticmethod(reference.top_candidates)  # only tests call it: on the CPU, samplers use all logits

    def __init__(self, variant: str, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.variant = variant
        self._active = ActiveRecording()
        self._functions = {name: getattr(library, "dsv2_" + name) for name in _SIGNATURES}
        for name, function in self._functions.items():
            function.argtypes, function.restype = _SIGNATURES[name], _RESULTS.get(name)
        names = takewhile(bool, map(self._functions["recordable"], count()))
        self._recordable = {name.decode(): number for number, name in enumerate(names)}

    def _call(self, name: str, *arguments: Any) -> None:
        self._functions[name](*arguments)
        if recording := self._active.recording:
            recording.add(name, _SIGNATURES[name], arguments)

    def address(self, name: str) -> int:
        """Address of a function of api.hpp, named without "dsv2_"."""
        return ctypes.cast(self._functions[name], c_void_p).value or 0

    def stay_awake(self) -> None:
        """Let idle threads spin for up to two milliseconds, when the GPU computes between any two calls."""
        self._call("set_spin", SPIN_BESIDE_GPU)

    def recording(self) -> Recording:
        """A new recording, to be entered while a step runs."""
        return Recording(self._active, self._functions["replay"], self._recordable)

    def set_threads(self, threads: Threads) -> None:
        """Replace the thread pool. The thread that calls a kernel counts as the first; only the others are pinned."""
        cpus = (c_int32 * threads.count)(*threads.cpus) if threads.cpus else None
        self._call("set_threads", threads.count, cpus)

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        x_ = _input(x)
        y = torch.empty(x.shape[0], weight.rows)
        self._call("linear", x_.data_ptr(), x.shape[0], 1, _struct(weight), y.data_ptr())
        return _output(y, x)

    def swiglu(self, x: Tensor, gate: Matrix, up: Matrix, down: Matrix) -> Tensor:
        x_ = _input(x)
        y = torch.empty(x.shape[0], down.rows)
        self._call("swiglu", x_.data_ptr(), x.shape[0], _struct(gate), _struct(up), _struct(down), y.data_ptr())
        return _output(y, x)

    def experts(self, x: Tensor, records: Tensor, layout: ExpertLayout, ids: Tensor, weights: Tensor) -> Tensor:
        x_, ids, weights = _input(x), ids.contiguous(), _input(weights)
        y = torch.empty_like(x_)
        self._call(
            "experts", x_.data_ptr(), x.shape[0], records.data_ptr(), records.stride(0), records.shape[0],
            FORMATS[layout.format], layout.hidden_size, layout.moe_intermediate_size, ids.data_ptr(),
            weights.data_ptr(), ids.shape[1], y.data_ptr(),
        )  # fmt: skip
        return _output(y, x)

    def expert_outputs(
        self,
        x: Tensor,
        records: Tensor,
        layout: ExpertLayout,
        tokens: Tensor,
        slots: Tensor,
        out: Tensor,
        distinct: int | None = None,
    ) -> None:
        x_ = _input(x)
        self._call(
            "expert_outputs", x_.data_ptr(), x.shape[0], records.data_ptr(), records.stride(0), records.shape[0],
            FORMATS[layout.format], layout.hidden_size, layout.moe_intermediate_size, tokens.data_ptr(),
            slots.data_ptr(), len(tokens), out.data_ptr(),
        )  # fmt: skip

    def sorted_expert_outputs(
        self,
        x: Tensor,
        records: Tensor,
        layout: ExpertLayout,
        tokens: Tensor,
        runs: Sequence[tuple[int, int]],
        out: Tensor,
    ) -> None:
        slots, counts = (torch.tensor(column) for column in zip(*runs, strict=True))
        self.expert_outputs(x, records, layout, tokens, slots.repeat_interleave(counts), out)

    def combine(
        self, outputs: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, y: Tensor, first: int | None = None
    ) -> None:
        rows = rows if first is None else reference.part_of_rows(rows, first, len(outputs))
        self._call(
            "combine", outputs.data_ptr(), rows.shape[0], rows.shape[1], y.shape[1], rows.data_ptr(), ids.data_ptr(),
            weights.data_ptr(), y.data_ptr(),
        )  # fmt: skip

    def attention(
        self,
        q: Tensor,
        rotation: Tensor,
        latents: Tensor,
        metadata: AttentionMetadata,
        w_uk: Matrix,
        w_uv: Matrix,
        scale: float,
    ) -> Tensor:
        q_ = _input(q)
        T, H, _ = q.shape
        out = torch.empty(T, w_uv.rows)
        offsets, absorbed = _rows_of(metadata)
        self._call(
            "attention", q_.data_ptr(), rotation.data_ptr(), latents.data_ptr(), CACHES[latents.dtype],
            metadata.block_tables.data_ptr(), metadata.block_tables.shape[1], offsets, absorbed, len(metadata.counts),
            _struct(w_uk), _struct(w_uv), scale, H, 2 * rotation.shape[1], out.data_ptr(),
        )  # fmt: skip
        return _output(out, q)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_ = _input(x)
        y = torch.empty_like(x_)
        self._call("rms_norm", x_.data_ptr(), x.shape[0], x.shape[1], weight.data_ptr(), eps, y.data_ptr())
        return _output(y, x)

    def add_rms_norm(self, x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = self.add(x, other)
        return total, self.rms_norm(total, weight, eps)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        a_, b_ = _input(a), _input(b)
        y = torch.empty_like(a_)
        self._call("add", a_.data_ptr(), b_.data_ptr(), a_.numel(), y.data_ptr())
        return _output(y, a)

    def write_latents(
        self,
        latents: Tensor,
        metadata: AttentionMetadata,
        kv_a: Tensor,
        weight: Tensor,
        eps: float,
        rotation: Tensor,
    ) -> None:
        kv_a_, (offsets, _) = _input(kv_a), _rows_of(metadata)
        self._call(
            "latents", kv_a_.data_ptr(), weight.shape[0], kv_a.shape[1] - weight.shape[0], weight.data_ptr(), eps,
            rotation.data_ptr(), metadata.block_tables.data_ptr(), metadata.block_tables.shape[1], offsets,
            len(metadata.counts), latents.data_ptr(), CACHES[latents.dtype],
        )  # fmt: skip

    def route(self, x: Tensor, gate: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        x_, K = _input(x), config.num_experts_per_tok
        ids = torch.empty(x.shape[0], K, dtype=torch.int64)
        weights = torch.empty(x.shape[0], K)
        grouped = config.topk_method == "group_limited_greedy"
        self._call(
            "route", x_.data_ptr(), x.shape[0], x.shape[1], gate.data_ptr(), gate.shape[0], K,
            config.n_group if grouped else 1, config.topk_group, config.norm_topk_prob, config.routed_scaling_factor,
            ids.data_ptr(), weights.data_ptr(),
        )  # fmt: skip
        return ids, weights

    def embedding(self, ids: Tensor, weight: Matrix, dtype: torch.dtype) -> Tensor:
        y = torch.empty(ids.shape[0], weight.cols)
        self._call("embedding", ids.data_ptr(), ids.shape[0], _struct(weight), y.data_ptr())
        return y if dtype is y.dtype else y.to(dtype)

    def quantize(self, weight: Tensor, into: Matrix) -> None:
        """Quantise [R, C] into the planes of `into`, on the calling thread: callers can quantise slices in parallel."""
        x, (codes, scales) = _input(weight), into.parts
        name = f"quantize_{into.format}"
        self._call(name, x.data_ptr(), into.rows, into.cols, codes.data_ptr(), scales.data_ptr())

    def read(self, data: Tensor) -> None:
        """Read contiguous `data` once with all threads and discard it, to measure the memory bandwidth."""
        self._call("read", data.data_ptr(), data.nbytes)


def libraries() -> dict[str, Path]:
    """The variants that were compiled when the package was installed, and their files."""
    here = Path(__file__).parent
    paths = {variant: here / f"_{variant}{EXTENSION_SUFFIXES[0]}" for variant in VARIANTS}
    return {variant: path for variant, path in paths.items() if path.is_file()}


def usable() -> list[str]:
    """The compiled variants that this CPU can run, best first."""
    features = cpu_features()
    return [variant for variant in libraries() if VARIANTS[variant] <= features]


def asked() -> str | None:
    """The kernels that $DSV2_KERNELS names, if it is set; "triton" and "bitsandbytes" are for tests on the CPU."""
    return os.environ.get(VARIABLE) or None


@cache
def kernels() -> Kernels | None:
    """The native kernels to use: the variant that $DSV2_KERNELS names, else the best one that this CPU can run.

    None if no variant is usable, or if the variable names other kernels (reference, triton, bitsandbytes).

    Raises:
        InputError: $DSV2_KERNELS names a variant that is not compiled or that this CPU cannot run.
    """
    wanted, found = asked(), usable()
    if wanted in (REFERENCE, TRITON, BITSANDBYTES) or (wanted is None and not found):
        return None
    if wanted is not None and wanted not in found:
        raise InputError(
            f"{VARIABLE}={wanted} is not available: it is not compiled, or this CPU cannot run it; "
            f"use one of {', '.join([*found, REFERENCE])}"
        )
    variant = wanted or found[0]
    loaded = Kernels(variant, libraries()[variant])
    loaded.set_threads(choose_threads(None))
    return loaded
