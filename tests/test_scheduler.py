"""The scheduler: order, blocks, passes and preemption, rule by rule; then anything in any order."""

import os
import random
from time import perf_counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dsv2_local.errors import ContextLengthError, QueueFullError
from dsv2_local.runtime.scheduler import CANDIDATES, OVERTAKING
from dsv2_local.runtime.sequence import Sequence
from dsv2_local.runtime.waiting import State
from tests.scheduling import SIZE, Stream, World, add_store

LONG = int(os.environ.get("DSV2_SCHEDULER_OPERATIONS", "0"))  # operations of the longest test; 0: a few seconds
EXAMPLES = int(os.environ.get("DSV2_SCHEDULER_EXAMPLES", "150"))  # runs of the state machine


def distinct(number: int, length: int) -> list[int]:
    """A prompt that begins like no other."""
    return [number, *range(100, 99 + length)]


def chunks(world: World) -> list[tuple[int, int]]:
    """Run a pass; returns the first tokens of its prompts, and how many tokens of each it had."""
    found = [(item.tokens[0], tokens) for item, tokens in world.prefill()]
    world.prefilled()
    world.check()
    return found


def firsts(items: list[Stream]) -> list[int]:
    return [item.tokens[0] for item in items]


def test_a_prompt_is_prefilled_in_chunks_and_decodes():
    world = World(12)
    item = world.new(distinct(1, 19), answer=3)
    assert (item.state, item.sequence.blocks) == (State.WAITING, ())
    assert world.decode() == []
    assert world.prefill() == [(item, 8)]
    assert (item.state, item.sequence.length) == (State.PREFILLING, 0)
    assert world.prefill() == []  # one pass at a time
    assert world.decode() == []
    assert world.prefilled() == []
    assert world.pool.prefixes.match(item.tokens)[1] == 8  # published now
    assert chunks(world) == [(1, 8)]
    assert chunks(world) == [(1, 3)]
    assert (item.state, len(item.tokens), item.sequence.length) == (State.DECODING, 20, 19)
    assert chunks(world) == []
    blocks = item.sequence.blocks
    assert world.decode() == [item]
    assert item.sequence.blocks == blocks  # the last one, filled in part, is not published and so not copied
    assert len(world.scheduler) == 1
    assert world.decode() == [item]
    assert (item.state, item.sequence.blocks, len(world.scheduler)) == (State.FINISHED, (), 0)
    assert world.pool.prefixes.match(item.tokens)[1] == 21  # all that was computed


def test_what_can_never_fit_is_refused_at_once():
    world = World(3)
    world.new(distinct(1, 11), answer=1)
    with pytest.raises(ContextLengthError, match="12 tokens and the context holds 12"):
        world.new(distinct(2, 12))
    with pytest.raises(ContextLengthError, match="12 tokens and the context holds 12"):
        world.scheduler.submit(Stream(Sequence(world.pool, 100, distinct(3, 5)), 13))
    with pytest.raises(ContextLengthError, match="9 tokens and the context holds 9"):
        world.scheduler.submit(Stream(Sequence(world.pool, 9, distinct(3, 9)), 9))
    assert len(world.scheduler) == 1


def test_a_prompt_alone_may_fill_the_cache():
    world = World(3)
    item = world.new(distinct(1, 12), answer=0, prompt_only=True)
    with pytest.raises(ContextLengthError):
        world.new(distinct(2, 13), answer=0, prompt_only=True)
    world.prefill()
    world.scheduler.prefilled()
    world.prefill()
    assert world.scheduler.prefilled() == [item]
    assert (item.state, item.sequence.length) == (State.DECODING, 12)
    world.scheduler.finish(item)
    assert world.pool.available == 3


