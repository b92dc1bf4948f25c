"""The page pool: no page leaks or has two owners, and what is found holds the tokens that were asked for."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_local.errors import CacheFullError
from dsv2_local.pages import Pages

SIZE = 4


@dataclass
class Text:
    """A sequence: its tokens, the pages that it holds, and how many of them it may not write."""

    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    shared: int = 0


class World:
    """Sequences on a pool, with memory that tells what was written: a cell is a hash of all tokens up to its own.

    `choose(n)` draws from [0, n).
    """

    def __init__(self, count: int, choose: Callable[[int], int]) -> None:
        self.pool, self.choose = Pages(count, SIZE), choose
        self.memory = [[0] * SIZE for _ in range(count)]
        self.holders = [0] * count
        self.texts: list[Text] = []
        self.operations = 0

    def step(self) -> None:
        if self.choose(3) == 0 or not self.texts:
            if len(self.texts) < 3:
                self.texts.append(Text())
            self.begin(self.texts[self.choose(len(self.texts))])
        text = self.texts[self.choose(len(self.texts))]
        [self.write, self.write, self.keep, self.keep, self.cut, self.end][self.choose(6)](text)

    def begin(self, text: Text) -> None:
        """Another prompt, of few kinds of tokens, so that many begin alike."""
        self.drop(text.pages)
        prompt = [self.choose(2) for _ in range(self.choose(5 * SIZE))]
        text.pages, done = self.pool.find(prompt)
        self.operations += 1
        for page in text.pages:
            self.holders[page] += 1
        assert len(text.pages) == -(-done // SIZE)
        text.tokens, text.shared = prompt[:done], len(text.pages)
        self.check(text)

    def write(self, text: Text) -> None:
        """Some tokens more, on pages of its own."""
        tokens = [self.choose(2) for _ in range(1 + self.choose(SIZE))]
        first = len(text.tokens) // SIZE
        if first < text.shared:
            copied = list(self.memory[text.pages[first]])
            self.drop(text.pages[first:])
            text.pages, text.shared = text.pages[:first], first
            if not self.take(text):
                return self.end(text)
            self.memory[text.pages[first]] = copied
        while len(text.pages) * SIZE < len(text.tokens) + len(tokens):
            if not self.take(text):
                return self.end(text)
        before = seen(text.tokens)
        for at, cell in enumerate(seen([*text.tokens, *tokens])[len(before) :], len(before)):
            self.memory[text.pages[at // SIZE]][at % SIZE] = cell
        text.tokens += tokens
        return self.check(text)

    def take(self, text: Text) -> bool:
        self.operations += 1
        if all(self.holders):
            with pytest.raises(CacheFullError, match=f"{len(self.holders) * SIZE} tokens"):
                self.pool.take()
            return False
        page = self.pool.take()
        assert not self.holders[page], "two owners"
        self.holders[page] = 1
        self.memory[page] = [0] * SIZE
        text.pages.append(page)
        return True

    def keep(self, text: Text) -> None:
        self.operations += 1
        used = -(-len(text.tokens) // SIZE)
        self.pool.keep(text.tokens, text.pages[:used])
        text.shared = max(text.shared, used)

    def cut(self, text: Text) -> None:
        del text.tokens[self.choose(len(text.tokens) + 1) :]

    def end(self, text: Text) -> None:
        self.texts.remove(text)
        self.drop(text.pages)

    def drop(self, pages: list[int]) -> None:
        self.operations += 1
        self.pool.drop(pages)
        for page in pages:
            self.holders[page] -= 1

    def check(self, text: Text) -> None:
        """Its pages hold its tokens, whatever others did."""
        cells = [cell for page in text.pages for cell in self.memory[page]]
        assert cells[: len(text.tokens)] == seen(text.tokens)

    def check_all(self) -> None:
        pool = self.pool
        for text in self.texts:
            self.check(text)
        assert pool._holders == self.holders
        kept = [node.page for node in pool._kept.values()]
        held = [page for page, holders in enumerate(self.holders) if holders]
        assert sorted([*pool._free, *pool._idle, *held]) == list(range(len(self.holders))), "a leak"
        assert set(pool._idle) == set(kept) - set(held)
        assert pool.available == len(self.holders) - len(held)
        self.check_tree(pool._root, [])

    def check_tree(self, node, before: list[int]) -> None:
        tokens = [*before, *node.tokens]
        if node is not self.pool._root:
            assert self.pool._kept[node.page] is node
            assert self.memory[node.page][: len(node.tokens)] == seen(tokens)[len(before) :]
            assert len(node.tokens) == SIZE or not node.children
        parts = list(node.children)
        assert not any(a != b and b[: len(a)] == a for a in parts for b in parts), "the same twice"
        for part, child in node.children.items():
            assert (child.tokens, child.parent) == (part, node)
            self.check_tree(child, tokens)


def seen(tokens: list[int]) -> list[int]:
    """What memory holds of these tokens."""
    cells, cell = [], 1
    for token in tokens:
        cell = hash((cell, token))
        cells.append(cell)
    return cells


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 12), data=st.data())
def test_any_few_operations(count, data):
    world = World(count, lambda n: data.draw(st.integers(0, n - 1)))
    for _ in range(data.draw(st.integers(1, 25))):
        world.step()
        world.check_all()


def test_a_million_operations():
    start, done = perf_counter(), 0
    for count in (1, 2, 7, 16, 60):
        draw = random.Random(count)
        world = World(count, lambda n, draw=draw: int(draw.random() * n))
        while world.operations < 200_000:
            world.step()
            if draw.random() < 0.002:
                world.check_all()
            if draw.random() < 0.0001:
                world.pool.clear()
        world.check_all()
        for text in list(world.texts):
            world.end(text)
        world.pool.clear()
        assert sorted(world.pool._free) == list(range(count))
        done += world.operations
    assert done >= 1_000_000
    print(f"{done:,} operations in {perf_counter() - start:.1f} s")


def kept(pool: Pages, tokens: list[int]) -> list[int]:
    """A text that was read and left."""
    pages, done = pool.find(tokens)
    whole = pages[: done // SIZE]
    pool.drop(pages[done // SIZE :])
    whole += [pool.take() for _ in range(-(-len(tokens) // SIZE) - len(whole))]
    pool.keep(tokens, whole)
    pool.drop(whole)
    return whole


def found(pool: Pages, tokens: list[int]) -> int:
    pages, done = pool.find(tokens)
    pool.drop(pages)
    return done


def test_a_prompt_finds_what_it_shares_with_earlier_ones():
    pool = Pages(20, SIZE)
    system = [9] * 6
    first = kept(pool, [*system, 1, 1, 1, 1, 1])
    second = kept(pool, [*system, 2, 2, 2])
    assert first[0] == second[0]
    assert pool.available == 20
    assert found(pool, [*system, 1, 1, 1, 1, 1, 5]) == 11
    assert found(pool, [*system, 2, 2, 3]) == 8
    assert found(pool, [*system, 3]) == 6
    assert found(pool, [9]) == 1
    assert found(pool, [8, *system]) == 0
    assert found(pool, []) == 0


def test_an_answer_that_goes_on_takes_the_place_of_its_beginning():
    pool = Pages(20, SIZE)
    for end in range(1, 12):
        kept(pool, list(range(end)))
        assert len(pool._kept) == -(-end // SIZE)


def test_the_least_recently_used_is_given_up_from_its_end():
    pool = Pages(6, SIZE)
    kept(pool, [1] * 12)
    kept(pool, [2] * 12)
    assert found(pool, [1] * 12) == 12
    kept(pool, [3] * 8)
    assert [found(pool, [n] * 12) for n in (1, 2, 3)] == [12, 4, 8]


def test_held_pages_are_not_given_up():
    pool = Pages(3, SIZE)
    kept(pool, [1] * 8)
    pages, done = pool.find([1] * 5)
    assert done == 5
    pool.take()
    with pytest.raises(CacheFullError):
        pool.take()
    pool.drop(pages[1:])
    assert pool.take() == pages[1]
    assert pool.find([1] * 8) == ([pages[0]], 4)
