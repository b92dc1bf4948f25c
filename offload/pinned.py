"""Experts in page-locked RAM, from which a GPU copies at the link's full speed."""

import mmap

import torch
from torch import Tensor

from dsv2_local.offload.device import Device
from dsv2_local.progress import Progress


class PinnedArena:
    """Copies of experts in page-locked RAM, from which a link runs at its full speed.

    Whole layers are locked as far as the budget goes and the system allows; the others stay mapped from their files, so
    that their pages are read from disk when they are needed and given back under pressure.

    Attributes:
        records: uint8 [E, record bytes] by layer, locked or mapped.
        locked: bytes that are locked.
        refused: whether the system refused to lock what the budget allowed.
    """

    def __init__(self, mapped: dict[int, Tensor], device: Device, budget: int, progress: Progress) -> None:
        """`progress` is called with (bytes locked, bytes to lock)."""
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
        """Unlock all of it; the records stay readable."""
        for copy in self._copies:
            self._device.unlock(copy)
        self._copies.clear()
        self.locked = 0


def _page_aligned(nbytes: int) -> Tensor:
    """Fresh memory that begins with a page: uint8 [nbytes]."""
    memory = mmap.mmap(-1, nbytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