def test_what_is_needed_is_computed_although_it_is_cached():
    world = World(12)

    def chunks_of(item: Stream) -> list[int]:
        return [tokens for other, tokens in world.prefill() if other is item]

    cached = world.new(distinct(1, 10))
    chunks(world)
    chunks(world)
    item = Stream(Sequence(world.pool, 48, distinct(1, 10)), 12)
    item.sequence.needed = 0
    world.scheduler.submit(item)
    assert chunks_of(item) == [8]  # and it waits for no other prompt that begins like it
    world.scheduler.prefilled()
    item.sequence.needed = 6
    world.scheduler.make_room(12)
    assert item.state is cached.state is State.WAITING
    assert chunks_of(item) == [2]  # of a chunk of 8 the rest
    assert item.sequence.length == 6
    world.scheduler.prefilled()
    item.sequence.needed = None
    world.scheduler.make_room(12)
    assert item.sequence.foresee()[0] == 9


def test_a_full_queue_refuses():
    world = World(12, queue=2)
    first = world.new(distinct(1, 3))
    world.new(distinct(2, 3))
    with pytest.raises(QueueFullError, match="2 requests wait"):
        world.new(distinct(3, 3))
    world.scheduler.finish(first)
    world.new(distinct(4, 3))
    assert chunks(world) == [(2, 3), (4, 3)]
    world.new(distinct(5, 3))
    assert (world.scheduler.waiting, len(world.scheduler)) == (1, 3)


def test_waiting_prompts_start_by_priority_then_arrival():
    world = World(12, chunk=4)
    for number, priority in [(1, 0), (2, 1), (3, 0), (4, 1)]:
        world.new(distinct(number, 4), priority=priority)
    assert [chunks(world) for _ in range(4)] == [[(2, 4)], [(4, 4)], [(1, 4)], [(3, 4)]]


def test_short_prompts_share_a_pass_and_no_chunk_is_cut_for_it():
    world = World(30, rows=9)
    for number, length in enumerate([3, 3, 7, 2, 12]):
        world.new(distinct(number, length))
    assert chunks(world) == [(0, 3), (1, 3), (3, 2)]
    assert chunks(world) == [(2, 7)]
    assert chunks(world) == [(4, 8)]
    assert chunks(world) == [(4, 4)]


def test_long_prompts_take_turns_and_a_new_one_comes_before_their_next_chunks():
    world = World(40, rows=9)
    world.new(distinct(1, 28))
    world.new(distinct(2, 20))
    assert chunks(world) == [(1, 8)]
    world.prefill()
    world.new(distinct(3, 6))
    world.prefilled()
    assert chunks(world) == [(1, 8)]  # longest without a turn: it waits since before the third came
    assert chunks(world) == [(3, 6)]
    assert chunks(world) == [(2, 8)]
    assert chunks(world) == [(1, 8)]
    assert chunks(world) == [(2, 4), (1, 4)]


def test_a_prompt_that_does_not_fit_is_overtaken_a_bounded_number_of_times():
    world = World(12, rows=20)
    running = world.new(distinct(0, 20), answer=20)
    for _ in range(4):
        world.step()
    big = world.new(distinct(1, 24))  # 6 blocks, and one for who runs, of 12 - 6
    small = [world.new(distinct(10 + n, 3), answer=1) for n in range(OVERTAKING + 3)]
    while (found := chunks(world)) and world.decode():
        assert len(found) == 2  # of one block each; each ends at once
    assert [item.state for item in small].count(State.FINISHED) == OVERTAKING == big.overtaken
    assert running.state is State.DECODING
    world.scheduler.finish(running)
    assert chunks(world) == [(1, 8)]
    world.run_to_the_end()


def test_a_prompt_starts_when_there_are_blocks_for_all_of_it_and_for_those_in_progress():
    world = World(9, chunk=4)
    first = world.new(distinct(1, 24))
    assert chunks(world) == [(1, 4)]
    second = world.new(distinct(2, 12))  # 3 blocks, of 8 that are available and 5 that are promised; 1 is kept free
    assert [chunks(world) for _ in range(6)] == [[(1, 4)]] * 5 + [[]]
    assert first.state is State.DECODING
    world.scheduler.finish(first)
    assert chunks(world) == [(2, 4)]
    assert second.overtaken == 0


