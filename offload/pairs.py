"""Which expert works for which token in a step, arranged so that experts at one place lie together."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Pairs:
    """The T · K pairs of a token and an expert, sorted by group of experts, then by expert, then by token.

    Attributes:
        tokens, experts: int64 [T · K].
        order: int64 [T, K], a token's choices by ascending number of their experts.
        rows: int64 [T, K], where those pairs stand.
        parts: where the pairs of each group stand.
    """

    def __init__(self, ids: Ints, groups: Sequence[Iterable[int]], experts: int) -> None:
        """`ids` [T, K] are the experts of each token, of `experts` in all; each of them is in one of the groups."""
        T, K = ids.shape
        number = np.zeros(experts, dtype=np.int64)
        for group, members in enumerate(groups):
            number[list(members)] = group
        flat = ids.ravel()
        group_of = number[flat]
        sorting = (group_of * experts + flat).argsort(kind="stable")
        place = np.empty(T * K, dtype=np.int64)
        place[sorting] = np.arange(T * K)
        self.tokens, self.experts = sorting // K, flat[sorting]
        self.order = ids.argsort(axis=1)
        self.rows = place[self.order + np.arange(0, T * K, K)[:, None]]
        ends = np.bincount(group_of, minlength=len(groups)).cumsum().tolist()
        self.parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
