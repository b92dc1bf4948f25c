"""Experts of a captured step on simulated devices, and the order of graphs and the Python calls between them."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

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


def batch(tokens: int, rng: random.Random, distinct: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Random input of a layer for so many tokens, of which all after the first `distinct` are copies of the last."""
    x, ids, weights = step(distinct or tokens, rng)
    rows = torch.arange(tokens).clamp(max=len(x) - 1)
    return x[rows], ids[rows], weights[rows]


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("buffer", [2, 5])
@pytest.mark.parametrize("slots", [0, 5, EXPERTS])
@pytest.mark.parametrize("mode", [Mode.HYBRID, Mode.STREAM])
def test_every_expert_is_computed_once_wherever_it_is_stored(records, mode, slots, buffer, tokens):
    """On the torch reference, because the native kernels do not skip negative slots."""
    rng = random.Random(slots)
    with kernels(cpu.REFERENCE):
        experts = offloaded(records, rng, mode, slots, buffer)
        (device,) = experts.devices
        device.graph_buffers = GraphBuffers.allocate(device.slots.device, LAYOUT.hidden_size, PER_TOKEN)
        uses, overflows = 0, False
        for turn in range(60 if tokens == 1 else 25):
            layer = rng.choice(list(records))
            x, ids, weights = batch(tokens, rng, rng.randint(1, tokens))
            before = experts.stats
            got = experts.start(layer, x, ids, weights, ImmediateGraph())()
            assert (got - ops.experts(x, records[layer], LAYOUT, ids, weights)).norm() < 1e-5 * got.norm(), turn
            done, distinct = experts.stats - before, len(ids.unique())
            assert done.hits + done.misses == distinct
            assert done.fetched_bytes == (done.misses - done.host_experts) * LAYOUT.nbytes
            uses, overflows = uses + distinct, overflows or done.misses > device.slots.staged
        stats = experts.stats
        assert stats.hits + stats.misses == uses
        assert stats.fetched_bytes > 0
        assert (stats.hits > 0) == (slots > 0)
        assert (stats.host_experts > 0) == (mode is Mode.HYBRID or overflows)
        assert overflows == (tokens == 4 and buffer == 2)
        experts.close()


def test_rows_that_pad_a_batch_add_nothing(records):
    """What is fetched, counted and computed by the CPU is that of the rows without their copies."""
    rng, placed = random.Random(3), []
    given = [(list(records)[turn % len(records)], batch(2, rng)) for turn in range(30)]
    with kernels(cpu.REFERENCE):
        for padding in (0, 2):
            experts = offloaded(records, rng, Mode.HYBRID, 7, 3)
            (device,) = experts.devices
            device.graph_buffers = GraphBuffers.allocate(device.slots.device, LAYOUT.hidden_size, PER_TOKEN)
            pairs, compute = [], device.compute_on_host
            device.compute_on_host = lambda *given, pairs=pairs, compute=compute: (
                pairs.append(len(given[2])),
                compute(*given),
            )
            for layer, (x, ids, weights) in given:
                rows = torch.tensor([0, 1, *[1] * padding])
                got = experts.start(layer, x[rows], ids[rows], weights[rows], ImmediateGraph())()
                assert torch.equal(got[2:], got[[1] * padding])
            cache = device.slots.cache
            placed.append((cache.total, device.slots.fetched, pairs, cache.slot.tolist(), cache.worth_of.tolist()))
            experts.close()
    assert placed[0] == placed[1]
    assert sum(placed[0][2]) > 0


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