def test_prompts_that_begin_alike_compute_it_once():
    world = World(700, rows=16, chunk=512, queue=16)
    begin = [n % 97 for n in range(2000)]
    items = [world.new([*begin, n, n, n]) for n in range(16)]
    total = 0
    for _ in range(5):
        found = world.prefill()
        total += sum(tokens for _, tokens in found)
        world.prefilled()
    assert all(item.state is State.DECODING for item in items)
    assert total == 2003 + 15 * 3
    assert [item.sequence.anchor for item in items] == [0] + [2000] * 15
    assert world.pool.available == 700 - 500 - 16  # the beginning is held once


def test_others_do_not_wait_for_the_common_beginning():
    world = World(60, rows=9)
    begin = distinct(1, 12)
    world.new([*begin, 1])
    same = world.new([*begin, 2])
    part = world.new([*begin[:3], 3, 3])  # less than a block in common
    assert chunks(world) == [(1, 8)]
    assert (same.overtaken, part.overtaken) == (0, 0)
    assert chunks(world) == [(1, 2), (1, 5)]  # the third one comes before the first one's second chunk
    assert (part.state, part.sequence.anchor) == (State.DECODING, 3)
    assert same.state is State.WAITING
    assert chunks(world) == [(1, 1)]
    assert same.state is State.DECODING
    assert same.sequence.anchor == 12


def test_nobody_waits_for_a_beginning_whose_reader_pauses():
    world = World(60, rows=9)
    begin = distinct(1, 12)
    first = world.new([*begin, 1])
    second = world.new([*begin, 2])
    assert chunks(world) == [(1, 8)]
    world.pause(first)
    assert [item for item, _ in world.prefill()] == [second]
    assert second.sequence.anchor == 8


def decoding(world: World, *numbers: int, length: int = 8, answer: int = 30, **options: int) -> list[Stream]:
    """Sequences that decode from now on."""
    made = []
    for number in numbers:
        made.append(world.new(distinct(number, length), answer=answer, **options))
        assert chunks(world) == [(number, length)]
    return made


def test_the_youngest_is_preempted_and_resumed_before_new_ones():
    world = World(8)
    old, young = decoding(world, 1, 2, answer=20)  # 2 blocks each, and a third from the next step on
    for _ in range(4):
        assert world.decode() == [old, young]
    assert world.pool.available == 2
    for _ in range(4):
        assert world.decode() == [old, young]
    assert world.pool.available == 0
    newer = world.new(distinct(3, 3), answer=2)
    assert world.decode() == [old]
    assert (young.state, young.preemptions, young.sequence.blocks) == (State.WAITING, 1, ())
    length = len(young.tokens)
    assert chunks(world) == [(3, 3)]  # the young one does not fit: it takes 5 blocks, of which 3 are left
    assert young.overtaken == 1
    while old.state is not State.FINISHED:
        world.decode()
    assert newer.state is State.FINISHED
    assert len(young.tokens) == length
    newest = world.new(distinct(4, 3))
    assert world.prefill() == [(young, 8)]
    assert young.sequence.length == 0  # the old one has taken the place of what it had computed
    assert newest.state is State.WAITING
    world.prefilled()
    assert chunks(world) == [(4, 3)]
    assert chunks(world) == [(2, 8)]  # all but the newest token
    assert (young.state, len(young.tokens)) == (State.DECODING, length)
    world.run_to_the_end()
    assert len(young.tokens) == young.most_tokens


def test_a_preempted_one_comes_before_those_that_it_overtook():
    world = World(8)
    (old,) = decoding(world, 1, answer=20)
    big = world.new(distinct(2, 28))
    (young,) = decoding(world, 3, answer=20)
    assert big.overtaken == 1
    while young.state is State.DECODING:
        world.decode()
    world.scheduler.finish(old, reusable=False)
    assert world.prefill()[0][0] is young
    world.prefilled()
    world.run_to_the_end()
    assert (len(young.tokens), len(big.tokens)) == (28, 32)


