"""The experts in one device's memory: the slots of the expert cache, staging buffers, and copies in progress.

All hazards between copies and work are handled here: work waits for the copies of the records it reads, and a copy
waits for the work that reads the records it overwrites.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice

from torch import Tensor

from dsv2_local.errors import DeviceError
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.offload.device import Device, Event
from dsv2_local.offload.expert_cache import COPIES, ExpertCache, Key
from dsv2_local.offload.sizes import STAGING_BUFFERS


class ExpertSlots:
    """Expert records in a device's memory, by index: first the slots of `cache`, then the staging buffers.

    Attributes:
        records: uint8 [slots + STAGING_BUFFERS · buffer, layout.nbytes], on the device.
        buffer: experts that one staging buffer holds.
        fetched: bytes copied over the PCIe link so far.
        fetch_seconds: duration of the copies that are known to be done.
    """

    def __init__(self, device: Device, layout: ExpertLayout, cache: ExpertCache, buffer: int) -> None:
        """Allocate the records.

        Raises:
            DeviceMemoryError: the device has less memory than they need.
        """
        self.device, self.cache, self.buffer, self._nbytes = device, cache, buffer, layout.nbytes
        records = cache.slots + STAGING_BUFFERS * buffer
        self.records = device.allocate(records * layout.nbytes).view(records, layout.nbytes)
        self._record = list(self.records)  # views made once, since a decoded token uses hundreds
        self.fetched, self.fetch_seconds = 0, 0.0
        self._next_buffer = 0
        self._last: Event | None = None  # the work queued last
        self._arrivals: dict[int, Event] = {}  # by index: the copy of a record, until it is known to be done
        self._copies: dict[Event, int] = {}  # copies not yet known to be done, and their bytes
        self._readers: dict[int, Event] = {}  # by index: the last work that reads a record

    @property
    def staged(self) -> int:
        """Experts that all staging buffers hold together."""
        return STAGING_BUFFERS * self.buffer

    def fetch(self, layer: int, source: Tensor, experts: Sequence[int], free_only: bool) -> dict[int, int]:
        """Start copying experts that have no slot, and return the index of each one's record.

        Experts that the cache admits go to slots, pinned until released; the others go to the next staging buffer.
        Records that are adjacent on both sides are one copy.

        Args:
            layer: number of the layer.
            source: uint8 [E, layout.nbytes], the layer's records in RAM.
            experts: experts to copy, at most `buffer`, ascending.
            free_only: admit experts to free slots only, without evicting others.
        """
        start = staging = self.cache.slots + self._next_buffer * self.buffer
        indices = {}
        for expert in experts:
            if admission := self.cache.admit((layer, expert), free_only):
                indices[expert] = admission.slot
            else:
                indices[expert] = staging
                staging += 1
        if staging > start:
            self._next_buffer = (self._next_buffer + 1) % STAGING_BUFFERS
        if indices:
            self._copy(indices, source)
            self.cache.counts[layer, COPIES] += len(indices)
        return indices

    def fill(self, records: dict[int, Tensor], keys: Iterable[Key]) -> None:
        """Copy the first of these experts to the free slots, and wait for the copies.

        Args:
            records: uint8 [E, layout.nbytes] in RAM, by layer.
            keys: experts, the most valuable first.
        """
        # In reverse, so that the most valuable expert is the most recently used.
        for layer, expert in reversed(list(islice(keys, self.cache.slots - len(self.cache)))):
            self.fetch(layer, records[layer], [expert], free_only=True)
        self.finish_copies()
        self.cache.release()

    def compute(self, work: Callable[[], None], reads: Collection[int] = (), after: Sequence[Event] = ()) -> Event:
        """Queue work that reads the records at these indices, to run after their copies and the events in `after`."""
        event = self._last = self.device.compute(work, [*_of(reads, self._arrivals), *after])
        for index in reads:
            self._readers[index] = event
        return event

    def settle(self) -> tuple[int, float]:
        """Forget copies and work that are done; returns the bytes and the seconds of those copies."""
        if self._last and self._last.done:  # then all work before it is done too
            self._readers.clear()
        if not self._copies:
            return 0, 0.0
        nbytes, seconds = 0, 0.0
        for event in [event for event in self._copies if event.done]:
            nbytes += self._copies.pop(event)
            seconds += event.seconds
        self.fetch_seconds += seconds
        for index in [index for index, event in self._arrivals.items() if event.done]:
            del self._arrivals[index]
        return nbytes, seconds

    def finish_copies(self) -> None:
        """Wait for all copies in progress, and forget them and the work that read their targets before."""
        for event in self._copies:
            event.wait()
        self.settle()
        self._readers.clear()

    def count_fetched(self, experts: int, seconds: float) -> None:
        """Count copies that native code made."""
        self.fetched += experts * self._nbytes
        self.fetch_seconds += seconds

    def drop_failed(self) -> None:
        """Wait for all copies and work in progress, and evict the experts whose copies failed."""
        for index in [index for index, event in self._arrivals.items() if _failed(event)]:
            if index < self.cache.slots and (key := self.cache.holder(index)):
                self.cache.evict(key)
        for event in {*self._copies, *self._readers.values()}:
            if _failed(event):
                self._copies.pop(event, None)
        self._arrivals.clear()
        self._readers.clear()

    def _copy(self, indices: dict[int, int], source: Tensor) -> None:
        targets, sources = [], []
        for expert, count in _runs(indices):
            index = indices[expert]
            targets.append(self._record[index] if count == 1 else self.records[index : index + count])
            sources.append(source[expert] if count == 1 else source[expert : expert + count])
        event = self.device.copy(targets, sources, _of(indices.values(), self._readers))
        for index in indices.values():
            self._arrivals[index] = event
        nbytes = len(indices) * self._nbytes
        self._copies[event] = nbytes
        self.fetched += nbytes


def _of(indices: Collection[int], events: dict[int, Event]) -> list[Event]:
    """The events of these indices, without duplicates."""
    found = [event for index in indices if (event := events.get(index))] if events else []
    return found if len(found) < 2 else list(dict.fromkeys(found))


def _failed(event: Event) -> bool:
    """Wait for an event; whether it failed."""
    try:
        event.wait()
    except DeviceError:
        return True
    return False


def _runs(indices: dict[int, int]) -> Iterable[tuple[int, int]]:
    """Runs of experts that are adjacent both in RAM and on the device: (first expert, count)."""
    first, count = -1, 0
    for expert, index in indices.items():
        if count and expert == first + count and index == indices[first] + count:
            count += 1
        else:
            if count:
                yield first, count
            first, count = expert, 1
    if count:
        yield first, count
