"""The routed experts in RAM: each layer's records mapped from its file, computed where they lie.

This is the regime without a GPU, "all on the CPU". The model knows only the method `experts`, so that the other
regimes (GPU slots, streamed or split misses) take this one's place without the model noticing.
"""

from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.quant.checkpoint import Checkpoint


class MappedExperts:
    """Every expert from the page cache; pages are read from disk when first used and never written."""

    def __init__(self, layout: ExpertLayout, records: dict[int, Tensor]) -> None:
        """`records`: uint8 [E, layout.nbytes] by layer."""
        self._layout, self.records = layout, records

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "MappedExperts":
        """The experts of an opened checkpoint, mapped."""
        return cls(
            checkpoint.expert_layout, {layer: checkpoint.experts(layer) for layer in checkpoint.config.moe_layers}
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(records.nbytes for records in self.records.values())

    def experts(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Σₖ weights[t, k] · expert[ids[t, k]](x[t]): x [T, D], ids and weights [T, K] -> [T, D]."""
        return ops.experts(x, self.records[layer], self._layout, ids, weights)
