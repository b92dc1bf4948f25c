"""One token's experts in a step that is captured in graphs: what Python decides between the graphs, and what they run.

The graphs of a step are fixed, the experts are not: a graph computes with the slots that stand in a tensor, and leaves
out those below 0. Before the first graph of a layer Python reads the router's choice, begins the copies of experts that
have no slot and names those that have one; before the second it names those that were copied, and puts beside their
outputs those that the CPU computed meanwhile.
"""

from typing import Protocol

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.kernels.graphs import Graphs
from dsv2_local.offload.device import Device
from dsv2_local.offload.slots import Slots


class Placing(Protocol):
    """Who decides where experts are computed: `schedule.Lane`."""

    slots: Slots
    layout: ExpertLayout

    def placed(self, layer: int, experts: list[int]) -> tuple[dict[int, int], dict[int, int], list[int]]:
        """Decide for one token's experts, and begin to copy.

        Returns:
            The indices of records that are there and of those that will be, by expert, and whom the CPU computes.
        """
        ...

    def compute_on_host(self, layer: int, x: Tensor, tokens: Tensor, experts: Tensor, out: Tensor) -> None:
        """Compute pairs on the CPU, all in RAM: see `reference.expert_outputs`."""
        ...


class Buffers:
    """What a device's layers hand between Python and their graphs, one layer after the other.

    Attributes:
        slots: int64 [2, K] on the device, of experts that are there and of those that were fetched; -1: neither.
        rows: int64 [1, K] there, where in `outputs` each expert's is.
        outputs: fp32 [2·K, D] there, those of the device and those of the CPU.
        told: `slots` and `rows` in page-locked RAM, int64 [3, K].
        ids, x: the router's choice int64 [1, K], and what experts compute with [1, D], in page-locked RAM.
        on_host: the CPU's outputs there, fp32 [K, D].
    """

    def __init__(self, device: Device, x: Tensor, ids: Tensor) -> None:
        """For tokens like x [1, D] with ids [1, K], on the device."""
        (_, K), (_, D) = ids.shape, x.shape
        self._sent = torch.full((3, K), -1, dtype=torch.int64, device=x.device)
        self.slots, self.rows = self._sent[:2], self._sent[2:]
        self.outputs = torch.zeros(2 * K, D, device=x.device)
        self.tokens = torch.zeros(K, dtype=torch.int64, device=x.device)
        self.told = device.page_locked((3, K), torch.int64)
        self.ids, self.x = device.page_locked((1, K), torch.int64), device.page_locked((1, D), x.dtype)
        self.on_host = device.page_locked((K, D), torch.float32)

    def send(self) -> None:
        """Copy what is told to the device."""
        self._sent.copy_(self.told, non_blocking=True)


class CapturedExperts:
    """A layer's experts of one token, x [1, D], ids and weights [1, K], in the graphs of a step."""

    def __init__(self, lane: Placing, buffers: Buffers, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        self._lane, self._buffers, self._layer = lane, buffers, layer
        self._x, self._ids, self._weights = x, ids, weights
        self._fetched: dict[int, int] = {}
        self._on_host: list[int] = []  # places among the K

    def begin(self, graphs: Graphs) -> None:
        """Capture what is computed with experts that are there."""
        buffers = self._buffers
        buffers.ids.copy_(self._ids, non_blocking=True)
        buffers.x.copy_(self._x, non_blocking=True)
        graphs.between(self._start)
        self._compute(0)

    def finish(self, graphs: Graphs) -> Tensor:
        """Capture the rest -> [1, D]."""
        graphs.between(self._rest)
        self._compute(1)
        y = torch.zeros(self._x.shape, device=self._x.device)
        ops.combine(self._buffers.outputs, self._buffers.rows, self._ids, self._weights, y)
        return y.to(self._x.dtype)

    def _compute(self, part: int) -> None:
        buffers, lane, K = self._buffers, self._lane, self._ids.shape[1]
        out, slots = buffers.outputs[:K], buffers.slots[part]
        ops.expert_outputs(self._x, lane.slots.records, lane.layout, buffers.tokens, slots, out)

    def _start(self) -> None:
        """Wait for the router, and so for all work before: no slot is being read when copies begin."""
        lane, told = self._lane, self._buffers.told
        lane.slots.device.synchronize()
        chosen: list[int] = self._buffers.ids[0].tolist()
        hits, fetched, on_host = lane.placed(self._layer, chosen)
        self._fetched, K = fetched, len(chosen)
        self._on_host = [place for place, expert in enumerate(chosen) if expert in on_host]
        rows = list(range(K))
        for row, place in enumerate(self._on_host):
            rows[place] = K + row
        wanted = [[found.get(expert, -1) for expert in chosen] for found in (hits, fetched)]
        told.copy_(torch.tensor([*wanted, rows]))
        self._buffers.send()

    def _rest(self) -> None:
        lane, buffers = self._lane, self._buffers
        if self._fetched:
            lane.slots.device.join(lane.slots.compute(_nothing, reads=self._fetched.values()))
        if places := self._on_host:
            experts, n, K = buffers.ids[0][places], len(places), len(buffers.on_host)
            lane.compute_on_host(self._layer, buffers.x, torch.zeros_like(experts), experts, buffers.on_host[:n])
            buffers.outputs[K : K + n].copy_(buffers.on_host[:n], non_blocking=True)


def _nothing() -> None:
    """What the stream's waiting is for comes in the graph that follows."""
