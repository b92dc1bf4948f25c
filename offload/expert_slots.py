"""The experts in one device's memory: slots that keep them, staging buffers that they pass through, copies under way.

All hazards between copies and work are settled here: work waits for the copies of what it reads, and a copy waits for
the work that read what it overwrites.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice

from torch import Tensor

from dsv2_local.errors import DeviceError
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.offload.device import Device, Event
from dsv2_local.offload.expert_cache import ExpertCache, Key, Policy
from dsv2_local.offload.sizes import STAGING_BUFFERS


class ExpertSlots:
    """Records of experts in a device's memory, by index: first the slots of `cache`, then the staging buffers.

    Attributes:
        records: uint8 [slots + 3 · buffer, layout.nbytes], on the device.
        buffer: experts that a staging buffer holds.
        fetched: bytes that were sent over the link so far.
        fetch_seconds: what those copies took that are known to be done.
    """

    def __init__(self, device: Device, layout: ExpertLayout, slots: int, buffer: int, policy: Policy) -> None:
        """Allocates; raises DeviceMemoryError."""
        self.device, self.buffer, self._nbytes = device, buffer, layout.nbytes
        self.cache = ExpertCache(slots, policy)
        records = slots + STAGING_BUFFERS * buffer
        self.records = device.allocate(records * layout.nbytes).view(records, layout.nbytes)
        self._record = list(self.records)  # a view of each, since a decoded token takes hundreds
        self.fetched, self.fetch_seconds = 0, 0.0
        self._turn = 0
        self._last: Event | None = None  # of the work that was given
        self._arrivals: dict[int, Event] = {}  # by index, until they are known to have come
        self._copies: dict[Event, int] = {}  # not yet known to be done, and their bytes
        self._readers: dict[int, Event] = {}  # by index: the last work that reads it
        self._keys: dict[int, Key] = {}  # of indices that are slots

    def fetch(self, layer: int, source: Tensor, experts: Sequence[int], free_only: bool) -> dict[int, int]:
        """Begin to copy experts that have no slot; returns the index of each.

        They go into slots where the policy admits them (to free ones alone, if `free_only`), pinned until released,
        and into the next staging buffer otherwise; neighbours are one copy.

        Args:
            layer: of the model.
            source: uint8 [E, layout.nbytes], the layer's records in RAM.
            experts: at most `buffer`, ascending.
            free_only: see above.
        """
        start = staging = self.cache.slots + self._turn * self.buffer
        indices = {}
        for expert in experts:
            if admission := self.cache.admit((layer, expert), free_only):
                indices[expert] = admission.slot
                self._keys[admission.slot] = (layer, expert)
            else:
                indices[expert] = staging
                staging += 1
        if staging > start:
            self._turn = (self._turn + 1) % STAGING_BUFFERS
        if indices:
            self._copy(indices, source)
        return indices

    def fill(self, records: dict[int, Tensor], keys: Iterable[Key]) -> None:
        """Give the free slots to the first of these experts, and wait for their copies.

        `records`: uint8 [E, record bytes] in RAM, by layer.
        """
        for layer, expert in reversed(list(islice(keys, self.cache.slots - len(self.cache)))):  # the best is used last
            self.fetch(layer, records[layer], [expert], free_only=True)
        for event in self._copies:
            event.wait()
        self.cache.release()
        self.settle()

    def compute(self, work: Callable[[], None], reads: Collection[int] = (), after: Sequence[Event] = ()) -> Event:
        """Give the device work that reads the records at these indices, for when the events are done, too."""
        event = self._last = self.device.compute(work, [*_of(reads, self._arrivals), *after])
        for index in reads:
            self._readers[index] = event
        return event

    def settle(self) -> tuple[int, float]:
        """Forget the copies and the work that are done; the bytes of those copies, and the seconds that they took."""
        if self._last and self._last.done:  # and so is all work before it
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

    def drop_failed(self) -> None:
        """Wait for all copies and work under way, and give up the slots of those experts whose copies failed."""
        for index in [index for index, event in self._arrivals.items() if _failed(event)]:
            key = self._keys.get(index)
            if key and self.cache.peek(key) == index:
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
    """The events of these indices, each once."""
    found = [event for index in indices if (event := events.get(index))] if events else []
    return found if len(found) < 2 else list(dict.fromkeys(found))


def _failed(event: Event) -> bool:
    """How it ended, once it has."""
    try:
        event.wait()
    except DeviceError:
        return True
    return False


def _runs(indices: dict[int, int]) -> Iterable[tuple[int, int]]:
    """Experts that are neighbours in RAM and on the device: (the first, how many)."""
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
