"""The token-expert pairs of a step of many tokens, sorted by expert on their device, so that the host need not wait.

`Dispatch` sorts on the host, which divides pairs among places. If all experts of a layer compute on the device, the
host needs only the number of pairs of each expert.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dsv2_local.offload.device import Event
from dsv2_local.offload.expert_slots import ExpertSlots


class SortedPairs:
    """The T · K pairs of a step in the order of their experts, and of their tokens for each expert.

    Attributes:
        tokens: int64 [T · K] on the device, the token of each pair.
        rows: int64 [T, K] on the device, the position of each token's k-th pair in that order.
    """

    def __init__(self, slots: ExpertSlots, ids: Tensor, experts: int) -> None:
        """Queue the sorting of `ids`, int64 [T, K] on the device of `slots`, each below `experts`."""
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        places = torch.arange(len(flat), device=ids.device)
        self.tokens = order // ids.shape[1]
        self.rows = torch.empty_like(order).scatter_(0, order, places).view(ids.shape)
        counts = torch.zeros(experts, dtype=torch.int64, device=ids.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat))  # torch.bincount would wait for the device
        self._counts = slots.device.page_locked((experts,), torch.int64)

        def copy() -> None:
            self._counts.copy_(counts, non_blocking=True)

        self._copied: Event = slots.compute(copy)

    def counts(self) -> list[int]:
        """The number of pairs of each expert; waits until the device has counted them.

        Raises:
            DeviceError: the device failed.
        """
        self._copied.wait()
        counts: list[int] = self._counts.tolist()
        return counts


def runs_of(counts: Iterable[tuple[int, int]], most: int) -> list[list[tuple[int, int]]]:
    """Divide successive runs of pairs, (index, number of pairs), into lists of at most `most` pairs; none is empty."""
    lists: list[list[tuple[int, int]]] = []
    room = 0
    for index, count in counts:
        while count:
            if not room:
                lists.append([])
                room = most
            taken = min(count, room)
            lists[-1].append((index, taken))
            count, room = count - taken, room - taken
    return lists