def test_a_preempted_one_whose_blocks_are_still_there_goes_on_without_a_pass():
    world = World(5)
    old, young = decoding(world, 1, 2, length=7, answer=6)
    assert world.decode() == [old, young]
    assert world.decode() == [old]  # each needs a third block
    assert (young.state, young.preemptions, world.pool.available) == (State.WAITING, 1, 2)
    assert world.prefill() == []
    assert young.state is State.WAITING
    world.scheduler.finish(old, reusable=False)
    assert world.prefill() == []
    assert (young.state, young.sequence.length) == (State.DECODING, 8)
    assert world.decode() == [young]


def test_the_lowest_priority_is_preempted_though_it_is_the_oldest():
    world = World(8)
    low, high = *decoding(world, 1, answer=20), *decoding(world, 2, answer=20, priority=1)
    while low.state is State.DECODING:
        rows = world.decode()
        assert rows[0] is high
    assert (low.preemptions, high.preemptions) == (1, 0)
    world.run_to_the_end()
    assert (len(low.tokens), len(high.tokens)) == (28, 28)


def test_a_pausing_reader_takes_no_row_keeps_its_blocks_and_is_preempted_first():
    world = World(8)
    old, young = decoding(world, 1, 2, answer=20)
    old.paused = True
    assert world.decode() == [young]
    assert len(old.sequence.blocks) == 2
    while old.state is State.DECODING:
        assert world.decode() == [young]
    assert (old.preemptions, young.preemptions) == (1, 0)
    world.step()
    assert old.state is State.WAITING
    while young.state is State.DECODING:
        world.step()
    old.paused = False
    world.step()
    assert old.state is not State.WAITING
    world.run_to_the_end()
    assert len(old.tokens) == 28


def test_a_pausing_reader_gives_way_to_a_new_prompt():
    world = World(8)
    (paused,) = decoding(world, 1, length=8)
    paused.paused = True
    assert chunks(world) == []
    world.new(distinct(2, 22))
    assert chunks(world) == [(2, 8)]  # fits beside it
    assert paused.state is State.DECODING
    world.run_to_the_end()
    (paused,) = decoding(world, 3, length=8)
    paused.paused = True
    world.new(distinct(4, 28))
    assert chunks(world) == []  # the reader may only have been slow
    assert chunks(world) == [(4, 8)]
    assert paused.state is State.WAITING
    world.run_to_the_end()


def test_readers_that_pause_while_they_wait_are_left_out_and_not_forgotten():
    world = World(12)
    items = [world.new(distinct(n, 2), answer=2, paused=True) for n in range(2 * CANDIDATES)]
    last = world.new(distinct(99, 2))
    for _ in range(3):
        chunks(world)
    assert last.state is State.DECODING
    assert [item.overtaken for item in items] == [0] * len(items)
    world.scheduler.finish(items[0])
    world.check()
    items[-1].paused = False
    assert [found for _ in range(3) for found in chunks(world)] == [(len(items) - 1, 2)]
    world.run_to_the_end()


def test_the_pass_in_flight_is_never_preempted():
    world = World(8)
    (old,) = decoding(world, 1, length=7, answer=20)
    young = world.new(distinct(2, 15), answer=1)
    assert world.prefill() == [(young, 8)]
    while old in world.decode():
        world.check()
    assert len(old.sequence.blocks) == 6
    assert (young.preemptions, old.preemptions, young.state) == (0, 0, State.PREFILLING)
    world.prefilled()
    assert world.decode() == [old]
    assert (young.preemptions, young.state) == (1, State.WAITING)
    world.run_to_the_end()


def test_a_senior_prompt_takes_blocks_from_a_junior_sequence_for_its_next_chunk():
    world = World(9, chunk=4)
    (junior,) = decoding(world, 1, length=4)
    world.new(distinct(2, 16), priority=1)
    assert chunks(world) == [(2, 4)]
    for _ in range(20):
        assert world.decode() == [junior]
    assert [chunks(world), chunks(world)] == [[(2, 4)]] * 2
    assert (world.pool.available, junior.preemptions) == (0, 0)
    assert chunks(world) == [(2, 4)]
    assert junior.preemptions == 1
    world.run_to_the_end()


