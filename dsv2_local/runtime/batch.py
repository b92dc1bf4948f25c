"""A batch: the tensors that one step reads, for some tokens of one or several sequences."""

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from itertools import accumulate, pairwise

import torch

from dsv2_local.kernels.metadata import AttentionMetadata
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.rope import Rope
from dsv2_local.runtime.sequence import Sequence

Part = tuple[Sequence, Ordered[int]]
"""A sequence, and the tokens of it that a step computes, which follow those that are in the KV cache."""


class Batch:
    """The inputs of a step, apart from the token embeddings.

    How many sequences there are and how many tokens of each shapes the step and is fixed; everything else is written by
    `fill`, before each step that is recorded, captured or replayed with these tensors.

    Attributes:
        counts: tokens of each sequence; T in all.
        ids: int64 [T], the tokens, in RAM.
        rotation: complex64 [T, P/2], the factors of their positions, in RAM.
        layers: for each layer its part of the KV cache, and which rows of the step are where in it.
    """

    def __init__(self, cache: LatentCache, rope: Rope, counts: Ordered[int], absorbed: Ordered[bool]) -> None:
        """Allocate the tensors; `absorbed` is each sequence's form of attention."""
        self.counts = tuple(counts)
        self._rope, self._sequences = rope, list[Sequence]()
        devices = dict.fromkeys(layer.device for layer in cache.layers)
        pinned = any(device.type == "cuda" for device in devices)
        self._tables = torch.zeros(len(self.counts), 1 + cache.pool.count, dtype=torch.int64, pin_memory=pinned)
        self.ids = torch.zeros(sum(self.counts), dtype=torch.int64)
        self.rotation = torch.empty(len(self.ids), rope.pairs, dtype=torch.complex64, pin_memory=pinned)
        self._metadata = {
            device: AttentionMetadata.of(self._tables.to(device), self.counts, absorbed) for device in devices
        }
        self.layers = [(layer, self._metadata[layer.device]) for layer in cache.layers]
        bounds = pairwise([0, *accumulate(self.counts)])
        self.rows = [slice(first, end) for first, end in bounds]
        # The same memory for numpy, whose calls take a fraction of torch's time.
        self._host_tables, self._host_ids = self._tables.numpy(), self.ids.numpy()
        self._host_rotation = self.rotation.numpy()

    def fill(self, parts: Iterable[Part]) -> None:
        """Reserve blocks for the tokens, and write the inputs of the step; as many parts as `counts` says.

        Raises:
            ContextLengthError: a sequence would be longer than its context.
            CacheFullError: there are not enough blocks.
        """
        self._sequences.clear()
        for (sequence, tokens), rows, table in zip(parts, self.rows, self._host_tables, strict=True):
            count, length = len(tokens), sequence.length
            sequence.reserve(count)
            self._sequences.append(sequence)
            blocks = sequence.block_table
            table[: len(blocks)] = blocks
            self._host_ids[rows] = tokens
            self._host_rotation[rows] = self._rope.table(length + count)[length : length + count]
        for metadata in self._metadata.values():
            if metadata.block_tables is not self._tables:
                metadata.block_tables.copy_(self._tables, non_blocking=True)

    def advance(self) -> None:
        """Count the tokens of the step, which every layer has written."""
        for sequence, count in zip(self._sequences, self.counts, strict=True):
            sequence.advance(count)
