"""A sequence: its tokens, and the blocks of the KV cache that hold them. Pure Python and numpy, no torch."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dsv2_local.errors import ContextLengthError
from dsv2_local.runtime.block_pool import BlockPool


class Sequence:
    """Tokens, and the block table of those that are computed.

    A step reserves blocks, writes its tokens layer by layer at `length` and advances once, so a step that fails half
    way leaves the sequence as it was.

    Attributes:
        tokens: all tokens so far, also those that are not computed yet.
        prompt: how many of them, the first ones, are the prompt, which is computed in chunks.
        context: the most tokens that it may have.
        length: how many of `tokens`, the first ones, are in the KV cache.
        anchor: where the first chunk of the prompt began, after what was reused of another sequence.
        needed: the first token whose output is needed, so that it is computed although the prefix cache has it; None:
            the last one.
        restored: how many of the reused tokens were brought back from the block store.
    """

    def __init__(self, pool: BlockPool, context: int, tokens: Iterable[int] = ()) -> None:
        """A sequence that holds no blocks yet; `LatentCache.new_sequence` makes one for its own pool."""
        self.tokens, self.context, self.length, self.anchor = list(tokens), context, 0, 0
        self.prompt, self.restored = len(self.tokens), 0
        self.needed: int | None = None
        self._pool, self._size = pool, pool.block_size
        self._blocks: list[int] = []
        self._shared = 0  # how many of the first blocks are also cached or held by others, and must not be written
        self._table = np.zeros(8, dtype=np.int64)  # grows with the blocks

    @property
    def blocks(self) -> tuple[int, ...]:
        """Its blocks, in the order of their tokens; the last ones may be reserved and empty."""
        return tuple(self._blocks)

    @property
    def block_table(self) -> NDArray[np.int64]:
        """`length`, then the block numbers: a view that changes with the sequence."""
        self._table[0] = self.length
        return self._table[: 1 + len(self._blocks)]

    def match_prefix(self, most: int | None = None) -> int:
        """Take over the longest cached prefix of the first `most` tokens (None: of all); returns its length.

        Blocks that the sequence held are released first. What the block store has of the tokens is cached before.
        """
        self.release()
        self.restored = self._pool.restore(self.tokens[:most])
        self._blocks, self.length = self._pool.match(self.tokens[:most])
        self._shared = len(self._blocks)
        self._write_table(0)
        return self.length

    @property
    def reusable(self) -> int:
        """How many tokens, the first ones, may come from the prefix cache: those before `needed`."""
        last = len(self.tokens) - 1
        return last if self.needed is None else min(last, self.needed)

    def begin(self) -> int:
        """Reuse what the prefix cache has of the prompt, before its first chunk; returns the number of tokens."""
        self.anchor = self.match_prefix(min(self.prompt - 1, self.reusable))
        return self.anchor

    def resume(self) -> int:
        """Reuse what the prefix cache has of all tokens, after the blocks were lost; returns the number of tokens."""
        return self.match_prefix(self.reusable)

    def foresee(self) -> tuple[int, int]:
        """What `resume` would find, and how many blocks all tokens would then take.

        Returns:
            The number of tokens that are cached or in the block store, and the number of blocks that the pool would
            have available no longer once every token is computed. Blocks that other sequences hold anyway do not count.
            Nothing is changed.
        """
        blocks, matched, foreseen = self._pool.find(self.tokens[: self.reusable])
        whole = matched // self._size
        taken = sum(not self._pool.references(block) for block in blocks[:whole])
        return foreseen, taken + -(-len(self.tokens) // self._size) - whole

    def next_chunk(self, size: int, length: int | None = None) -> tuple[int, int]:
        """How many tokens to compute next, and how many the chunk has that they belong to.

        `length` is how many tokens are computed then (None: as many as now).

        The chunks of a prompt have `size` tokens from `anchor` on, whatever else is computed meanwhile. If a sequence
        has lost its blocks, it computes what is left of a chunk. The size of the chunk decides the form of attention,
        so the results have the same bits in any case. Tokens after the prompt were computed one by one (1).
        """
        length = self.length if length is None else length
        if length >= self.prompt:
            return min(size, len(self.tokens) - length), 1
        first = self.anchor + (length - self.anchor) // size * size
        start, end = max(0, first), min(first + size, self.prompt)
        return end - length, end - start

    def insert_prefix(self, *, whole_blocks: bool = False) -> None:
        """Put the computed tokens into the prefix cache, for other sequences that begin like this one.

        Args:
            whole_blocks: leave out a last block that is filled in part, which this sequence goes on to write.
        """
        length = self.length // self._size * self._size if whole_blocks else self.length
        used = self._blocks[: -(-length // self._size)]
        self._pool.insert(self.tokens[:length], used)
        self._shared = max(self._shared, len(used))

    def release(self) -> None:
        """Give back all blocks; the tokens stay."""
        before = self._blocks
        self._blocks, self._shared, self.length = [], 0, 0
        self._pool.release(before)

    def lacking(self, tokens: int) -> int:
        """How many blocks `reserve` allocates for `tokens` more tokens, a copy of a shared one included."""
        full = self.length // self._size
        kept = full if full < self._shared else len(self._blocks)
        return max(0, -(-(self.length + tokens) // self._size) - kept)

    def fits(self, tokens: int) -> bool:
        """Whether the pool has the blocks that `reserve` needs for `tokens` more tokens.

        It may need fewer than `lacking` says: a shared block that no other sequence holds is not copied if no block is
        available, and what lies behind `length` is given back first.
        """
        lacking, available = self.lacking(tokens), self._pool.available
        if lacking <= available or self.length // self._size >= self._shared:
            return lacking <= available
        alone = [self._pool.references(block) == 1 for block in self._blocks[self.length // self._size :]]
        return lacking - sum(alone) <= available

    def reserve(self, tokens: int) -> None:
        """Take private blocks, which no other sequence reads, for `tokens` more tokens.

        Raises:
            ContextLengthError: the tokens do not fit in the context.
            CacheFullError: other sequences hold all blocks; the sequence is still as long as it was.
        """
        if self.length + tokens > self.context:
            raise ContextLengthError(self.length + tokens, self.context)
        if self.length // self._size < self._shared:
            self._copy_on_write()
        count = len(self._blocks)
        try:
            while len(self._blocks) * self._size < self.length + tokens:
                self._blocks.append(self._pool.allocate())
        finally:
            self._write_table(count)

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has written."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Let only the first `length` tokens count as computed; the blocks stay reserved."""
        self.length = min(self.length, length)

    def _copy_on_write(self) -> None:
        """Make the blocks from `length` on private: copy the one that is filled in part, release the others."""
        full, keep = self.length // self._size, -(-self.length // self._size)
        rest = self._blocks[keep:]
        self._blocks, self._shared = self._blocks[:keep], min(self._shared, keep)
        self._pool.release(rest)
        if full < keep:
            self._blocks[full] = self._pool.private(self._blocks[full])
        self._shared = full
        self._write_table(full)

    def _write_table(self, first: int) -> None:
        """Write the block numbers from index `first` on to the block table."""
        if new := self._blocks[first:]:
            end = 1 + len(self._blocks)
            if end > len(self._table):
                self._table = np.concatenate((self._table, np.zeros(end, dtype=np.int64)))
            self._table[1 + first : end] = new
