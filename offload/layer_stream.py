"""Streams whole layers of experts through the staging buffers, ahead of the layer that computes."""

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from dsv2_local.offload.expert_slots import ExpertSlots
from dsv2_local.offload.sizes import STAGING_BUFFERS


@dataclass
class _Group:
    """Consecutive experts of a layer; those without a slot fit in one staging buffer."""

    layer: int
    experts: list[int]
    indices: dict[int, int] | None = None  # index of each expert's record, once the copies have started


class LayerStream:
    """A queue of the groups of successive layers; copies of its first `STAGING_BUFFERS` groups are in progress."""

    def __init__(self, slots: ExpertSlots, records: dict[int, Tensor]) -> None:
        """`records`: uint8 [E, record bytes] in RAM, by layer, ascending."""
        self._slots, self._records = slots, records
        self._groups: deque[_Group] = deque()

    def enter(self, layer: int) -> list[list[int]]:
        """Start the copies of a layer unless they have started already -> the experts of each of its groups."""
        if not self._groups or self._groups[0].layer != layer:
            self._groups = deque(self._grouped(layer))
        self.advance()
        return [group.experts for group in self._groups if group.layer == layer]

    def take(self) -> dict[int, int]:
        """Remove the next group from the queue -> the index of each of its experts in the device's records."""
        indices = self._groups.popleft().indices
        assert indices is not None, "a group was taken before its copies started"
        return indices

    def advance(self) -> None:
        """Start the copies that the staging buffers have room for; call it when work on the last group is queued."""
        later = [layer for layer in self._records if not self._groups or layer > self._groups[-1].layer]
        while len(self._groups) < STAGING_BUFFERS and self._groups and later:
            self._groups.extend(self._grouped(later.pop(0)))
        for group in list(self._groups)[:STAGING_BUFFERS]:
            if group.indices is None:
                group.indices = self._start_copies(group)

    def reset(self) -> None:
        """Drop all groups: the next step does not stream."""
        self._groups.clear()

    def _grouped(self, layer: int) -> list[_Group]:
        groups, missing = [_Group(layer, [])], 0
        for expert in range(len(self._records[layer])):
            without = self._slots.cache.peek((layer, expert)) is None
            if missing + without > self._slots.buffer:
                groups.append(_Group(layer, []))
                missing = 0
            groups[-1].experts.append(expert)
            missing += without
        return groups

    def _start_copies(self, group: _Group) -> dict[int, int]:
        slots = {expert: self._slots.cache.peek((group.layer, expert)) for expert in group.experts}
        missing = [expert for expert, slot in slots.items() if slot is None]
        fetched = self._slots.fetch(group.layer, self._records[group.layer], missing, free_only=True)
        return {expert: fetched[expert] if slot is None else slot for expert, slot in slots.items()}
