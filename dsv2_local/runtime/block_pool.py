"""The block pool and the prefix cache: which sequences hold which block of the KV cache, and which prompts reuse it.

Pure Python, no torch. A block has room for the latents of `CACHE_BLOCK` tokens in every layer. Blocks are reference
counted, and several sequences may share one; a shared block is never written (`Sequence` copies it on write). A
cached block that no sequence holds stays in the prefix cache until it is evicted, the least recently used first; then
it goes to the block store, if there is one (`block_store.py`), from which a later prompt takes it back.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field

from dsv2_local.errors import CacheFullError
from dsv2_local.kernels.format import CACHE_BLOCK
from dsv2_local.runtime.block_store import BlockStore, StoredBlock


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
    key: bytes = b""
    """Its key in the block store, once it is known."""

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
        removed = [node.block for node in _subtree(first)]
        for block in removed:
            del self._nodes[block]
        return removed

    @property
    def blocks(self) -> Set[int]:
        """All blocks."""
        return self._nodes.keys()

    def below(self, block: int) -> list[int]:
        """A block and its descendants, children before their parents."""
        return [node.block for node in reversed(_subtree(self._nodes[block]))]

    def put(self, store: BlockStore, blocks: Iterable[int], *, wait: bool = False) -> None:
        """Put some blocks into the block store."""
        for block in blocks:
            node = self._nodes[block]
            assert node.parent
            store.put(self._set_key(node.parent, store), node.tokens, block, wait=wait)

    def key(self, block: int | None, store: BlockStore) -> bytes:
        """The key of a block in the block store (None: the key before the first block)."""
        return self._set_key(self._root if block is None else self._nodes[block], store)

    def _set_key(self, node: _Node, store: BlockStore) -> bytes:
        unknown = list[_Node]()
        while node.parent and not node.key:
            unknown.append(node)
            node = node.parent
        self._root.key = store.first
        for each in reversed(unknown):
            assert each.parent
            each.key = store.next_key(each.parent.key, each.tokens)
        return (unknown[0] if unknown else node).key

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


def _subtree(first: _Node) -> list[_Node]:
    """A node and its descendants, parents before their children."""
    found, remaining = list[_Node](), [first]
    while remaining:
        node = remaining.pop()
        remaining += node.children.values()
        found.append(node)
    return found


def _no_copy(source: int, target: int) -> None:
    """The copy of blocks that have no contents."""


class BlockPool:
    """Block numbers 0 … `count` - 1: free, held by sequences (counted references), or cached for a later prompt.

    Attributes:
        store: where blocks go that are evicted; None: nowhere.
    """

    def __init__(
        self, count: int, block_size: int = CACHE_BLOCK, copy: Callable[[int, int], object] = _no_copy
    ) -> None:
        """A pool of free blocks; `copy` is called with the numbers of two blocks to copy the first to the second."""
        self.count, self.block_size, self._copy = count, block_size, copy
        self.prefixes = PrefixTree(block_size)
        self.store: BlockStore | None = None
        self._free = list(range(count))[::-1]
        self._references = [0] * count  # for each block, the number of sequences that hold it
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached and not held, the least recently used first

    @property
    def available(self) -> int:
        """Number of blocks that `allocate` can return: free ones, and cached ones that it can evict."""
        return len(self._free) + len(self._evictable)

    @property
    def free(self) -> int:
        """Number of blocks that hold nothing. Any thread may ask, as for `cached`."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Number of blocks that are cached for a later prompt and held by no sequence."""
        return len(self._evictable)

    def allocate(self) -> int:
        """Allocate a block with a reference count of 1; evicts a cached block if none is free.

        Raises:
            CacheFullError: sequences hold all blocks.
        """
        if not self._free:
            if not self._evictable:
                raise CacheFullError(self.count * self.block_size)
            self._evict(next(iter(self._evictable)))
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
                self._evict(block)
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

    def find(self, tokens: Sequence[int]) -> tuple[list[int], int, int]:
        """Find what `match` would, and what it would after `restore`; nothing is changed.

        Returns:
            The cached blocks, the number of tokens that they match, and the number after `restore`.
        """
        blocks, matched = self.prefixes.match(tokens)
        _, stored = self._find_stored(tokens, blocks[: matched // self.block_size])
        return blocks, matched, max(matched, matched // self.block_size * self.block_size + stored)

    def restore(self, tokens: Sequence[int]) -> int:
        """Bring blocks that continue the cached prefix of `tokens` back from the block store into the prefix cache.

        Returns:
            How many tokens more `match` finds now. Blocks may be fewer than `find` said if sequences hold all others,
            or if a file is damaged.
        """
        if self.store is None:
            return 0
        blocks, matched = self.match(tokens)
        whole = matched // self.block_size
        self.release(blocks[whole:])
        del blocks[whole:]
        known, before = list(tokens[: whole * self.block_size]), matched
        try:
            stored, length = self._find_stored(tokens, blocks)
            matched = len(known) + length
            if matched > before:
                self._take(stored, blocks, known)
        finally:
            used = -(-len(known) // self.block_size)
            self.insert(known, blocks[:used])
            self.release(blocks)
        restored = max(0, min(matched, len(known)) - before)
        self.store.count(restored)
        return restored

    def set_aside(self, *, wait: bool = True) -> None:
        """Put all cached blocks into the block store too, if it outlives this process.

        `wait`: wait for the disk when too much waits to be written; else leave the rest for another time.
        """
        if self.store is None:
            return
        for block in [*self._evictable, *(self.prefixes.blocks - self._evictable.keys())]:
            if not (self.store.keeps if wait else self.store.has_room):
                return
            self.prefixes.put(self.store, [block], wait=wait)

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
        """Empty the prefix cache and the block store; blocks that sequences hold stay allocated."""
        self._reclaim(self.prefixes.clear())
        if self.store is not None:
            self.store.clear()

    def _find_stored(self, tokens: Sequence[int], blocks: Sequence[int]) -> tuple[list[StoredBlock], int]:
        """The stored blocks that continue `tokens` after these cached ones, and how many tokens they match."""
        if self.store is None or self.store.empty:
            return [], 0
        key = self.prefixes.key(blocks[-1] if blocks else None, self.store)
        return self.store.match(key, tokens[len(blocks) * self.block_size :])

    def _take(self, stored: list[StoredBlock], blocks: list[int], known: list[int]) -> None:
        """Fill new blocks from the store; they are appended to `blocks`, and what they hold to `known`."""
        assert self.store is not None
        with closing(self.store.take(stored)) as contents:
            while self.available and (found := next(contents, None)):
                tokens, rows = found
                blocks.append(self.allocate())
                self.store.write(blocks[-1], rows)
                known += tokens

    def _evict(self, block: int) -> None:
        """Let a block and its descendants leave the prefix cache for the block store."""
        if self.store is not None:
            self.prefixes.put(self.store, self.prefixes.below(block))
        self._reclaim(self.prefixes.remove(block))

    def _reclaim(self, removed: list[int]) -> None:
        """Free the blocks that left the prefix cache, unless sequences still hold them."""
        for block in removed:
            if block in self._evictable:
                del self._evictable[block]
                self._free.append(block)


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
