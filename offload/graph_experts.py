"""One token's experts in a step captured as CUDA graphs: what the host decides between graphs, and what the graphs run.

The graphs of a step are fixed, but its experts are not: a graph reads slot numbers from a tensor and skips negative
ones. Before a layer's first expert graph, which computes the cached experts, the host reads the router's choice, starts
the copies of missing experts and writes all slot numbers. Before the second graph, which computes the copied experts
and the sum, it makes the stream wait for the copies, computes the remaining experts on the CPU, and uploads their
outputs. Native code does both (`native_placing.py`) where it can, else the functions of `GraphExperts`.
"""

from typing import Protocol

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.offload.device import Device
from dsv2_local.offload.expert_slots import ExpertSlots
from dsv2_local.offload.native_placing import Buffers, NativePlacing


class GraphBuffers:
    """Tensors through which the host and the graphs exchange data; the layers of one device take turns with them.

    Attributes:
        slots: int64 [2, K] on the device: slots of the cached experts, then of the fetched experts; -1 for all others.
        rows: int64 [1, K] on the device: the row of `outputs` that holds each expert's output.
        outputs: fp32 [2·K, D] on the device: outputs of the device, then outputs of the CPU.
        tokens: int64 [K] on the device: the token of each expert, which is token 0.
        host_slots: int64 [3, K] in page-locked RAM: the source of `slots` and `rows`.
        ids, x: the router's choice int64 [1, K] and the experts' input fp32 [1, D], in page-locked RAM.
        host_outputs: fp32 [K, D] in page-locked RAM: outputs of the CPU.
    """

    def __init__(self, device: Device, hidden_size: int, experts_per_token: int, dtype: torch.dtype) -> None:
        """Allocate the tensors for one token with activations in `dtype`."""
        K, D = experts_per_token, hidden_size
        self._sent = torch.full((3, K), -1, dtype=torch.int64, device=device.torch_device)
        self.slots, self.rows = self._sent[:2], self._sent[2:]
        self.outputs = torch.zeros(2 * K, D, device=device.torch_device)
        self.tokens = torch.zeros(K, dtype=torch.int64, device=device.torch_device)
        self.host_slots = device.page_locked((3, K), torch.int64)
        self.ids, self.x = device.page_locked((1, K), torch.int64), device.page_locked((1, D), torch.float32)
        self.host_outputs = device.page_locked((K, D), torch.float32)
        x = torch.zeros(1, D, dtype=dtype, device=device.torch_device)
        ops.to_host(x, self.tokens[None], self.x, self.ids)  # compiles the kernel, which a capture cannot

    def send(self) -> None:
        """Copy `host_slots` to the device."""
        self._sent.copy_(self.host_slots, non_blocking=True)

    def for_native_code(self) -> Buffers:
        """The tensors that native code uses."""
        outputs = self.outputs[len(self.host_outputs) :]
        return Buffers(self.ids, self.x, self.host_slots, self._sent, self.host_outputs, outputs)


class ExpertPlacer(Protocol):
    """Decides where each expert of a token is computed; `offloaded_experts.DeviceExperts` implements it."""

    slots: ExpertSlots
    layout: ExpertLayout
    records: dict[int, Tensor]
    native: NativePlacing | None

    def begin_step(self) -> None:
        """Prepare a step that native code places: it takes all copies for done and all slots for unused."""
        ...

    def place(self, layer: int, experts: list[int]) -> tuple[dict[int, int], dict[int, int], list[int]]:
        """Decide for one token's experts, and start the copies.

        Returns:
            Slots of the cached experts, slots of the experts being copied, and the experts that the CPU computes.
        """
        ...

    def compute_on_host(self, layer: int, x: Tensor, tokens: Tensor, experts: Tensor, out: Tensor) -> None:
        """Compute token-expert pairs on the CPU, with all tensors in RAM; see `reference.expert_outputs`."""
        ...


class GraphExperts:
    """A layer's experts for one token, x [1, D], ids and weights [1, K], in a captured step."""

    def __init__(
        self, placer: ExpertPlacer, buffers: GraphBuffers, layer: int, x: Tensor, ids: Tensor, weights: Tensor
    ) -> None:
        self._placer, self._buffers, self._layer = placer, buffers, layer
        self._x, self._ids, self._weights = x, ids, weights
        self._fetched: dict[int, int] = {}
        self._on_host: list[int] = []  # positions among the K
        self._native = placer.native.calls(layer, placer.records[layer]) if placer.native else None

    def capture_hits(self, capture: PiecewiseGraph) -> None:
        """Capture the computation of the cached experts."""
        buffers = self._buffers
        ops.to_host(self._x, self._ids, buffers.x, buffers.ids)
        if self._native is None:
            capture.call_between(self._place)
        elif self._layer == min(self._placer.records):
            capture.call_between(self._placer.begin_step, self._native[0])
        else:
            capture.call_between(self._native[0])
        self._compute(0)

    def capture_misses(self, capture: PiecewiseGraph) -> Tensor:
        """Capture the computation of the fetched experts and the weighted sum of all experts -> [1, D]."""
        capture.call_between(self._native[1] if self._native else self._compute_misses)
        self._compute(1)
        y = torch.zeros(self._x.shape, device=self._x.device)
        ops.combine(self._buffers.outputs, self._buffers.rows, self._ids, self._weights, y)
        return y.to(self._x.dtype)

    def _compute(self, part: int) -> None:
        buffers, placer, K = self._buffers, self._placer, self._ids.shape[1]
        if not len(placer.slots.records):  # the CPU computes all experts
            return
        out, slots = buffers.outputs[:K], buffers.slots[part]
        ops.expert_outputs(self._x, placer.slots.records, placer.layout, buffers.tokens, slots, out)

    def _place(self) -> None:
        """Place the experts that the router chose.

        Waiting for the router's choice waits for all earlier work too, so no slot is being read when the copies start.
        """
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
        """Make the stream wait for the fetched experts, and compute the others on the CPU."""
        placer, buffers = self._placer, self._buffers
        if self._fetched:
            placer.slots.device.join(placer.slots.compute(_nothing, reads=self._fetched.values()))
        if positions := self._on_host:
            experts, n, K = buffers.ids[0][positions], len(positions), len(buffers.host_outputs)
            out = buffers.host_outputs[:n]
            placer.compute_on_host(self._layer, buffers.x, torch.zeros_like(experts), experts, out)
            buffers.outputs[K : K + n].copy_(out, non_blocking=True)


def _nothing() -> None:
    """Do nothing: the work that needs the copies is in the next graph."""
