"""The experts of few tokens in a step captured as CUDA graphs: what the host decides, and what the graphs run.

The graphs of a step are fixed, but its experts are not: a graph reads slot numbers from a tensor and skips negative
ones. Before a layer's first expert graph, which computes the cached experts, the host reads the router's choice, starts
the copies of missing experts and writes all slot numbers. Before the second graph, which computes the copied experts
and the sum, it makes the stream wait for the copies, computes the remaining experts on the CPU, and uploads their
outputs. Native code does both (`native_placing.py`) where it can, else the functions of `GraphExperts`.

Each expert that any of the tokens chose is looked up, copied or computed by the CPU once, for all its tokens. A row
that is equal to the row before it, as the rows that pad a batch are, takes over that row's outputs.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.offload.device import Device
from dsv2_local.offload.expert_slots import ExpertSlots
from dsv2_local.offload.native_placing import NativePlacing
from dsv2_local.offload.sizes import GRAPH_ROWS


@dataclass(frozen=True, eq=False)
class GraphBuffers:
    """Tensors through which the host and the graphs exchange data; the layers of one device take turns with them.

    T is the number of tokens, K that of experts per token, D hidden_size. The K pairs of a token are neighbours.

    Attributes:
        sent: int64 [3, T·K] on the device: slots of the cached experts, then of the fetched experts, -1 for all others;
            then the row of `outputs` that holds each pair's output.
        outputs: fp32 [2·T·K, D] on the device: outputs of the device, then outputs of the CPU.
        tokens: int64 [T·K] on the device: the token of each pair.
        host_slots: int64 [3, T·K] in page-locked RAM: the source of `sent`.
        ids, x: the router's choice int64 [T, K] and the experts' input fp32 [T, D], in page-locked RAM.
        host_outputs: fp32 [T·K, D] in page-locked RAM: outputs of the CPU.
    """

    sent: Tensor
    outputs: Tensor
    tokens: Tensor
    host_slots: Tensor
    ids: Tensor
    x: Tensor
    host_outputs: Tensor

    @classmethod
    def allocate(
        cls, device: Device, hidden_size: int, experts_per_token: int, rows: int = GRAPH_ROWS[-1]
    ) -> "GraphBuffers":
        """The tensors for at most `rows` tokens."""
        T, K, D, place = rows, experts_per_token, hidden_size, device.torch_device
        return cls(
            sent=torch.full((3, T * K), -1, dtype=torch.int64, device=place),
            outputs=torch.zeros(2 * T * K, D, device=place),
            tokens=torch.arange(T, device=place).repeat_interleave(K),
            host_slots=device.page_locked((3, T * K), torch.int64),
            ids=device.page_locked((T, K), torch.int64),
            x=device.page_locked((T, D), torch.float32),
            host_outputs=device.page_locked((T * K, D), torch.float32),
        )

    @property
    def max_rows(self) -> int:
        """The most tokens that there is room for."""
        return len(self.ids)

    @property
    def slots(self) -> Tensor:
        """Slots of the cached experts and of the fetched experts: int64 [2, T·K]."""
        return self.sent[:2]

    @property
    def rows(self) -> Tensor:
        """The row of `outputs` of each pair: int64 [T, K]."""
        return self.sent[2].view(self.ids.shape)

    def of(self, rows: int) -> "GraphBuffers":
        """The buffers of so many tokens, at the beginning of the same memory."""
        n = rows * self.ids.shape[1]
        sent, host_slots = (whole.view(-1)[: 3 * n].view(3, n) for whole in (self.sent, self.host_slots))
        return GraphBuffers(
            sent, self.outputs[: 2 * n], self.tokens[:n], host_slots, self.ids[:rows], self.x[:rows],
            self.host_outputs[:n],
        )  # fmt: skip

    def compile(self, x: Tensor, ids: Tensor, records: Tensor, layout: ExpertLayout) -> None:
        """Run the kernels that a captured step of so many tokens needs, since a capture cannot compile them.

        Args:
            x, ids: the input of a layer's experts, [T, D] and [T, K].
            records: uint8 [slots, layout.nbytes], the records on the device; what they contain does not matter.
            layout: layout of one expert's record.
        """
        part = self.of(len(x))
        ops.to_host(x, ids, part.x, part.ids)
        if len(records):
            slots = torch.arange(ids.numel(), device=x.device) % len(records)
            ops.expert_outputs(x, records, layout, part.tokens, slots, part.outputs[: ids.numel()])

    def send(self) -> None:
        """Copy `host_slots` to the device."""
        self.sent.copy_(self.host_slots, non_blocking=True)


class ExpertPlacer(Protocol):
    """Decides where each expert of a step is computed; `offloaded_experts.DeviceExperts` implements it."""

    slots: ExpertSlots
    layout: ExpertLayout
    records: dict[int, Tensor]
    native: NativePlacing | None

    def begin_step(self) -> None:
        """Prepare a step that native code places: it takes all copies for done and all slots for unused."""
        ...

    def place(self, layer: int, counts: Mapping[int, int]) -> tuple[dict[int, int], dict[int, int], list[int]]:
        """Decide for the experts of a step, and start the copies.

        Args:
            layer: index of the layer in the model.
            counts: for each chosen expert, by how many tokens.

        Returns:
            Slots of the cached experts, slots of the experts being copied, and the experts that the CPU computes.
        """
        ...

    def compute_on_host(self, layer: int, x: Tensor, tokens: Tensor, experts: Tensor, out: Tensor) -> None:
        """Compute token-expert pairs on the CPU, with all tensors in RAM; see `reference.expert_outputs`."""
        ...


class GraphExperts:
    """A layer's experts in a captured step, for x [T, D], ids and weights [T, K]."""

    def __init__(
        self, placer: ExpertPlacer, buffers: GraphBuffers, layer: int, x: Tensor, ids: Tensor, weights: Tensor
    ) -> None:
        self._placer, self._buffers, self._layer = placer, buffers.of(len(ids)), layer
        self._x, self._ids, self._weights = x, ids, weights
        self._fetched: dict[int, int] = {}
        self._on_host: list[int] = []  # pairs
        self._native = placer.native.calls(layer, placer.records[layer], len(ids)) if placer.native else None

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
        """Capture the computation of the fetched experts and the weighted sum of all experts -> [T, D]."""
        capture.call_between(self._native[1] if self._native else self._compute_misses)
        self._compute(1)
        y = torch.zeros(self._x.shape, device=self._x.device)
        ops.combine(self._buffers.outputs, self._buffers.rows, self._ids, self._weights, y)
        return y.to(self._x.dtype)

    def _compute(self, part: int) -> None:
        buffers, placer = self._buffers, self._placer
        if not len(placer.slots.records):  # the CPU computes all experts
            return
        out, slots = buffers.outputs[: self._ids.numel()], buffers.slots[part]
        ops.expert_outputs(self._x, placer.slots.records, placer.layout, buffers.tokens, slots, out)

    def _place(self) -> None:
        """Place the experts that the router chose.

        Waiting for the router's choice waits for all earlier work too, so no slot is being read when the copies start.
        """
        placer, buffers = self._placer, self._buffers
        placer.slots.device.synchronize()
        chosen: list[list[int]] = buffers.ids.tolist()
        T, K = buffers.ids.shape
        like_before = [
            t > 0 and chosen[t] == chosen[t - 1] and torch.equal(buffers.x[t], buffers.x[t - 1]) for t in range(T)
        ]
        pairs = [(t * K + k, expert) for t in range(T) if not like_before[t] for k, expert in enumerate(chosen[t])]
        hits, self._fetched, on_host = placer.place(self._layer, Counter(expert for _, expert in pairs))
        self._on_host = [pair for pair, expert in pairs if expert in on_host]
        slots, rows = [[-1] * (T * K) for _ in range(2)], list(range(T * K))
        for pair, expert in pairs:
            slots[0][pair], slots[1][pair] = hits.get(expert, -1), self._fetched.get(expert, -1)
        for row, pair in enumerate(self._on_host):
            rows[pair] = T * K + row
        for t in range(T):
            if like_before[t]:
                rows[t * K : t * K + K] = rows[t * K - K : t * K]
        buffers.host_slots.copy_(torch.tensor([*slots, rows]))
        buffers.send()

    def _compute_misses(self) -> None:
        """Make the stream wait for the fetched experts, and compute the others on the CPU."""
        placer, buffers = self._placer, self._buffers
        if self._fetched:
            placer.slots.device.join(placer.slots.compute(_nothing, reads=self._fetched.values()))
        if self._on_host:
            pairs, n, first = torch.tensor(self._on_host), len(self._on_host), self._ids.numel()
            out = buffers.host_outputs[:n]
            tokens, experts = pairs // self._ids.shape[1], buffers.ids.view(-1)[pairs]
            placer.compute_on_host(self._layer, buffers.x, tokens, experts, out)
            buffers.outputs[first : first + n].copy_(out, non_blocking=True)


def _nothing() -> None:
    """Do nothing: the work that needs the copies is in the next graph."""