def test_drafts_are_dropped_rather_than_anyone_preempted():
    world = World(6)
    first, second = decoding(world, 1, 2, length=7, answer=16)
    first.draft, second.draft = [1] * 4, [1] * 4
    rows = world.scheduler.decode()
    assert rows == [first, second]
    assert (first.draft, second.draft) == ([1] * 4, [1] * 4)  # 12 tokens, 3 blocks each
    assert world.pool.available == 0
    first.draft = [1] * 8
    rows = world.scheduler.decode()
    assert rows == [first, second]
    assert (first.draft, second.draft) == ([], [1] * 4)
    world.scheduler.finish(second)
    first.draft = [1] * 15
    world.scheduler.decode()
    assert first.draft == [1] * 15
    first.draft = [1] * 16  # more than it may still have
    world.scheduler.decode()
    assert first.draft == []


def test_what_is_cancelled_in_a_pass_keeps_its_blocks_until_the_pass_ends():
    world = World(12)
    first, second = world.new(distinct(1, 3)), world.new(distinct(2, 4))
    world.prefill()
    assert not world.scheduler.pass_is_useless
    world.scheduler.finish(first)
    world.scheduler.finish(first)
    world.check()
    assert (len(first.sequence.blocks), world.scheduler.pass_is_useless) == (1, False)
    world.scheduler.finish(second)
    assert world.scheduler.pass_is_useless
    world.scheduler.abandon()
    world.check()
    assert (world.pool.available, world.scheduler.pass_is_useless, len(world.scheduler)) == (12, False, 0)
    assert world.pool.prefixes.match(first.tokens) == ([], 0)


def test_what_is_cancelled_in_a_pass_that_ends_is_reused():
    world = World(12)
    good, bad = world.new(distinct(1, 3)), world.new(distinct(2, 4))
    world.prefill()
    world.scheduler.finish(good)
    world.scheduler.finish(bad, reusable=False)
    assert world.prefilled() == []
    world.check()
    assert world.pool.available == 12
    assert world.pool.prefixes.match(good.tokens)[1] == 3
    assert world.pool.prefixes.match(bad.tokens)[1] == 0


def test_an_abandoned_pass_is_done_again():
    world = World(12)
    item = world.new(distinct(1, 10))
    assert chunks(world) == [(1, 8)]
    world.prefill()
    world.scheduler.abandon()
    world.check()
    assert item.sequence.length == 8
    assert chunks(world) == [(1, 2)]


def test_a_sequence_with_logits_takes_no_row_and_counts_as_running():
    world = World(8, rows=2)
    old, young = decoding(world, 1, 2)
    old.has_logits = True
    assert world.decode() == [young]
    assert world.decode() == [young]
    assert not old.pauses
    waiting = world.new(distinct(3, 3))
    assert chunks(world) == []  # both rows are taken
    old.has_logits = False
    assert world.decode() == [old, young]
    assert waiting.state is State.WAITING


def test_a_token_drawn_while_preempted_is_computed_before_the_next_step():
    """The sequence has the logits after its newest token, and loses its blocks before a token is drawn from them."""
    world = World(8, chunk=4)
    (item,) = decoding(world, 1, length=4)
    item.sequence.reserve(1)
    world.write(item, 4, item.tokens)
    item.sequence.advance(1)
    item.has_logits = True
    world.pause(item)
    assert world.scheduler.make_room(8)
    assert (item.state, item.preemptions, item.sequence.blocks) == (State.WAITING, 1, ())
    assert world.prefill() == []
    item.paused = False
    assert world.prefill() == []
    assert (item.state, item.sequence.length, len(item.tokens)) == (State.DECODING, 4, 5)
    world.draw()
    assert world.decode() == []
    assert world.prefill() == [(item, 1)]
    world.prefilled()
    assert world.decode() == [item]


def test_rows_go_round():
    world = World(40, rows=2)
    low = decoding(world, 1, 2)
    high = decoding(world, 3, priority=1)
    waiting = world.new(distinct(4, 3), answer=9)
    assert chunks(world) == []  # all rows are taken
    assert [firsts(world.decode()) for _ in range(4)] == [[3, 1], [3, 2], [3, 1], [3, 2]]
    world.pause(*low)
    assert chunks(world) == [(4, 3)]
    low[0].paused = low[1].paused = False
    assert waiting.state is State.DECODING
    world.scheduler.finish(high[0])
    rows = [number for _ in range(6) for number in firsts(world.decode())]
    assert sorted(rows) == [1] * 4 + [2] * 4 + [4] * 4


