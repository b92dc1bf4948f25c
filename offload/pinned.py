"""Experts in page-locked (pinned) RAM, from which a GPU copies at the full speed of the PCIe link."""

import mmap
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from dsv2_local.offload.device import Device
from dsv2_local.progress import Progress


class PinnedArena:
    """Expert records in page-locked RAM: copies of mapped files (`copy`), or records built in its memory (`lock`).

    Attributes:
        records: uint8 [E, record bytes] by layer, page-locked or not.
        locked: bytes of page-locked records.
        refused: whether the system refused to lock memory.
    """

    def __init__(self, device: Device) -> None:
        """An empty arena, whose memory `device` locks."""
        self.records: dict[int, Tensor] = {}
        self.locked, self.refused = 0, False
        self._device, self._locked = device, list[Tensor]()

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(records.nbytes for records in self.records.values())

    def copy(self, mapped: Mapping[int, Tensor], budget: int, progress: Progress) -> None:
        """Copy and lock the first layers, as many as fit in the budget and as the system allows to lock.

        The other layers stay mapped from their files: their pages are read from disk when needed and can be evicted
        under memory pressure.

        Args:
            mapped: uint8 [E, record bytes] by layer, mapped from files.
            budget: bytes to lock at most.
            progress: called with bytes locked so far, and bytes to lock.
        """
        self.records |= mapped
        wanted = min(budget, sum(records.nbytes for records in mapped.values()))
        for layer, records in mapped.items():
            if self.locked + records.nbytes > wanted or self.refused:
                break
            progress(self.locked, wanted)
            memory = self.allocate(records.nbytes).view(records.shape)
            if self._lock(memory):  # before it is filled, so that a refusal costs nothing
                self.records[layer] = memory.copy_(records)
        progress(self.locked, wanted)

    @staticmethod
    def allocate(nbytes: int) -> Tensor:
        """New memory that starts at a page boundary, in huge pages if the system has them: uint8 [nbytes].

        Processes that are forked do not inherit it: the kernel would copy locked pages for them.
        """
        # Private: shared memory, Python's default, rarely gets huge pages, and small pages take much longer to lock.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
            with suppress(OSError):  # a kernel without it
                memory.madvise(advice)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def lock(self, layer: int, records: Tensor) -> None:
        """Take over a layer's records, uint8 [E, record bytes] in memory of `allocate`, and lock them in place.

        Fill them first: then all threads that fill find their pages, and not the one that locks. If the system refuses,
        they stay in the arena unlocked, and no further layer is tried.
        """
        self.records[layer] = records
        if not self.refused:
            self._lock(records)

    def _lock(self, memory: Tensor) -> bool:
        if not self._device.lock(memory):
            self.refused = True
            return False
        self._locked.append(memory)
        self.locked += memory.nbytes
        return True

    def close(self) -> None:
        """Unlock all memory; the records stay readable."""
        for memory in self._locked:
            self._device.unlock(memory)
        self._locked.clear()
        self.locked = 0
