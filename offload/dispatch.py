"""Which expert works for which token in a step, arranged so that experts at one place lie together."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Dispatch:
    """The T · K pairs of a token and an expert, sorted by group of experts, then by expert, then by token.

    Attributes:
        tokens, experts: int64 [T · K].
        rows: int64 [T, K], where the pair of a token and its k-th expert stands.
        parts: where the pairs of each group stand.
    """

    def __init__(self, ids: Ints, counts: Mapping[int, int], groups: Sequence[Sequence[int]]) -> None:
        """`ids` [T, K] are the experts of each token, `counts` the pairs of each expert in use; `groups` divide those,
        and others, too, where there are several tokens."""
        members = [*chain.from_iterable(groups)]
        if len(ids) == 1:  # decoding, hundreds of times a second: every expert in use has its one pair
            place = dict(zip(members, range(len(members)), strict=True))
            self.tokens, self.experts = np.zeros(len(members), dtype=np.int64), np.array(members, dtype=np.int64)
            self.rows = np.array([[place[expert] for expert in ids[0].tolist()]])
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
