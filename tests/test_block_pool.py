"""The block pool and its prefix cache: no block leaks or has two writers, and matched blocks hold the right tokens."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_local.errors import CacheFullError
from dsv2_local.runtime.block_files import BlockFiles
from dsv2_local.runtime.block_pool import BlockPool
from tests.scheduling import add_store, seen

SIZE = 4


@dataclass
class Text:
    """A sequence: its tokens, the blocks that it holds, and how many of the first blocks are shared."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    shared: int = 0


class World:
    """Sequences on a pool, with simulated memory: the cell of a token is a hash of it and all tokens before it.

    `choose(n)` draws from [0, n).
    """

    def __init__(
        self, count: int, choose: Callable[[int], int], stored: int = 0, files: BlockFiles | None = None
    ) -> None:
        self.pool, self.choose = BlockPool(count, SIZE), choose
        self.memory = [[0] * SIZE for _ in range(count)]
        if stored or files:
            add_store(self.pool, self.memory, stored, files)
        self.references = [0] * count
        self.texts: list[Text] = []
        self.operations = self.restored = 0
        self.lossy = files is not None  # whether stored blocks may be lost

    def step(self) -> None:
        if self.choose(3) == 0 or not self.texts:
            if len(self.texts) < 3:
                self.texts.append(Text())
            self.restart(self.texts[self.choose(len(self.texts))])
        text = self.texts[self.choose(len(self.texts))]
        [self.write, self.write, self.insert, self.insert, self.cut, self.end][self.choose(6)](text)

    def restart(self, text: Text) -> None:
        """Begin another prompt, with only two different tokens, so that many prompts have common prefixes."""
        self.release(text.blocks)
        prompt = [self.choose(2) for _ in range(self.choose(5 * SIZE))]
        blocks, cached, foreseen = self.pool.find(prompt)
        assert self.pool.find(prompt) == (blocks, cached, foreseen), "something has changed"
        free = self.pool.available
        restored = self.pool.restore(prompt)
        assert self.pool.available == free
        text.blocks, done = self.pool.match(prompt)
        assert cached <= done == cached + restored <= foreseen
        if -(-len(prompt) // SIZE) < free and not self.lossy:
            assert done == foreseen
        self.restored += restored
        self.operations += 1
        for block in text.blocks:
            self.references[block] += 1
        assert len(text.blocks) == -(-done // SIZE)
        text.tokens, text.shared = prompt[:done], len(text.blocks)
        self.check(text)

    def write(self, text: Text) -> None:
        """Append some tokens, in private blocks (copy-on-write)."""
        tokens = [self.choose(2) for _ in range(1 + self.choose(SIZE))]
        first = len(text.tokens) // SIZE
        if first < text.shared:
            copied = list(self.memory[text.blocks[first]])
            self.release(text.blocks[first:])
            text.blocks, text.shared = text.blocks[:first], first
            if not self.allocate(text):
                return self.end(text)
            self.memory[text.blocks[first]] = copied
        while len(text.blocks) * SIZE < len(text.tokens) + len(tokens):
            if not self.allocate(text):
                return self.end(text)
        before = seen(text.tokens)
        for at, cell in enumerate(seen([*text.tokens, *tokens])[len(before) :], len(before)):
            self.memory[text.blocks[at // SIZE]][at % SIZE] = cell
        text.tokens += tokens
        return self.check(text)

    def allocate(self, text: Text) -> bool:
        self.operations += 1
        if all(self.references):
            with pytest.raises(CacheFullError, match=f"{len(self.references) * SIZE} tokens"):
                self.pool.allocate()
            return False
        block = self.pool.allocate()
        assert not self.references[block], "two owners"
        self.references[block] = 1
        self.memory[block] = [0] * SIZE
        text.blocks.append(block)
        return True

    def insert(self, text: Text) -> None:
        self.operations += 1
        used = -(-len(text.tokens) // SIZE)
        self.pool.insert(text.tokens, text.blocks[:used])
        text.shared = max(text.shared, used)

    def cut(self, text: Text) -> None:
        del text.tokens[self.choose(len(text.tokens) + 1) :]

    def end(self, text: Text) -> None:
        self.texts.remove(text)
        self.release(text.blocks)

    def release(self, blocks: list[int]) -> None:
        self.operations += 1
        self.pool.release(blocks)
        for block in blocks:
            self.references[block] -= 1

    def check(self, text: Text) -> None:
        """Check that the blocks of a sequence hold its tokens, whatever other sequences did."""
        cells = [cell for block in text.blocks for cell in self.memory[block]]
        assert cells[: len(text.tokens)] == seen(text.tokens)

    def check_all(self) -> None:
        pool = self.pool
        for text in self.texts:
            self.check(text)
        assert pool._references == self.references
        kept = [node.block for node in pool.prefixes._nodes.values()]
        held = [block for block, references in enumerate(self.references) if references]
        assert sorted([*pool._free, *pool._evictable, *held]) == list(range(len(self.references))), "a leak"
        assert set(pool._evictable) == set(kept) - set(held)
        assert pool.available == len(self.references) - len(held)
        self.check_tree(pool.prefixes._root, [])

    def check_tree(self, node, before: list[int]) -> None:
        tokens = [*before, *node.tokens]
        if node is not self.pool.prefixes._root:
            assert self.pool.prefixes._nodes[node.block] is node
            assert self.memory[node.block][: len(node.tokens)] == seen(tokens)[len(before) :]
            assert len(node.tokens) == SIZE or not node.children
        parts = list(node.children)
        assert not any(a != b and b[: len(a)] == a for a in parts for b in parts), "the same twice"
        for part, child in node.children.items():
            assert (child.tokens, child.parent) == (part, node)
            self.check_tree(child, tokens)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 12), stored=st.integers(0, 12), data=st.data())
def test_any_few_operations(count, stored, data):
    world = World(count, lambda n: data.draw(st.integers(0, n - 1)), stored)
    for _ in range(data.draw(st.integers(1, 25))):
        world.step()
        world.check_all()


@pytest.mark.slow
@pytest.mark.parametrize(("counts", "stored", "least"), [((1, 2, 7, 16, 60), 0, 1_000_000), ((2, 16), 30, 100_000)])
def test_a_million_operations(counts: tuple[int, ...], stored: int, least: int):
    start, done = perf_counter(), 0
    for count in counts:
        draw = random.Random(count)
        world = World(count, lambda n, draw=draw: int(draw.random() * n), stored)
        while world.operations < least / len(counts):
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
        assert (world.restored > 1000) == bool(stored)
        done += world.operations
    assert done >= least
    print(f"{done:,} operations in {perf_counter() - start:.1f} s")


def kept(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Run a sequence, put it into the prefix cache and release it; returns its blocks."""
    blocks, done = pool.match(tokens)
    whole = blocks[: done // SIZE]
    pool.release(blocks[done // SIZE :])
    whole += [pool.allocate() for _ in range(-(-len(tokens) // SIZE) - len(whole))]
    pool.insert(tokens, whole)
    pool.release(whole)
    return whole


def found(pool: BlockPool, tokens: list[int]) -> int:
    blocks, done = pool.match(tokens)
    pool.release(blocks)
    return done


def test_a_prompt_finds_what_it_shares_with_earlier_ones():
    pool = BlockPool(20, SIZE)
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
    pool = BlockPool(20, SIZE)
    for end in range(1, 12):
        kept(pool, list(range(end)))
        assert len(pool.prefixes._nodes) == -(-end // SIZE)


def test_the_least_recently_used_is_evicted_from_its_end():
    pool = BlockPool(6, SIZE)
    kept(pool, [1] * 12)
    kept(pool, [2] * 12)
    assert found(pool, [1] * 12) == 12
    kept(pool, [3] * 8)
    assert [found(pool, [n] * 12) for n in (1, 2, 3)] == [12, 4, 8]


def test_held_blocks_are_not_evicted():
    pool = BlockPool(3, SIZE)
    kept(pool, [1] * 8)
    blocks, done = pool.match([1] * 5)
    assert done == 5
    pool.allocate()
    with pytest.raises(CacheFullError):
        pool.allocate()
    pool.release(blocks[1:])
    assert pool.allocate() == blocks[1]
    assert pool.match([1] * 8) == ([blocks[0]], 4)
