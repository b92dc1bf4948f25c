"""Routed experts that are computed where they are stored: all in RAM, or all in GPU memory."""

from collections.abc import Callable

from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.kernels.graphs import PiecewiseGraph


class ResidentExperts:
    """Experts that are never moved: in RAM, mapped from files, or in the memory of their layer's GPU."""

    replayable = True

    def __init__(self, layout: ExpertLayout, records: dict[int, Tensor]) -> None:
        """Use `records`, uint8 [E, layout.nbytes] by layer, in place."""
        self._layout, self.records = layout, records

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(records.nbytes for records in self.records.values())

    def start(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, capture: PiecewiseGraph | None = None
    ) -> Callable[[], Tensor]:
        """See `model.Experts`. All of the work is done by the returned function."""
        return lambda: self.experts(layer, x, ids, weights)

    def experts(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Σₖ weights[t, k] · expert[ids[t, k]](x[t]): x [T, D], ids and weights [T, K] -> [T, D]."""
        return ops.experts(x, self.records[layer], self._layout, ids, weights)
