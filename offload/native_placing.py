"""Places the experts of few tokens in native code, as `graph_experts.GraphExperts` does in Python.

The code is `kernels/cuda/placing.cpp`. Python hands over addresses once, when a step is captured, and reads the
counters once per step.
"""

import ctypes
from ctypes import c_double, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dsv2_local.kernels import cpu, cuda
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.offload.balance import Costs
from dsv2_local.offload.device import NativeHandles
from dsv2_local.offload.expert_cache import HALF_LIFE, ExpertCache, Policy
from dsv2_local.offload.expert_slots import ExpertSlots

MAX_PAIRS = 1024  # token-expert pairs of a step; the same in placing.cpp
_POLICIES = {Policy.LRU: 0, Policy.LFU: 1, Policy.LFU_AGEING: 2, Policy.LRFU: 3}
_ARRAYS = (
    "slot", "worth_of", "used", "steps", "counts", "owner", "slot_worth", "pinned", "free", "free_count", "clock", "age"
)  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = (
        ("slots", c_int64), ("experts", c_int64), ("half_life", c_double), *((name, c_void_p) for name in _ARRAYS),
        ("policy", c_int32),
    )  # fmt: skip


class _Costs(ctypes.Structure):
    _fields_ = tuple((name, c_double) for name in ("fetch", "read", "token", "start"))


class _Done(ctypes.Structure):
    _fields_ = (
        ("fetched", c_int64), ("on_host", c_int64), ("fetch_seconds", c_double), ("fetch_expected", c_double),
        ("host_seconds", c_double), ("host_expected", c_double),
    )  # fmt: skip


class _Experts(ctypes.Structure):
    _fields_ = (
        ("driver", c_void_p), ("context", c_void_p), ("copies", c_void_p), ("copy_start", c_void_p),
        ("copy_end", c_void_p), ("records", c_uint64), ("nbytes", c_int64), ("chosen", c_int64), ("hidden", c_int64),
        ("intermediate", c_int64), ("ids", c_void_p), ("x", c_void_p), ("slot_table", c_void_p), ("sent", c_uint64),
        ("host_outputs", c_void_p), ("outputs", c_uint64), ("expert_outputs", c_void_p), ("cache", _Cache),
        ("costs", _Costs), ("done", _Done), ("staged", c_int64), ("format", c_int32), ("stream_all", c_int32),
        ("fetched", c_int64), ("on_host", c_int64), ("host_pairs", c_int64), ("host_cost", c_double),
        ("host_tokens", c_int64 * MAX_PAIRS), ("host_experts", c_int64 * MAX_PAIRS), ("copies_timed", c_int32),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("experts", c_void_p),
        ("number", c_int64),
        ("records", c_void_p),
        ("count", c_int64),
        ("tokens", c_int64),
    )


@dataclass(frozen=True)
class Done:
    """What native steps did.

    Attributes:
        fetched, on_host: experts copied, and experts computed by the CPU.
        fetch_seconds, host_seconds: how long that took.
        fetch_expected, host_expected: how long it should have taken by the costs.
    """

    fetched: int
    on_host: int
    fetch_seconds: float
    fetch_expected: float
    host_seconds: float
    host_expected: float


class Buffers(Protocol):
    """The tensors of `graph_experts.GraphBuffers` that native code reads and writes."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def x(self) -> Tensor: ...
    @property
    def host_slots(self) -> Tensor: ...
    @property
    def sent(self) -> Tensor: ...
    @property
    def host_outputs(self) -> Tensor: ...
    @property
    def outputs(self) -> Tensor: ...


class NativePlacing:
    """The experts of one device, as native code sees them."""

    def __init__(
        self, slots: ExpertSlots, layout: ExpertLayout, handles: NativeHandles, buffers: Buffers, stream_all: bool
    ) -> None:
        """Collect the addresses; `stream_all`: copy every missing expert, and compute none on the CPU."""
        kernels = cpu.kernels()
        assert kernels is not None
        self._keep: Any = slots, handles, buffers
        self._device = handles.device
        self._state = _Experts(
            ctypes.addressof(handles.driver), handles.context, handles.copies, handles.copy_start, handles.copy_end,
            slots.records.data_ptr(), layout.nbytes, buffers.ids.shape[1], layout.hidden_size,
            layout.moe_intermediate_size, buffers.ids.data_ptr(), buffers.x.data_ptr(), buffers.host_slots.data_ptr(),
            buffers.sent.data_ptr(), buffers.host_outputs.data_ptr(), buffers.outputs.data_ptr(),
            kernels.address("expert_outputs"), _cache(slots.cache), staged=slots.staged,
            format=cpu.FORMATS[layout.format], stream_all=stream_all,
        )  # fmt: skip

    def calls(self, layer: int, records: Tensor, tokens: int) -> tuple[cuda.NativeCall, cuda.NativeCall]:
        """The calls before the graph of the cached experts of a layer, and before that of the copied experts.

        Args:
            layer: index of the layer in the model.
            records: uint8 [E, layout.nbytes] in RAM.
            tokens: tokens of the step.
        """
        argument = _Layer(ctypes.addressof(self._state), layer, records.data_ptr(), len(records), tokens)
        argument.keep = self, records  # both live as long as the calls
        place, finish = (cuda.NativeCall(cuda.address(name), argument, self._device) for name in FUNCTIONS)
        return place, finish

    def set_costs(self, costs: Costs) -> None:
        """The costs by which the following steps divide missing experts between copies and the CPU."""
        self._state.costs = _Costs(costs.fetch, costs.read, costs.token, costs.start)

    def take_done(self) -> Done:
        """What was done since this was called last."""
        done = self._state.done
        taken = Done(*(getattr(done, name) for name, _ in _Done._fields_))
        self._state.done = _Done()
        return taken


FUNCTIONS = ("dsv2_place", "dsv2_finish")


def usable(layout: ExpertLayout, pairs: int) -> bool:
    """Whether native code can place that many token-expert pairs, and the CPU's native kernels can compute them."""
    native = cuda.library() is not None and cpu.kernels() is not None
    return native and layout.format in cpu.FORMATS and pairs <= MAX_PAIRS


def _cache(cache: ExpertCache) -> _Cache:
    arrays = (getattr(cache, name).ctypes.data for name in _ARRAYS)
    return _Cache(cache.slots, cache.experts, HALF_LIFE, *arrays, _POLICIES[cache.policy])
