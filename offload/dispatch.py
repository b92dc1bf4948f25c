"""Sorts the token-expert pairs of a step so that experts computed in one place are adjacent."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Dispatch:
    """The T · K token-expert pairs of a step, sorted by group of experts, then by expert, then by token.

    Attributes:
        tokens, experts: int64 [T · K], token and expert of each pair.
        rows: int64 [T, K], the position of each token's k-th pair in that order.
        parts: the range of positions of each group.
    """

    def __init__(self, ids: Ints, counts: Mapping[int, int], groups: Sequence[Sequence[int]]) -> None:
        """Sort the pairs.

        Args:
            ids: experts chosen for each token, [T, K].
            counts: number of pairs of each chosen expert.
            groups: the chosen experts, each in one group. With several tokens, groups may hold other experts too.
        """
        members = [*chain.from_iterable(groups)]
        if len(ids) == 1:  # every chosen expert has one pair, so nothing needs sorting, which is faster
            position = dict(zip(members, range(len(members)), strict=True))
            self.tokens, self.experts = np.zeros(len(members), dtype=np.int64), np.array(members, dtype=np.int64)
            self.rows = np.array([[position[expert] for expert in ids[0].tolist()]])
            ends: Sequence[int] = range(len(members) + 1)
        else:
            rank = np.empty(1 + max(members), dtype=np.int64)
            rank[members] = np.arange(len(members))
            flat = ids.ravel()
            sorting = rank[flat].argsort(kind="stable")
            rows = np.empty_like(sorting)
            rows[sorting] = np.arange(len(flat))
            self.tokens, self.experts, self.rows = sorting // ids.shape[1], flat[sorting], rows.reshape(ids.shape)
            ends = [0, *accumulate(counts.get(expert, 0) for expert in members)]
        starts = [0, *accumulate(map(len, groups))]
        self.parts = [slice(ends[a], ends[b]) for a, b in pairwise(starts)]