def test_deadlines():
    world = World(12)
    late, soon = world.new(distinct(1, 3), deadline=5.0), world.new(distinct(2, 3), deadline=2.0)
    world.new(distinct(3, 3))
    waiting = world.new(distinct(4, 3), deadline=4.0)
    assert expired(world, 1.9) == []
    world.prefill()
    assert expired(world, 2.0) == [soon]
    world.check()
    world.prefilled()
    world.check()
    assert (soon.state, soon.sequence.blocks) == (State.FINISHED, ())
    world.scheduler.finish(late)
    assert expired(world, 9.0) == [waiting]
    for n in range(100):
        world.scheduler.finish(world.new(distinct(n, 3), deadline=1000.0 + n))
    assert len(world.scheduler._deadlines._heap) < 40
    assert expired(world, 2000.0) == []
    assert len(world.scheduler) == 1


def test_a_long_queue_is_not_looked_at_in_every_step(monkeypatch: pytest.MonkeyPatch):
    looked = [0]

    def foresee(sequence: Sequence, original=Sequence.foresee) -> tuple[int, int]:
        looked[0] += 1
        return original(sequence)

    monkeypatch.setattr(Sequence, "foresee", foresee)
    world = World(16, rows=99, queue=10_000)
    decoding(world, 1, length=8, answer=50)
    world.new(distinct(2, 56))
    for n in range(5000):
        world.new(distinct(n + 3, 60), answer=1)
    looked[0] = 0
    for _ in range(20):
        world.decode()
        assert world.prefill() == []
    assert looked[0] == CANDIDATES


class Machine(RuleBasedStateMachine):
    """Anything in any order; see `World.check` for what must hold."""

    @initialize(
        count=st.integers(4, 14),
        rows=st.integers(1, 5),
        chunk=st.integers(1, 9),
        stored=st.integers(0, 20),
        seed=st.integers(0, 1 << 30),
    )
    def begin(self, count: int, rows: int, chunk: int, stored: int, seed: int) -> None:
        draw = random.Random(seed)
        self.world = World(count, lambda n: int(draw.random() * n), rows=rows, chunk=chunk, queue=8)
        if stored:
            add_store(self.world.pool, self.world.memory, stored, loses=lambda: draw.random() < 0.1)
        self.draw = draw

    @rule(
        prompt=st.lists(st.integers(0, 1), max_size=20),
        common=st.integers(0, 30),
        answer=st.integers(1, 20),
        priority=st.sampled_from([0, 0, 0, 1]),
        seconds=st.sampled_from([None, None, None, 3, 30]),
    )
    def submit(self, prompt: list[int], common: int, answer: int, priority: int, seconds: int | None) -> None:
        submit(self.world, [1] * common + prompt, answer, priority, seconds)

    @rule(draft=st.sampled_from([0, 0, 0, 1, 4, 9]))
    def decode(self, draft: int) -> None:
        decode(self.world, draft)

    @rule()
    def draw(self) -> None:
        self.world.draw()

    @rule()
    def prefill(self) -> None:
        self.world.prefill()

    @rule()
    def prefilled(self) -> None:
        self.world.prefilled()

    @precondition(lambda self: self.world.scheduler.pass_in_flight)
    @rule()
    def abandon(self) -> None:
        self.world.scheduler.abandon()

    @precondition(lambda self: self.world.items)
    @rule(at=st.integers(0, 99), reusable=st.booleans())
    def finish(self, at: int, reusable: bool) -> None:
        self.world.scheduler.finish(self.world.items[at % len(self.world.items)], reusable=reusable)

    @precondition(lambda self: self.world.items)
    @rule(at=st.integers(0, 99))
    def pause_or_go_on(self, at: int) -> None:
        item = self.world.items[at % len(self.world.items)]
        item.paused = not item.paused

    @rule()
    def wait(self) -> None:
        expire(self.world)

    @rule(blocks=st.integers(0, 15))
    def make_room(self, blocks: int) -> None:
        make_room(self.world, blocks)

    @rule()
    def forget(self) -> None:
        self.world.pool.clear()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run_to_the_end()


