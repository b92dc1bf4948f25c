"""Experts of a captured step on simulated devices, and the order of graphs and the Python calls between them."""

import random
from typing import Any

import pytest
import torch

from dsv2_local.kernels import cpu, graphs, ops
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.offload.graph_experts import GraphBuffers
from dsv2_local.offload.plan_request import Mode
from tests.conftest import kernels
from tests.test_offload import EXPERTS, LAYOUT, PER_TOKEN, offloaded, step
from tests.test_offload import records as records

STREAMS = "synchronize", "current_stream", "set_stream", "current_device", "graph_pool_handle", "Stream", "set_device"


class ImmediateGraph(PiecewiseGraph):
    """Captures nothing: the calls between graphs run at once, in the order of a replay."""

    def call_between(self, *work: Any) -> None:
        for call in work:
            call()


@pytest.mark.parametrize("buffer", [2, 5])
@pytest.mark.parametrize("slots", [0, 5, EXPERTS])
@pytest.mark.parametrize("mode", [Mode.HYBRID, Mode.STREAM])
def test_every_expert_is_computed_once_wherever_it_is_stored(records, mode, slots, buffer):
    """On the torch reference, because the native kernels do not skip negative slots."""
    rng = random.Random(slots)
    with kernels(cpu.REFERENCE):
        experts = offloaded(records, rng, mode, slots, buffer)
        (device,) = experts.devices
        device.graph_buffers = GraphBuffers(device.slots.device, LAYOUT.hidden_size, PER_TOKEN, torch.float32)
        for turn in range(60):
            layer = rng.choice(list(records))
            x, ids, weights = step(1, rng)
            got = experts.start(layer, x, ids, weights, ImmediateGraph())()
            assert torch.equal(got, ops.experts(x, records[layer], LAYOUT, ids, weights)), turn
        stats = experts.stats
        assert (stats.hits > 0, stats.host_experts > 0) == (slots > 0, mode is Mode.HYBRID)
        assert stats.hits + stats.misses == 60 * 3
        assert stats.fetched_bytes > 0
        experts.close()


class Graph:
    """A CUDA graph that logs its captures and replays."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self._log.append("begin")

    def capture_end(self) -> None:
        self._log.append("end")

    def replay(self) -> None:
        self._log.append("graph")


def test_calls_between_graphs_run_in_each_replay_and_not_during_capture(monkeypatch):
    log: list[str] = []
    for name in STREAMS:
        monkeypatch.setattr(graphs.torch.cuda, name, lambda *given: 0)
    monkeypatch.setattr(graphs.torch.cuda, "CUDAGraph", lambda: Graph(log))
    piecewise = PiecewiseGraph()

    def step() -> str:
        piecewise.call_between(lambda: log.append("call"))
        return "result"

    assert piecewise.capture(step) == "result"
    assert log == ["begin", "end", "begin", "end"]
    log.clear()
    piecewise.replay()
    piecewise.replay()
    assert log == ["graph", "call", "graph"] * 2
    log.clear()
    with pytest.raises(ZeroDivisionError):
        PiecewiseGraph().capture(lambda: 1 // 0)
    assert log == ["begin", "end"]
