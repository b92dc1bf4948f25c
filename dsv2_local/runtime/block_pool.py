"""The block pool and the prefix cache: who holds which block of the KV cache, and which prompts find it again.

Pure Python, no torch. A block has room for the latents of `CACHE_BLOCK` tokens in every layer. Sequences hold blocks by
reference count, and several sequences may share one; a shared block is never written (`LatentCache` copies it on
write). A block that no sequence holds any more stays in the prefix cache, the least recently used one is evicted first.
"""

from collections import OrderedDict
from collections.abc import Sequence
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
    """By their tokens. Only a full block has children."""


class PrefixTree:
    """The prefix cache's index: cached blocks by the tokens in them and all tokens before those.

    Tokens are compared one by one, not by hash, so there are no false matches.
    """

    def __init__(self, block_size: int = CACHE_BLOCK) -> None:
        self._size = block_size
        self._root = _Node(-1, (), None)
        self._nodes: dict[int, _Node] = {}  # by block

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The longest cached prefix of `tokens`: its blocks, and its length in tokens.

        The last block may match in part: it then holds other tokens after the common ones.
        """
        node, blocks, matched = self._root, [], 0
        part = tuple(tokens[: self._size])
        while part and (child := node.children.get(part)):
            node, matched = child, matched + len(part)
            blocks.append(node.block)
            part = tuple(tokens[matched : matched + self._size])
        common = {child.block: _common_length(child.tokens, part) for child in node.children.values()}
        best = max(common, key=lambda block: common[block], default=None)
        if best is not None and common[best]:
            blocks.append(best)
            matched += common[best]
        return blocks, matched

    def insert(self, tokens: Sequence[int], blocks: Sequence[int]) -> list[int]:
        """Index `blocks`, which hold `tokens`; the blocks that leave the tree for it, because they hold less.

        Where the same tokens are cached in another block already, that one stays.
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
        """Remove a block and its descendants, which are no prompt's prefix without it; all that were removed."""
        first = self._nodes[block]
        assert first.parent
        del first.parent.children[first.tokens]
        removed, remaining = list[int](), [first]
        while remaining:
            node = remaining.pop()
            remaining += node.children.values()
            del self._nodes[node.block]
            removed.append(node.block)
        return removed

    def clear(self) -> list[int]:
        """Remove all blocks; those that were removed."""
        return [block for node in list(self._root.children.values()) for block in self.remove(node.block)]

    def _add(self, parent: _Node, part: tuple[int, ...], block: int, removed: list[int]) -> _Node | None:
        """Add a block in place of any that holds less of the same; None where one holds more, or it is in the tree."""
        if block in self._nodes:
            return None
        for other in list(parent.children.values()):
            if other.tokens[: len(part)] == part:
                return None
            if part[: len(other.tokens)] == other.tokens:
                removed += self.remove(other.block)
        node = parent.children[part] = self._nodes[block] = _Node(block, part, parent)
        return node


class BlockPool:
    """Block numbers 0 … `count` - 1: free, held by sequences (counted references), or cached for a later prompt."""

    def __init__(self, count: int, block_size: int = CACHE_BLOCK) -> None:
        self.count, self.block_size = count, block_size
        self.prefixes = PrefixTree(block_size)
        self._free = list(range(count))[::-1]
        self._references = [0] * count  # of each block: the sequences that hold it
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached and not held, the least recently used first

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._evictable)

    def allocate(self) -> int:
        """A block for one sequence to write, with a reference count of 1; evicts a cached block where none is free.

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

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The longest cached prefix of `tokens`, as `PrefixTree.match`; the caller holds a reference to its blocks."""
        blocks, matched = self.prefixes.match(tokens)
        for block in blocks:
            self._references[block] += 1
            self._evictable.pop(block, None)
        return blocks, matched

    def insert(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Cache the blocks of a sequence, which hold `tokens`, for prompts that begin alike; nobody writes them now."""
        self._reclaim(self.prefixes.insert(tokens, blocks))

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each block; `blocks` are in the order of their tokens."""
        for block in reversed(blocks):  # the end of a text is evicted before its beginning
            self._references[block] -= 1
            if not self._references[block]:
                if block in self.prefixes:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def clear(self) -> None:
        """Empty the prefix cache; blocks that sequences hold stay theirs."""
        self._reclaim(self.prefixes.clear())

    def _reclaim(self, removed: list[int]) -> None:
        """Free the blocks that left the prefix cache, but for those that sequences still hold."""
        for block in removed:
            if block in self._evictable:
                del self._evictable[block]
                self._free.append(block)


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
