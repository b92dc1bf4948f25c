"""A captured step's experts on devices made of RAM, and the order of what stands between graphs."""

import random
from typing import Any

import pytest
import torch

from dsv2_local.kernels import cpu, graphs, ops
from dsv2_local.kernels.graphs import Graphs, capturing
from dsv2_local.offload.captured import Buffers
from dsv2_local.offload.schedule import Mode
from tests.conftest import kernels
from tests.test_offload import EXPERTS, LAYOUT, lanes, step
from tests.test_offload import records as records

STREAMS = "synchronize", "current_stream", "set_stream", "current_device", "graph_pool_handle", "Stream", "set_device"


class AtOnce(Graphs):
    """No graphs: what a replay would do is done while it is captured."""

    def between(self, work: Any) -> None:
        work()


@pytest.mark.parametrize("buffer", [2, 5])
@pytest.mark.parametrize("slots", [0, 5, EXPERTS])
@pytest.mark.parametrize("mode", [Mode.HYBRID, Mode.STREAM])
def test_every_expert_is_computed_once_wherever_it_is(records, mode, slots, buffer):
    """With the reference: the native kernels do not leave out slots."""
    rng = random.Random(slots)
    with kernels(cpu.REFERENCE):
        experts = lanes(records, rng, mode, slots, buffer)
        (lane,) = experts.lanes
        for turn in range(60):
            layer = rng.choice(list(records))
            x, ids, weights = step(1, rng)
            lane._buffers = lane._buffers or Buffers(lane.slots.device, x, ids)
            captured = lane.captured(layer, x, ids, weights)
            assert captured is not None
            captured.begin(AtOnce())
            got = captured.finish(AtOnce())
            assert torch.equal(got, ops.experts(x, records[layer], LAYOUT, ids, weights)), turn
        figures = experts.figures
        assert (figures.hits > 0, figures.host_experts > 0) == (slots > 0, mode is Mode.HYBRID)
        assert figures.hits + figures.misses == 60 * 3
        assert experts.figures.fetched_bytes > 0
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
    recorded = Graphs()

    def captured() -> str:
        assert capturing() is recorded
        recorded.between(lambda: told.append("work"))
        return "result"

    assert recorded.capture(captured) == "result"
    assert capturing() is None
    assert told == ["begin", "end", "begin", "end"]
    told.clear()
    recorded.replay()
    recorded.replay()
    assert told == ["graph", "work", "graph"] * 2
    told.clear()
    with pytest.raises(ZeroDivisionError):
        Graphs().capture(lambda: 1 // 0)
    assert told == ["begin", "end"]
    assert capturing() is None
