"""Who holds the pages of a latent cache, and what tokens the others are kept for: pure, no torch.

A page has room for the latents of PAGE tokens, in every layer. A sequence holds the pages that its tokens fill; several
sequences may hold one page, and nobody writes to it then. A page that nobody holds any more is kept while there is
room. It is found again by its tokens and all those before them, compared one by one, so that there is no false match.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv2_local.errors import CacheFullError
from dsv2_local.kernels.format import PAGE


@dataclass(eq=False, slots=True)
class _Node:
    """A kept page in the tree of what was read: its tokens come after those of its parents."""

    page: int
    tokens: tuple[int, ...]
    parent: "_Node | None"
    children: "dict[tuple[int, ...], _Node]" = field(default_factory=dict)
    """By their tokens. Only a whole page has any."""


class Pages:
    """Numbers of `count` pages of `size` tokens each: free, held by sequences, or kept for a prompt that comes back."""

    def __init__(self, count: int, size: int = PAGE) -> None:
        self.count, self.size = count, size
        self._free = list(range(count))[::-1]
        self._holders = [0] * count  # of each page
        self._root = _Node(-1, (), None)
        self._kept: dict[int, _Node] = {}  # by page
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept and held by nobody, the least recently used first

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """A page for a sequence to hold and write; where none is free, the least recently used one is given up.

        Raises:
            CacheFullError: sequences hold all pages.
        """
        if not self._free:
            if not self._idle:
                raise CacheFullError(self.count * self.size)
            self._forget(next(iter(self._idle)))
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def find(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """What is kept of a prompt: pages, held from now on, with its first tokens, and how many of those there are.

        The last page may hold other tokens after the common ones.
        """
        node, pages, done = self._root, [], 0
        part = tuple(tokens[: self.size])
        while part and (child := node.children.get(part)):
            node, done = child, done + len(part)
            pages.append(node.page)
            part = tuple(tokens[done : done + self.size])
        common = {child.page: _common(child.tokens, part) for child in node.children.values()}
        best = max(common, key=lambda page: common[page], default=None)
        if best is not None and common[best]:
            pages.append(best)
            done += common[best]
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)
        return pages, done

    def drop(self, pages: Sequence[int]) -> None:
        """A sequence holds these no longer: the pages of its tokens, in their order."""
        for page in reversed(pages):  # the end of a text is given up before what it began with
            self._holders[page] -= 1
            if not self._holders[page]:
                if page in self._kept:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def keep(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Have prompts that begin like `tokens` find these pages, which hold them and are held; nobody writes them now.

        Where the same tokens have a page already, that one stays.
        """
        node = self._root
        for start, page in zip(range(0, len(tokens), self.size), pages, strict=True):
            part = tuple(tokens[start : start + self.size])
            child = node.children.get(part) or self._add(node, part, page)
            if child is None:
                break
            node = child

    def clear(self) -> None:
        """Keep nothing but what is held."""
        for node in list(self._root.children.values()):
            self._forget(node.page)

    def _add(self, parent: _Node, part: tuple[int, ...], page: int) -> _Node | None:
        """Keep a page in place of any that holds less of the same; None where one holds more, or this one is kept."""
        if page in self._kept:
            return None
        for other in list(parent.children.values()):
            if other.tokens[: len(part)] == part:
                return None
            if part[: len(other.tokens)] == other.tokens:
                self._forget(other.page)
        node = parent.children[part] = self._kept[page] = _Node(page, part, parent)
        return node

    def _forget(self, page: int) -> None:
        """Keep a page no longer, nor those that come after it: without it they are no prompt's beginning."""
        first = self._kept[page]
        assert first.parent
        del first.parent.children[first.tokens]
        following = [first]
        while following:
            node = following.pop()
            following += node.children.values()
            del self._kept[node.page]
            if node.page in self._idle:
                del self._idle[node.page]
                self._free.append(node.page)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
