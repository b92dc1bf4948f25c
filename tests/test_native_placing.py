"""Experts placed by native code, through a CUDA driver made of Python functions, against experts placed by Python."""

import ctypes
import random
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np
import pytest
import torch

from dsv2_local.errors import DeviceError
from dsv2_local.kernels import cpu, cuda, ops, reference
from dsv2_local.kernels.cuda import Driver, NativeCall, NativeReplay
from dsv2_local.kernels.graphs import _Captured, _joined
from dsv2_local.offload.balance import Costs, Watch
from dsv2_local.offload.device import NativeHandles
from dsv2_local.offload.expert_cache import ExpertCache, Policy
from dsv2_local.offload.expert_slots import ExpertSlots
from dsv2_local.offload.graph_experts import GraphBuffers, GraphExperts
from dsv2_local.offload.offloaded_experts import DeviceExperts
from dsv2_local.offload.plan_request import Mode
from dsv2_local.offload.simulated_device import SimulatedDevice
from tests.test_graph_experts import ImmediateGraph, batch
from tests.test_offload import EXPERTS, LAYERS, LAYOUT, PER_TOKEN, step
from tests.test_offload import records as records

pytestmark = pytest.mark.skipif(cuda.library() is None or cpu.kernels() is None, reason="not compiled")

MILLISECONDS = 2.0
COPY_START, COPY_END, COPIES, GRAPH = 11, 12, 13, 14
TYPES = {
    "set_context": CFUNCTYPE(c_int32, c_void_p),
    "launch_graph": CFUNCTYPE(c_int32, c_void_p, c_void_p),
    "synchronize": CFUNCTYPE(c_int32, c_void_p),
    "copy_to_device": CFUNCTYPE(c_int32, c_uint64, c_void_p, c_size_t, c_void_p),
    "record": CFUNCTYPE(c_int32, c_void_p, c_void_p),
    "wait": CFUNCTYPE(c_int32, c_void_p, c_void_p, c_uint32),
    "elapsed": CFUNCTYPE(c_int32, ctypes.POINTER(c_float), c_void_p, c_void_p),
}


class FakeDriver:
    """Copies at once, logs what happens to streams and events, and fails on request.

    Attributes:
        log: the calls except `set_context`, in order.
        failing: the name of the function that returns an error.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failing = ""
        self._functions = {name: TYPES[name](self._function(name)) for name in TYPES}
        self.table = Driver(**{name: ctypes.cast(call, c_void_p).value for name, call in self._functions.items()})

    def _function(self, name: str) -> Callable[..., int]:
        def call(*given: Any) -> int:
            if name == self.failing:
                return 700
            if name == "copy_to_device":
                ctypes.memmove(*given[:3])
            if name == "elapsed":
                given[0][0] = MILLISECONDS
            if name != "set_context":
                on_copies = given[-1] == COPIES
                self.log.append(f"{name} on copies" if on_copies else name)
            return 0

        return call


class FakeDevice(SimulatedDevice):
    """A simulated device that native code can use through a fake driver."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = FakeDriver()

    def native_handles(self) -> NativeHandles:
        return NativeHandles(self.driver.table, -1, 0, COPIES, COPY_START, COPY_END)


def device_experts(
    records: dict[int, torch.Tensor], device: SimulatedDevice, mode: Mode, slots: int, costs: Costs, policy: Policy
) -> DeviceExperts:
    buffer = 0 if mode is Mode.CPU else 2
    placed = ExpertSlots(device, LAYOUT, ExpertCache(slots, LAYERS, EXPERTS, policy), buffer)
    buffers = GraphBuffers.allocate(device, LAYOUT.hidden_size, PER_TOKEN)
    return DeviceExperts(placed, LAYOUT, records, mode, costs, buffers)


@pytest.fixture
def on_reference(monkeypatch):
    """The device computes with the reference, which skips negative slots; native code still uses the CPU's kernels."""
    monkeypatch.setattr(ops, "expert_outputs", reference.expert_outputs)