def submit(world: World, prompt: list[int], answer: int, priority: int, seconds: int | None) -> None:
    """Submit a prompt, or check that it is refused."""
    room, waiting = world.pool.count * SIZE, world.scheduler.waiting
    deadline = None if seconds is None else world.now + seconds
    prompt = prompt or [0]
    if len(prompt) >= room:
        with pytest.raises(ContextLengthError):
            world.new(prompt, answer)
    elif waiting >= world.scheduler.queue:
        with pytest.raises(QueueFullError):
            world.new(prompt, answer)
    else:
        world.new(prompt, answer, priority=priority, deadline=deadline)


def decode(world: World, draft: int) -> None:
    for item in world.items:
        if item.state is State.DECODING:
            item.draft = [world.choose(2) for _ in range(draft)]
    world.decode()


def make_room(world: World, blocks: int) -> None:
    """Ask for blocks for what is computed apart: all but those in the pass in flight may give way."""
    preempted = {item: item.preemptions for item in world.items if item.in_pass}
    assert world.scheduler.make_room(blocks) == (world.pool.available >= blocks)
    assert all(item.preemptions == before for item, before in preempted.items())


def expired(world: World, now: float) -> list[Stream]:
    """End what is overdue."""
    ended = []
    while item := world.scheduler.overdue(now):
        world.scheduler.finish(item)
        ended.append(item)
    return ended


def expire(world: World) -> None:
    world.now += 1
    over = {item for item in world.items if item.deadline is not None and item.deadline <= world.now}
    over = {item for item in over if item.state is not State.FINISHED}
    assert {*expired(world, world.now)} == over


Machine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=60, deadline=None, suppress_health_check=[*HealthCheck]
)
TestAnything = pytest.mark.slow(Machine.TestCase)


@pytest.mark.slow
def test_many_operations():
    """Like the state machine, driven by a random number generator, which is faster and goes on for longer."""
    start, done, preempted, restored = perf_counter(), 0, 0, 0
    for seed in range(10 if not LONG else LONG // 2000):
        draw = random.Random(seed)

        def choose(n: int, draw: random.Random = draw) -> int:
            return int(draw.random() * n)

        world = World(4 + choose(12), choose, rows=1 + choose(6), chunk=1 + choose(12), queue=2 + choose(12))
        store = None
        if seed % 2:
            store = add_store(world.pool, world.memory, choose(40), loses=lambda: choose(10) == 0)
        everything: list[Stream] = []
        for _ in range(2000):
            operation = choose(40)
            if operation < 7:
                before = len(world.items)
                prompt = [1] * choose(30) + [choose(2) for _ in range(choose(20))]
                submit(world, prompt, 1 + choose(20), choose(8) // 7, [None, None, 3, 30][choose(4)])
                everything += world.items[before:]
            elif operation < 18:
                decode(world, [0, 0, 0, 1, 4, 9][choose(6)])
            elif operation < 26:
                world.prefill()
            elif operation < 33:
                world.prefilled()
            elif operation < 34:
                [world.scheduler.abandon, world.draw][choose(2)]()
            elif operation < 35 and world.items:
                world.scheduler.finish(world.items[choose(len(world.items))], reusable=choose(3) > 0)
            elif operation < 38 and world.items:
                item = world.items[choose(len(world.items))]
                item.paused = not item.paused
            elif operation < 39:
                expire(world)
            elif choose(3) == 0:
                make_room(world, choose(world.pool.count + 2))
            elif choose(20) == 0:
                world.pool.clear()
            world.check()
        world.run_to_the_end()
        done += world.operations
        preempted += sum(item.preemptions for item in everything)
        restored += store.counts.restored_tokens if store else 0
    assert preempted > 50
    assert restored > 200
    print(f"{done:,} operations, {preempted:,} preemptions in {perf_counter() - start:.1f} s")
