"""Experts in page-locked (pinned) RAM, from which a GPU copies at the full speed of the PCIe link."""

import mmap

import torch
from torch import Tensor

from dsv2_local.offload.device import Device
from dsv2_local.progress import Progress


class PinnedArena:
    """Copies of expert records in page-locked RAM.

    Whole layers are copied, as many as fit in the budget and as the system allows to lock. The other layers stay mapped
    from their files: their pages are read from disk when needed and can be evicted under memory pressure.

    Attributes:
        records: uint8 [E, record bytes] by layer, page-locked or mapped.
        locked: bytes of page-locked records.
        refused: whether the system refused to lock memory within the budget.
    """

    def __init__(self, mapped: dict[int, Tensor], device: Device, budget: int, progress: Progress) -> None:
        """Copy and lock the first layers.

        Args:
            mapped: uint8 [E, record bytes] by layer, mapped from files.
            device: the device that locks the memory.
            budget: bytes to lock at most.
            progress: called with bytes locked so far, and bytes to lock.
        """
        self.records, self.locked, self.refused = dict(mapped), 0, False
        self._device, self._copies = device, list[Tensor]()
        wanted = min(budget, sum(records.nbytes for records in mapped.values()))
        for layer, records in mapped.items():
            if self.locked + records.nbytes > wanted or self.refused:
                break
            progress(self.locked, wanted)
            self._lock(layer, records)
        progress(self.locked, wanted)

    def _lock(self, layer: int, records: Tensor) -> None:
        copy = _page_aligned(records.nbytes).view(records.shape)
        if not self._device.lock(copy):  # before it is filled, so that a refusal costs nothing
            self.refused = True
            return
        self._copies.append(copy)
        copy.copy_(records)
        self.records[layer] = copy
        self.locked += copy.nbytes

    def close(self) -> None:
        """Unlock all memory; the records stay readable."""
        for copy in self._copies:
            self._device.unlock(copy)
        self._copies.clear()
        self.locked = 0


def _page_aligned(nbytes: int) -> Tensor:
    """New memory that starts at a page boundary: uint8 [nbytes]."""
    memory = mmap.mmap(-1, nbytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
