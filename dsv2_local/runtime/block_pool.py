"""The block pool and the prefix cache: which sequences hold which block of the KV cache, and which prompts reuse it.

Pure Python, no torch. A block has room for the latents of `CACHE_BLOCK` tokens in every layer. Blocks are reference
counted, and several sequences may share one; a shared block is never written (`Sequence` copies it on write). A
cached block that no sequence holds stays in the prefix cache until it is evicted, the least recently used first.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsv2_local.errors import CacheFullError
from dsv2_local.kernels.format import CACHE_BLOCK


@dataclass(eq=False, slots=True)
class _Node:
    """A cached block in the prefix tree; its tokens follow those of its parents."""

    block: int
    tokens: tuple[int, ...]
    parent: "_Node | None"
    children: "dict[tuple[int, ...], _Node]" = field(default_factory=dict)
    """Children by their tokens. Only a full block has children."""
    order: list[tuple[int, ...]] = field(default_factory=list)
    """The tokens of the children, sorted: those that have most in common with a text stand beside its place."""

    def beside(self, part: tuple[int, ...]) -> "list[_Node]":
        """The children before and after the place that `part` has, or would have, in their order."""
        at = bisect_left(self.order, part)
        return [self.children[tokens] for tokens in self.order[max(0, at - 1) : at + 1]]


class PrefixTree:
    """The index of the prefix cache: finds cached blocks by their tokens and all tokens before them.

    Tokens are compared one by one, not by hash, so there are no false matches.
    """

    def __init__(self, block_size: int = CACHE_BLOCK) -> None:
        self._size = block_size
        self._root = _Node(-1, (), None)
        self._nodes: dict[int, _Node] = {}  # by block

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Find the longest cached prefix of `tokens`; returns its blocks, and its length in tokens.

        The last block may match in part: it then has other tokens after the common ones.
        """
        node, blocks, matched = self._root, [], 0
        part = tuple(tokens[: self._size])
        while part and (child := node.children.get(part)):
            node, matched = child, matched + len(part)
            blocks.append(node.block)
            part = tuple(tokens[matched : matched + self._size])
        common = {child.block: _common_length(child.tokens, part) for child in node.beside(part)}
        best = max(common, key=lambda block: common[block], default=None)
        if best is not None and common[best]:
            blocks.append(best)
            matched += common[best]
        return blocks, matched

    def insert(self, tokens: Sequence[int], blocks: Sequence[int]) -> list[int]:
        """Add `blocks`, which hold `tokens`; returns the blocks that were removed because a new one holds more.

        If the same tokens are already cached in another block, that block stays and the new one is not added.
        """
        node, removed = self._root, list[int]()
        for start, block in zip(range(0, len(tokens), self._size), blocks, strict=True):
            part = tuple(tokens[start : start + self._size])
            child = node.children.get(part) or self._add(node, part, block, removed)
            if child is None:
                break
            node = child
        return removed

    def remove(self, block: int) -> list[int]:
        """Remove a block and its descendants, which cannot be matched without it; returns all removed blocks."""
        first = self._nodes[block]
        assert first.parent
        del first.parent.children[first.tokens]
        del first.parent.order[bisect_left(first.parent.order, first.tokens)]
        removed, remaining = list[int](), [first]
        while remaining:
            node = remaining.pop()
            remaining += node.children.values()
            del self._nodes[node.block]
            removed.append(node.block)
        return removed

    def clear(self) -> list[int]:
        """Remove all blocks; returns them."""
        return [block for node in list(self._root.children.values()) for block in self.remove(node.block)]

    def _add(self, parent: _Node, part: tuple[int, ...], block: int, removed: list[int]) -> _Node | None:
        """Add a block, in place of blocks whose tokens are a prefix of its own (appended to `removed`).

        None if another block already has these tokens and more, or `block` is in the tree already.
        """
        if block in self._nodes:
            return None
        for other in parent.beside(part):  # no child is the beginning of another, so no others can be alike
            if other.tokens[: len(part)] == part:
                return None
            if part[: len(other.tokens)] == other.tokens:
                removed += self.remove(other.block)
        node = parent.children[part] = self._nodes[block] = _Node(block, part, parent)
        insort(parent.order, part)
        return node


def _no_copy(source: int, target: int) -> None:
    """The copy of blocks that have no contents."""


class BlockPool:
    """Block numbers 0 … `count` - 1: free, held by sequences (counted references), or cached for a later prompt."""

    def __init__(
        self, count: int, block_size: int = CACHE_BLOCK, copy: Callable[[int, int], object] = _no_copy
    ) -> None:
        """A pool of free blocks; `copy` is called with the numbers of two blocks to copy the first to the second."""
        self.count, self.block_size, self._copy = count, block_size, copy
        self.prefixes = PrefixTree(block_size)
        self._free = list(range(count))[::-1]
        self._references = [0] * count  # for each block, the number of sequences that hold it
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached and not held, the least recently used first

    @property
    def available(self) -> int:
        """Number of blocks that `allocate` can return: free ones, and cached ones that it can evict."""
        return len(self._free) + len(self._evictable)

    def allocate(self) -> int:
        """Allocate a block with a reference count of 1; evicts a cached block if none is free.

        Raises:
            CacheFullError: sequences hold all blocks.
        """
        if not self._free:
            if not self._evictable:
                raise CacheFullError(self.count * self.block_size)
            self._reclaim(self.prefixes.remove(next(iter(self._evictable))))
        block = self._free.pop()
        self._references[block] = 1
        return block

    def private(self, block: int) -> int:
        """A block with the contents of `block`, which the caller holds, that no other sequence reads.

        That is a copy, in exchange for the reference to `block`; or `block` itself if the caller alone holds it and no
        other is available, which takes it out of the prefix cache.

        Raises:
            CacheFullError: sequences hold all blocks.
        """
        try:
            copy = self.allocate()
        except CacheFullError:
            if self._references[block] > 1:
                raise
            if block in self.prefixes:
                self._reclaim(self.prefixes.remove(block))
            return block
        self._copy(block, copy)
        self.release([block])
        return copy

    def references(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._references[block]

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Find the longest cached prefix of `tokens` (see `PrefixTree.match`), and add a reference to its blocks."""
        blocks, matched = self.prefixes.match(tokens)
        for block in blocks:
            self._references[block] += 1
            self._evictable.pop(block, None)
        return blocks, matched

    def insert(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Put a sequence's blocks, which hold `tokens`, into the prefix cache; from now on they must not be written."""
        self._reclaim(self.prefixes.insert(tokens, blocks))

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of `blocks`, which are in the order of their tokens."""
        for block in reversed(blocks):  # so that the end of a sequence is evicted before its beginning
            self._references[block] -= 1
            if not self._references[block]:
                if block in self.prefixes:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def clear(self) -> None:
        """Empty the prefix cache; blocks that sequences hold stay allocated."""
        self._reclaim(self.prefixes.clear())

    def _reclaim(self, removed: list[int]) -> None:
        """Free the blocks that left the prefix cache, unless sequences still hold them."""
        for block in removed:
            if block in self._evictable:
                del self._evictable[block]
                self._free.append(block)


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