def run(experts: DeviceExperts, layer: int, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    assert experts.graph_buffers
    graph, capture = GraphExperts(experts, experts.graph_buffers, layer, *given), ImmediateGraph()
    graph.capture_hits(capture)
    return graph.capture_misses(capture)


STATE = "slot", "worth_of", "used", "steps", "counts", "owner", "slot_worth", "pinned", "clock", "age"
CASES = [
    (Mode.HYBRID, 0, Costs(1.0, 1.0, 0.5)),
    (Mode.HYBRID, 5, Costs(1.0, 0.5, 0.5)),
    (Mode.HYBRID, 5, Costs(1.0, 0.5, 0.5, start=4.0)),
    (Mode.HYBRID, 11, Costs(0.25, 1.0, 0.5, start=0.5)),
    (Mode.STREAM, 0, Costs(1.0, 1.0, 0.5)),
    (Mode.STREAM, 7, Costs(1.0, 1.0, 0.5)),
    (Mode.CPU, 0, Costs(1e9, 1.0, 1.0)),
]


@pytest.mark.parametrize(
    ("tokens", "policy", "mode", "slots", "costs"),
    [(tokens, Policy.LRFU, *case) for tokens in (1, 4) for case in CASES]
    + [(16, Policy.LRFU, *case) for case in CASES[2:5]]
    + [(tokens, policy, *CASES[3]) for tokens in (1, 2) for policy in Policy if policy is not Policy.LRFU],
)
def test_native_code_decides_as_python_does(records, on_reference, monkeypatch, policy, mode, slots, costs, tokens):
    monkeypatch.setattr(Watch, "correction", lambda self: None)  # times differ between the two
    rng = random.Random(slots)
    native = device_experts(records, FakeDevice(), mode, slots, costs, policy)
    python = device_experts(records, SimulatedDevice(), mode, slots, costs, policy)
    assert native.native
    assert python.native is None
    expected: dict[str, list[float]] = {"native": [], "python": []}
    for name, placed in (("native", native), ("python", python)):
        monkeypatch.setattr(placed._host_watch, "observe", lambda wanted, _, name=name: expected[name].append(wanted))
    for turn in range(12 if tokens == 1 else 5):
        for layer in records:
            given = batch(tokens, rng, rng.randint(1, tokens))
            ours, theirs = run(native, layer, given), run(python, layer, given)
            exact = reference.experts(given[0], records[layer], LAYOUT, *given[1:])
            assert (ours - exact).norm() < 0.05 * exact.norm(), turn
            assert (theirs - exact).norm() < 0.05 * exact.norm(), turn
            for name in STATE:
                a, b = (getattr(placed.slots.cache, name) for placed in (native, python))
                assert np.array_equal(a, b), (turn, layer, name)
            a, b = (placed.graph_buffers.of(tokens).host_slots for placed in (native, python))
            assert torch.equal(a[0], b[0])  # hits
            assert torch.equal(a[1] >= 0, b[1] >= 0)  # fetched, into slots or staging
            assert a[1].max() < max(1, len(native.slots.records))
            assert torch.equal(a[2], b[2])  # rows
            admitted = (a[1] >= 0) & (b[1] < slots)
            assert torch.equal(a[1][admitted], b[1][admitted])
    assert native.stats.hits == python.stats.hits
    assert native.stats.fetched_bytes == python.stats.fetched_bytes
    assert native.stats.host_experts == python.stats.host_experts
    layers = native.by_layer()
    assert layers == python.by_layer()
    assert [layer.layer for layer in layers] == list(records)
    assert sum(layer.hits for layer in layers) == native.stats.hits
    assert sum(layer.fetched for layer in layers) * LAYOUT.nbytes == native.stats.fetched_bytes
    assert sum(layer.cpu for layer in layers) == native.stats.host_experts
    assert sum(len(layer.resident) for layer in layers) == len(native.slots.cache)
    assert sum(expected["native"]) == pytest.approx(sum(expected["python"]))


def test_a_layer_waits_for_the_router_then_copies_then_waits_for_the_copies(records, on_reference):
    device = FakeDevice()
    experts = device_experts(records, device, Mode.HYBRID, 0, Costs(1.0, 1.0, 0.0), Policy.LRU)
    first, second = list(records)[:2]
    run(experts, first, step(1, random.Random(0)))
    placed = ["synchronize", "record on copies", "copy_to_device on copies", "record on copies", "copy_to_device"]
    finished = ["wait", "copy_to_device"]
    assert device.driver.log == placed + finished
    device.driver.log.clear()
    run(experts, second, step(1, random.Random(1)))  # the time of the copies before is read when they are done
    assert device.driver.log == [placed[0], "elapsed", *placed[1:], *finished]
    assert experts.stats.fetched_bytes == 2 * LAYOUT.nbytes
    assert experts.stats.fetch_seconds == pytest.approx(MILLISECONDS / 1e3)
    assert experts.stats.host_experts == 4
    assert experts.stats.host_seconds > 0


def test_costs_that_prove_wrong_are_corrected(records, on_reference):
    """A copy takes 2 ms here, and the costs say 1 s."""
    experts = device_experts(records, FakeDevice(), Mode.STREAM, 0, Costs(1.0, 1.0, 0.0), Policy.LRU)
    for _ in range(40):
        for layer in records:
            run(experts, layer, step(1, random.Random(0)))
    assert experts.corrected
    assert experts.costs.fetch == pytest.approx(MILLISECONDS / 1e3 / PER_TOKEN, rel=0.3)


@pytest.mark.parametrize("failing", ["synchronize", "record", "copy_to_device", "wait", "elapsed"])
def test_a_failing_driver_call_is_an_error(records, on_reference, failing):
    device = FakeDevice()
    experts = device_experts(records, device, Mode.HYBRID, 3, Costs(1.0, 1.0, 0.5), Policy.LRFU)
    run(experts, min(records), step(1, random.Random(3)))
    device.driver.failing = failing
    with pytest.raises(DeviceError, match="CUDA error 700 in a decode step"):
        run(experts, max(records), step(1, random.Random(4)))


def test_graphs_and_native_calls_are_joined_and_python_functions_are_not(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(cuda, "driver", lambda: driver.table)
    monkeypatch.setattr(cuda, "context", lambda device: 5)

    class Graph:
        def raw_cuda_graph_exec(self) -> int:
            return GRAPH

        def replay(self) -> None:
            driver.log.append("torch")

    def launched() -> NativeCall:
        found = cuda.launch(Graph(), -1)
        assert found
        return found

    graph: Any = _Captured(Graph(), -1)  # type: ignore[arg-type]
    parts = [graph, launched(), graph, lambda: driver.log.append("python"), graph]
    joined = _joined(parts)
    assert [isinstance(part, NativeReplay) for part in joined] == [True, False, True]
    for part in joined:
        part()
    assert driver.log == ["launch_graph"] * 3 + ["python"] + ["launch_graph"]
    driver.log.clear()
    for part in _joined([graph, lambda: driver.log.append("python")]):
        part()
    assert driver.log == ["torch", "python"]
