"""One token's experts in a step captured in CUDA graphs: what Python decides between the graphs, and what they run.

The graphs of a step are fixed, the experts are not: a graph computes with the slots that stand in a tensor and leaves
out those below 0. Before a layer's first graph Python reads the router's choice, starts to copy the experts that have
no slot, and names the slots of those that have one. Before the second it names the slots of those that were copied, and
puts the outputs of those that the CPU computed meanwhile beside theirs.
"""

from typing import Protocol

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.offload.device import Device
from dsv2_local.offload.expert_slots import ExpertSlots


class GraphBuffers:
    """What the layers of one device hand between Python and their graphs, one layer after the other.

    Attributes:
        slots: int64 [2, K] on the device, of experts that had a slot and of those that were fetched; -1: neither.
        rows: int64 [1, K] there: in which row of `outputs` each expert's is.
        outputs: fp32 [2·K, D] there: those of the device, then those of the CPU.
        host_slots: `slots` and `rows` in page-locked RAM, int64 [3, K].
        ids, x: the router's choice int64 [1, K], and what the experts compute with [1, D], in page-locked RAM.
        host_outputs: the CPU's outputs there, fp32 [K, D].
    """

    def __init__(self, device: Device, hidden_size: int, experts_per_token: int, dtype: torch.dtype) -> None:
        """For one token with activations in `dtype`."""
        K, D = experts_per_token, hidden_size
        self._sent = torch.full((3, K), -1, dtype=torch.int64, device=device.torch_device)
        self.slots, self.rows = self._sent[:2], self._sent[2:]
        self.outputs = torch.zeros(2 * K, D, device=device.torch_device)
        self.tokens = torch.zeros(K, dtype=torch.int64, device=device.torch_device)
        self.host_slots = device.page_locked((3, K), torch.int64)
        self.ids, self.x = device.page_locked((1, K), torch.int64), device.page_locked((1, D), dtype)
        self.host_outputs = device.page_locked((K, D), torch.float32)

    def send(self) -> None:
        """Copy `host_slots` to the device."""
        self._sent.copy_(self.host_slots, non_blocking=True)


class ExpertPlacer(Protocol):
    """Decides where each expert of a token is computed: `offloaded_experts.DeviceExperts`."""

    slots: ExpertSlots
    layout: ExpertLayout

    def place(self, layer: int, experts: list[int]) -> tuple[dict[int, int], dict[int, int], list[int]]:
        """Decide for one token's experts, and start the copies.

        Returns:
            By expert the slots of those that have one and of those that are being fetched, and whom the CPU computes.
        """
        ...

    def compute_on_host(self, layer: int, x: Tensor, tokens: Tensor, experts: Tensor, out: Tensor) -> None:
        """Compute pairs of a token and an expert on the CPU, all in RAM: see `reference.expert_outputs`."""
        ...


class GraphExperts:
    """A layer's experts of one token, x [1, D], ids and weights [1, K], in the graphs of a step."""

    def __init__(
        self, placer: ExpertPlacer, buffers: GraphBuffers, layer: int, x: Tensor, ids: Tensor, weights: Tensor
    ) -> None:
        self._placer, self._buffers, self._layer = placer, buffers, layer
        self._x, self._ids, self._weights = x, ids, weights
        self._fetched: dict[int, int] = {}
        self._on_host: list[int] = []  # positions among the K

    def capture_hits(self, capture: PiecewiseGraph) -> None:
        """Capture what is computed with experts that have a slot."""
        buffers = self._buffers
        buffers.ids.copy_(self._ids, non_blocking=True)
        buffers.x.copy_(self._x, non_blocking=True)
        capture.call_between(self._place)
        self._compute(0)

    def capture_misses(self, capture: PiecewiseGraph) -> Tensor:
        """Capture the other experts and the sum -> [1, D]."""
        capture.call_between(self._compute_misses)
        self._compute(1)
        y = torch.zeros(self._x.shape, device=self._x.device)
        ops.combine(self._buffers.outputs, self._buffers.rows, self._ids, self._weights, y)
        return y.to(self._x.dtype)

    def _compute(self, part: int) -> None:
        buffers, placer, K = self._buffers, self._placer, self._ids.shape[1]
        out, slots = buffers.outputs[:K], buffers.slots[part]
        ops.expert_outputs(self._x, placer.slots.records, placer.layout, buffers.tokens, slots, out)

    def _place(self) -> None:
        """Wait for the router, and so for all work before it: no slot is being read when copies start."""
        placer, host_slots = self._placer, self._buffers.host_slots
        placer.slots.device.synchronize()
        chosen: list[int] = self._buffers.ids[0].tolist()
        hits, fetched, on_host = placer.place(self._layer, chosen)
        self._fetched, K = fetched, len(chosen)
        self._on_host = [position for position, expert in enumerate(chosen) if expert in on_host]
        rows = list(range(K))
        for row, position in enumerate(self._on_host):
            rows[position] = K + row
        slots = [[found.get(expert, -1) for expert in chosen] for found in (hits, fetched)]
        host_slots.copy_(torch.tensor([*slots, rows]))
        self._buffers.send()

    def _compute_misses(self) -> None:
        """Have the stream wait for the fetched experts, and compute the host's."""
        placer, buffers = self._placer, self._buffers
        if self._fetched:
            placer.slots.device.join(placer.slots.compute(_nothing, reads=self._fetched.values()))
        if positions := self._on_host:
            experts, n, K = buffers.ids[0][positions], len(positions), len(buffers.host_outputs)
            out = buffers.host_outputs[:n]
            placer.compute_on_host(self._layer, buffers.x, torch.zeros_like(experts), experts, out)
            buffers.outputs[K : K + n].copy_(out, non_blocking=True)


def _nothing() -> None:
    """The work that the stream waits for is in the graph that follows."""
