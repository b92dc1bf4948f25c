"""A captured step's experts on devices made of RAM, and the order of what stands between graphs."""

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


class AtOnce(PiecewiseGraph):
    """No graphs: what a replay would do is done while it is captured."""

    def call_between(self, work: Any) -> None:
        work()


@pytest.mark.parametrize("buffer", [2, 5])
@pytest.mark.parametrize("slots", [0, 5, EXPERTS])
@pytest.mark.parametrize("mode", [Mode.HYBRID, Mode.STREAM])
def test_every_expert_is_computed_once_wherever_it_is(records, mode, slots, buffer):
    """With the reference: the native kernels do not leave out slots."""
    rng = random.Random(slots)
    with kernels(cpu.REFERENCE):
        experts = offloaded(records, rng, mode, slots, buffer)
        (device,) = experts.devices
        device.graph_buffers = GraphBuffers(device.slots.device, LAYOUT.hidden_size, PER_TOKEN, torch.float32)
        for turn in range(60):
            layer = rng.choice(list(records))
            x, ids, weights = step(1, rng)
            got = experts.start(layer, x, ids, weights, AtOnce())()
            assert torch.equal(got, ops.experts(x, records[layer], LAYOUT, ids, weights)), turn
        figures = experts.stats
        assert (figures.hits > 0, figures.host_experts > 0) == (slots > 0, mode is Mode.HYBRID)
        assert figures.hits + figures.misses == 60 * 3
        assert experts.stats.fetched_bytes > 0
        experts.close()


class Graph:
    """Notes when it is captured and replayed."""

    def __init__(self, told: list[str]) -> None:
        self._told, self._name = told, ""

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self._told.append("begin")

    def capture_end(self) -> None:
        self._told.append("end")

    def replay(self) -> None:
        self._told.append("graph")


def test_work_between_graphs_is_done_in_each_replay_and_not_while_they_are_captured(monkeypatch):
    told: list[str] = []
    for name in STREAMS:
        monkeypatch.setattr(graphs.torch.cuda, name, lambda *given: 0)
    monkeypatch.setattr(graphs.torch.cuda, "CUDAGraph", lambda: Graph(told))
    recorded = PiecewiseGraph()

    def captured() -> str:
        recorded.call_between(lambda: told.append("work"))
        return "result"

    assert recorded.capture(captured) == "result"
    assert told == ["begin", "end", "begin", "end"]
    told.clear()
    recorded.replay()
    recorded.replay()
    assert told == ["graph", "work", "graph"] * 2
    told.clear()
    with pytest.raises(ZeroDivisionError):
        PiecewiseGraph().capture(lambda: 1 // 0)
    assert told == ["begin", "end"]
