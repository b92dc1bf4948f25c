"""Which expert works for which token in a step, arranged so that experts at one place lie together."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Pairs:
    """The T · K pairs of a token and an expert, sorted by group of experts, then by expert, then by token.

    Attributes:
        tokens, experts: int64 [T · K].
        order: int64 [T, K], a token's choices by ascending number of their experts.
        rows: int64 [T, K], where those pairs stand.
    """

    def __init__(self, ids: Ints, group_of: Ints) -> None:
        """`ids` [T, K] are the experts of each token, `group_of` [E] the group of each expert, from 0."""
        T, K = ids.shape
        flat = ids.ravel()
        keys = group_of[flat] * len(group_of) + flat
        sorting = keys.argsort(kind="stable")
        place = np.empty(T * K, dtype=np.int64)
        place[sorting] = np.arange(T * K)
        self.tokens, self.experts = sorting // K, flat[sorting]
        self.order = ids.argsort(axis=1)
        self.rows = np.take_along_axis(place.reshape(T, K), self.order, axis=1)
        self._groups = group_of[self.experts]

    def part(self, group: int) -> slice:
        """Where the pairs of a group stand."""
        start, stop = self._groups.searchsorted((group, group + 1))
        return slice(int(start), int(stop))
