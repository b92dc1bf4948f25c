"""Which rows of a step belong to which sequence, and where the KV cache has each sequence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """What `attention` and `write_latents` need to know of the B sequences whose tokens a step computes.

    The tokens of a sequence are neighbouring rows. How many there are is known on the host, since it shapes the step;
    lengths and block numbers are read by kernels, so that a recorded or captured step can be replayed at the next
    positions. The tensors are on the device of the layers that use them.

    Attributes:
        block_tables: int64 [B, 1 + n]: for each sequence the number of positions before its tokens of this step, then
            its block numbers; entries past a sequence's blocks are ignored.
        offsets: int64 [B + 1]: the first row of each sequence, then the number of rows.
        counts: the tokens of each sequence.
        absorbed: the form of attention of each sequence: computed in latent space (cheaper for few queries), or from
            rebuilt keys and values (for many).
    """

    block_tables: Tensor
    offsets: Tensor
    counts: tuple[int, ...]
    absorbed: tuple[bool, ...]

    @classmethod
    def of(cls, block_tables: Tensor, counts: Sequence[int], absorbed: Sequence[bool]) -> "AttentionMetadata":
        """The metadata of sequences with these block tables, numbers of tokens, and forms of attention."""
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int64)
        return cls(block_tables, offsets.to(block_tables.device), tuple(counts), tuple(absorbed))

    def sequences(self) -> Iterator[tuple[slice, Tensor, bool]]:
        """For each sequence with tokens in this step: their rows, the block table [1 + n], and whether it is absorbed.

        Consecutive rows, in order.
        """
        bounds = pairwise([0, *accumulate(self.counts)])
        for (first, end), table, absorbed in zip(bounds, self.block_tables, self.absorbed, strict=True):
            if end > first:
                yield slice(first, end), table, absorbed
