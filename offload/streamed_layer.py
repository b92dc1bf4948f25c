"""A step of many tokens through a layer whose experts are streamed, without the host waiting for more than counts.

The host queues the work on each group of experts as soon as it knows how many pairs each expert has; the work itself
waits for the copies of the group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.offload.device import Event
from dsv2_local.offload.expert_slots import ExpertSlots
from dsv2_local.offload.layer_stream import LayerStream
from dsv2_local.offload.sizes import PAIRS_AT_ONCE
from dsv2_local.offload.sorted_pairs import SortedPairs, runs_of


class StreamedLayer:
    """The experts' input x [T, D], ids and weights [T, K] of a layer, and their weighted sum as it grows."""

    def __init__(
        self, slots: ExpertSlots, layout: ExpertLayout, experts: int, x: Tensor, ids: Tensor, weights: Tensor
    ) -> None:
        """Queue the sorting of the token-expert pairs; `experts` is the number of the layer's routed experts."""
        self._slots, self._layout, self._pairs = slots, layout, SortedPairs(slots, ids, experts)
        self._x, self._ids, self._weights = x, ids, weights

    def through(self, groups: Sequence[Sequence[int]], stream: LayerStream) -> Tensor:
        """Take the layer's groups of experts from the stream, one after the other -> fp32 [T, D].

        Raises:
            DeviceError: a copy or a piece of work failed.
        """
        counts, first, last = self._pairs.counts(), 0, list[Event]()
        y = torch.zeros(self._x.shape, device=self._x.device)
        for group in groups:
            indices = stream.take()
            for runs in runs_of([(indices[expert], counts[expert]) for expert in group], PAIRS_AT_ONCE):
                last = [self._queue(runs, first, y, last)]
                first += sum(count for _, count in runs)
            stream.advance()
        self._slots.device.join(last[0])
        return y

    def _queue(self, runs: list[tuple[int, int]], first: int, y: Tensor, after: Sequence[Event]) -> Event:
        """Queue the computation of successive pairs, from number `first` on, and their addition to y.

        `runs`: (index of the expert's record, number of pairs) of each expert.
        """
        n, pairs = sum(count for _, count in runs), self._pairs

        def work() -> None:
            out = torch.empty(n, self._x.shape[1], device=self._x.device)
            tokens = pairs.tokens[first : first + n]
            ops.sorted_expert_outputs(self._x, self._slots.records, self._layout, tokens, runs, out)
            ops.combine(out, pairs.rows, self._ids, self._weights, y, first)

        return self._slots.compute(work, reads=[index for index, _ in runs], after=after)
