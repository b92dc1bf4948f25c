"""A scheduler with simulated computing, for its tests: memory whose contents show what was computed, and checks."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dsv2_local.runtime import sequence
from dsv2_local.runtime.block_files import BlockFiles, Rows
from dsv2_local.runtime.block_pool import BlockPool
from dsv2_local.runtime.block_store import BlockStore, StoredBlock, first_key
from dsv2_local.runtime.scheduler import OVERTAKING, Scheduler
from dsv2_local.runtime.waiting import PATIENCE, Scheduled, State

SIZE = 4
GARBAGE = -1
NEW = 7  # the token that every generation makes unless it is drawn


@dataclass(eq=False)
class Stream(Scheduled):
    """A sequence whose reader can pause, and which may draw its next token later than in the step of its logits."""

    paused: bool = field(default=False, kw_only=True)
    has_logits: bool = field(default=False, init=False)

    @property
    def wants(self) -> bool:
        return not self.paused

    @property
    def needs_step(self) -> bool:
        return not self.has_logits

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens


def add_store(
    pool: BlockPool,
    memory: list[list[int]],
    blocks: int,
    files: BlockFiles | None = None,
    loses: Callable[[], bool] = lambda: False,
) -> BlockStore:
    """Give a pool of simulated memory a block store: `blocks` of them in RAM; `loses` says whether one is lost."""

    def read(block: int, tokens: int) -> Rows:
        return np.array([*memory[block][:tokens], *[0] * (SIZE - tokens)], np.int64).view(np.uint8)

    def write(block: int, rows: Rows) -> None:
        memory[block] = rows.view(np.int64).tolist()

    class Store(BlockStore):
        def take(self, blocks: Sequence[StoredBlock]) -> Generator[tuple[tuple[int, ...], Rows], None, None]:
            for found in super().take(blocks):
                if loses():
                    return
                yield found

    pool.store = Store(first_key("simulated"), SIZE * 8, read, write, blocks * SIZE * 8, files, SIZE)
    return pool.store


def seen(tokens: list[int]) -> list[int]:
    """The contents of memory for these tokens: each cell is a hash of its token and all before it."""
    cells, cell = [], 1
    for token in tokens:
        cell = hash((cell, token))
        cells.append(cell)
    return cells


class World:
    """A scheduler, and memory in which passes and steps write.

    `choose(n)` draws from [0, n).
    """

    def __init__(self, count: int, choose: Callable[[int], int] = lambda n: n - 1, **limits: int) -> None:
        self.memory = [[GARBAGE] * SIZE for _ in range(count)]
        self.pool = BlockPool(count, SIZE, copy=self.copy)
        self.scheduler = Scheduler[Stream](self.pool, **{"rows": 4, "chunk": 8, "queue": 100, **limits})
        self.choose, self.now, self.items = choose, 0.0, list[Stream]()  # those that have not ended, or are in a pass
        self.operations = self.prefilled_tokens = 0

    def copy(self, source: int, target: int) -> None:
        assert not self.pool.references(target) or source != target
        self.memory[target] = list(self.memory[source])

    def new(self, tokens: list[int], answer: int = 4, **options: object) -> Stream:
        """Make and submit a sequence."""
        context = len(self.memory) * SIZE
        most = min(len(tokens) + answer, context)
        item = Stream(sequence.Sequence(self.pool, context, tokens), most, **options)  # type: ignore[arg-type]
        self.scheduler.submit(item)
        self.items.append(item)
        return item

    def decode(self) -> list[Stream]:
        """Run a decode step; every row gets a token, and those that are complete finish."""
        before = self.before()
        rows = self.scheduler.decode()
        assert len({*rows}) == len(rows) <= self.scheduler.rows
        self.check_preempted(before)
        for item in rows:
            assert item.state is State.DECODING
            assert item.wants
            assert item.sequence.length == len(item.tokens) - 1
            assert item.sequence.lacking(1 + len(item.draft)) == 0
        for item in rows:
            accepted = item.draft[: self.choose(len(item.draft) + 1)]
            self.write(item, len(item.tokens) - 1, item.tokens + item.draft)
            item.sequence.advance(1 + len(accepted))
            item.draft = []
            item.tokens.extend(accepted)
            self.draw_or_wait(item)
        return rows

    def pause(self, *items: Stream) -> None:
        """Let readers pause, for so long that the scheduler has noticed."""
        for item in items:
            item.paused = True
        for _ in range(PATIENCE):
            self.decode()

    def draw_or_wait(self, item: Stream) -> None:
        item.has_logits = self.choose(6) == 1
        if not item.has_logits:
            self.append(item)

    def draw(self) -> None:
        """Let all sequences that have logits, even preempted ones, get their tokens."""
        for item in self.items:
            if item.has_logits and item.state is not State.FINISHED:
                self.append(item)

    def append(self, item: Stream) -> None:
        item.has_logits = False
        item.tokens.append(NEW if self.choose(3) == 2 else self.choose(2))
        if len(item.tokens) >= item.most_tokens:
            self.scheduler.finish(item)

    def prefill(self) -> list[tuple[Stream, int]]:
        """Begin a prefill pass; it has written some of its tokens, and garbage in the place of the last ones."""
        before, idle = self.before(), not self.scheduler.pass_in_flight
        waiting = self.scheduler._waiting.first(len(self.items))
        overtaken = {item: item.overtaken for item in waiting}
        asleep = [item for item in self.items if item.state is State.WAITING]
        chunks = self.scheduler.prefill()
        if not idle:
            assert not chunks
            return []
        assert tuple(chunks) == self.scheduler.pass_in_flight
        assert sum(tokens for _, tokens in chunks) <= self.scheduler.chunk
        self.check_preempted(before)
        self.check_order(waiting, overtaken)
        awake = sum(item.state is not State.WAITING for item in asleep)
        assert all(item.overtaken - before <= awake for item, before in overtaken.items())
        for item, tokens in chunks:
            sequence, written = item.sequence, self.choose(tokens)
            assert item.state is State.PREFILLING
            assert 0 < tokens <= sequence.next_chunk(self.scheduler.chunk)[0]
            assert sequence.lacking(tokens) == 0
            end = sequence.length + tokens
            canonical = (end - sequence.anchor) % self.scheduler.chunk == 0 or end == sequence.prompt
            assert canonical or (end == item.target and sequence.length >= sequence.prompt) or end > sequence.prompt
            self.write(item, sequence.length, item.tokens[: sequence.length + written], tokens)
            self.prefilled_tokens += tokens
        return chunks

    def write(self, item: Stream, start: int, tokens: list[int], at_least: int = 0) -> None:
        """Write cells from position `start` on, where nobody else may read."""
        cells = seen(tokens)[start:]
        cells += [GARBAGE] * (at_least - len(cells))
        for at, cell in enumerate(cells, start):
            block = item.sequence.blocks[at // SIZE]
            assert self.pool.references(block) == 1, "written while another sequence holds it"
            assert block not in self.pool.prefixes, "written while it is published"
            self.memory[block][at % SIZE] = cell

    def prefilled(self) -> list[Stream]:
        """End the pass in flight; those that have no token yet get their first one."""
        for item, tokens in self.scheduler.pass_in_flight:
            self.write(item, item.sequence.length, item.tokens[: item.sequence.length + tokens])
        complete = self.scheduler.prefilled()
        for item in complete:
            if item.sequence.length == len(item.tokens):
                self.draw_or_wait(item)
        return complete

    def before(self) -> dict[Stream, tuple[int, bool]]:
        return {item: (item.preemptions, item.in_pass) for item in self.items}

    def check_preempted(self, before: dict[Stream, tuple[int, bool]]) -> None:
        """What was preempted was not in flight; its reader pauses, or one before it in rank runs whose does not."""
        first = min((item.rank for item in self.scheduler.running if not item.pauses), default=None)
        for item, (preemptions, in_pass) in before.items():
            if item.preemptions > preemptions:
                assert not in_pass
                assert item.pauses or (first is not None and first < item.rank)

    def check_order(self, waiting: list[Stream], overtaken: dict[Stream, int]) -> None:
        """Whatever waits on although a later one was started has counted it, or waits for a prefix."""
        started = [item.state is not State.WAITING for item in waiting]
        for at, item in enumerate(waiting):
            if started[at] or not item.wants:
                continue
            count = item.overtaken - overtaken[item]
            if sum(started[at:]) > count:
                assert any(
                    common(item.tokens, other.tokens) >= SIZE
                    for other in self.scheduler.running
                    if other.state is State.PREFILLING
                ), "overtaken in silence"

    def check(self) -> None:
        """Check everything that must hold between two calls."""
        self.operations += 1
        pool, items = self.pool, self.items
        self.items = items = [item for item in items if item.state is not State.FINISHED or item.in_pass]
        references = [0] * pool.count
        for item in items:
            self.check_item(item)
            for block in item.sequence.blocks:
                references[block] += 1
        assert [pool.references(block) for block in range(pool.count)] == references
        held = [block for block in range(pool.count) if references[block]]
        kept = {*pool.prefixes._nodes}
        assert sorted([*pool._free, *pool._evictable, *held]) == list(range(pool.count)), "a leak"
        assert {*pool._evictable} == kept - {*held}
        self.check_published(pool.prefixes._root, [])
        live = [item for item in items if item.state is not State.FINISHED]
        running = self.scheduler.running
        assert {*running} == {item for item in live if item.state is not State.WAITING}
        assert all(a.rank < b.rank for a, b in pairwise(running))
        assert self.scheduler.waiting == len(live) - len(running)
        assert {item for item in items if item.in_pass} == {item for item, _ in self.scheduler.pass_in_flight}

    def check_item(self, item: Stream) -> None:
        sequence = item.sequence
        cells = [cell for block in sequence.blocks for cell in self.memory[block]]
        assert cells[: sequence.length] == seen(item.tokens[: sequence.length]), "another sequence's tokens"
        assert tuple(sequence.block_table) == (sequence.length, *sequence.blocks)
        for block in sequence.blocks[sequence._shared :]:
            assert self.pool.references(block) == 1, "two writers"
            assert block not in self.pool.prefixes, "published and written"
        assert item.overtaken <= OVERTAKING
        if item.state is State.WAITING:
            assert not sequence.blocks
        elif item.state is State.DECODING:
            assert sequence.length <= len(item.tokens) - (not item.has_logits)
        elif item.state is State.PREFILLING:
            assert sequence.length < item.target

    def check_published(self, node, before: list[int]) -> None:
        tokens = [*before, *node.tokens]
        if before or node.tokens:
            assert self.memory[node.block][: len(node.tokens)] == seen(tokens)[len(before) :], "published too early"
        for child in node.children.values():
            self.check_published(child, tokens)

    def step(self) -> None:
        """A decode step, and a whole prefill pass."""
        self.draw()
        self.decode()
        self.prefill()
        self.prefilled()
        self.check()

    def run_to_the_end(self) -> None:
        """All readers go on; everything must finish within a number of steps that its tokens allow."""
        for item in self.items:
            item.paused = False
        most = 20 + 4 * sum(item.most_tokens for item in self.items)
        for _ in range(most):
            if not len(self.scheduler):
                break
            self.step()
        assert not len(self.scheduler), "something never finishes"
        self.scheduler.abandon()
        self.check()
        assert self.pool.available == self.pool.count


def common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
