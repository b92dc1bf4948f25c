"""Sequences on the block pool: reuse of prefixes, copy-on-write, blocks that are reserved, canonical chunks."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_local.errors import CacheFullError, ContextLengthError
from dsv2_local.runtime.block_pool import BlockPool
from dsv2_local.runtime.sequence import Sequence
from tests.scheduling import add_store

SIZE = 4


def pool_of(count: int) -> tuple[BlockPool, list[tuple[int, int]]]:
    """A pool, and the copies that it has made so far."""
    copies: list[tuple[int, int]] = []
    return BlockPool(count, SIZE, lambda source, target: copies.append((source, target))), copies


def computed(pool: BlockPool, tokens: list[int], context: int = 400) -> Sequence:
    """A sequence all of whose tokens are in the cache."""
    sequence = Sequence(pool, context, tokens)
    sequence.begin()
    sequence.reserve(len(tokens) - sequence.length)
    sequence.advance(len(tokens) - sequence.length)
    return sequence


def test_a_prompt_reuses_all_but_its_last_token():
    pool, _ = pool_of(8)
    first = computed(pool, list(range(10)))
    assert (first.blocks, first.length, first.anchor, first.prompt) == ((0, 1, 2), 10, 0, 10)
    same = Sequence(pool, 400, range(10))
    assert same.foresee() == (0, 3)
    assert same.begin() == 0  # not published
    first.insert_prefix()
    assert same.foresee() == (9, 1)
    assert same.begin() == 9
    assert (same.anchor, same.blocks, list(same.block_table)) == (9, (0, 1, 2), [9, 0, 1, 2])
    assert same.match_prefix() == 10
    assert same.match_prefix(5) == 5
    assert same.blocks == (0, 1)
    assert pool.available == 5
    same.release()
    assert (same.blocks, same.length, same.tokens) == ((), 0, list(range(10)))


def test_whole_blocks_alone_are_published_while_the_last_one_is_written():
    pool, copies = pool_of(8)
    sequence = computed(pool, list(range(10)))
    sequence.insert_prefix(whole_blocks=True)
    other = Sequence(pool, 400, [*range(10), 99])
    assert other.begin() == 8
    sequence.tokens.append(99)
    assert sequence.lacking(1) == 0
    sequence.reserve(1)
    assert (sequence.blocks, copies) == ((0, 1, 2), [])
    sequence.insert_prefix()
    assert sequence.lacking(1) == 1
    sequence.reserve(1)
    assert (sequence.blocks, copies) == ((0, 1, 3), [(2, 3)])
    assert 2 in pool.prefixes


def test_a_shared_block_is_copied_before_it_is_written():
    pool, copies = pool_of(8)
    first = computed(pool, list(range(10)))
    first.insert_prefix()
    second = Sequence(pool, 400, [*range(9), 50, 51, 52, 53])
    assert second.begin() == 9
    assert second.lacking(4) == 2  # a copy of the third block, and a fourth
    assert second.fits(4)
    second.reserve(4)
    assert (second.blocks, copies) == ((0, 1, 3, 4), [(2, 3)])
    assert first.blocks == (0, 1, 2)
    assert [pool.references(block) for block in range(5)] == [2, 2, 1, 1, 1]


def test_a_block_of_ones_own_is_written_in_place_if_there_is_none_for_a_copy():
    pool, copies = pool_of(3)
    first = computed(pool, list(range(10)))
    first.insert_prefix()
    first.release()
    second = Sequence(pool, 12, range(12))
    assert second.begin() == 10
    assert (pool.available, second.lacking(2), second.fits(2)) == (0, 1, True)
    second.reserve(2)
    assert (second.blocks, copies) == ((0, 1, 2), [])
    assert [block in pool.prefixes for block in range(3)] == [True, True, False]


def test_a_block_that_another_sequence_holds_is_not_written_even_if_there_is_none_for_a_copy():
    pool, _ = pool_of(3)
    first = computed(pool, list(range(10)))
    first.insert_prefix()
    second = Sequence(pool, 12, range(12))
    second.begin()
    assert not second.fits(1)
    with pytest.raises(CacheFullError):
        second.reserve(1)
    assert (second.length, second.blocks) == (10, (0, 1, 2))
    first.release()
    assert second.fits(1)


def test_what_is_cut_off_is_given_back_before_the_copy():
    """In a full pool, the blocks behind the place where a sequence goes on make room for its copy."""
    pool, copies = pool_of(3)
    first = computed(pool, list(range(12)))
    first.insert_prefix()
    second = Sequence(pool, 12, range(6))
    assert second.match_prefix() == 6
    first.truncate(6)
    assert (first.lacking(1), first.fits(1), pool.available) == (1, True, 0)
    first.reserve(1)
    assert first.blocks == (0, 2)
    assert copies == [(1, 2)]


def test_a_reservation_that_fails_leaves_the_length():
    pool, _ = pool_of(3)
    other = computed(pool, [9] * 4)
    sequence = computed(pool, list(range(4)), context=11)
    with pytest.raises(ContextLengthError):
        sequence.reserve(8)
    assert sequence.fits(4)
    assert not sequence.fits(5)
    with pytest.raises(CacheFullError):
        sequence.reserve(5)
    assert sequence.length == 4
    assert list(sequence.block_table) == [4, *sequence.blocks]
    other.release()
    sequence.reserve(5)
    sequence.release()
    assert pool.available == 3


@settings(max_examples=300, deadline=None)
@given(count=st.integers(1, 8), seed=st.integers(0, 1 << 30))
def test_lacking_and_fits_say_what_reserve_does(count: int, seed: int):
    draw = random.Random(seed)
    pool = BlockPool(count, SIZE)
    allocated = [0]

    def allocate(original=pool.allocate) -> int:
        block = original()
        allocated[0] += 1
        return block

    pool.allocate = allocate  # type: ignore[method-assign]
    sequences = [Sequence(pool, count * SIZE) for _ in range(3)]
    for _ in range(60):
        sequence = draw.choice(sequences)
        operation = draw.randrange(6)
        if operation == 0:
            sequence.tokens = [draw.randrange(2) for _ in range(draw.randrange(1, count * SIZE + 1))]
            matched, _ = sequence.foresee()
            assert sequence.match_prefix(len(sequence.tokens) - 1) == matched
        elif operation == 1:
            sequence.truncate(draw.randrange(sequence.length + 1))
        elif operation == 2:
            sequence.insert_prefix(whole_blocks=draw.random() < 0.5)
        elif room := len(sequence.tokens) - sequence.length:
            tokens = draw.randint(1, room)
            lacking, fits, available = sequence.lacking(tokens), sequence.fits(tokens), pool.available
            allocated[0] = 0
            if fits:
                sequence.reserve(tokens)
                assert allocated[0] == lacking or allocated[0] == lacking - 1
                assert allocated[0] == lacking or available == 0
                assert sequence.lacking(tokens) == 0
                sequence.advance(draw.randint(0, tokens))
            else:
                with pytest.raises(CacheFullError):
                    sequence.reserve(tokens)
    for sequence in sequences:
        sequence.release()
    assert pool.available == count


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 30), stored=st.booleans())
def test_foresee_says_what_a_sequence_takes(seed: int, stored: bool):
    draw = random.Random(seed)
    pool = BlockPool(30, SIZE)
    held = []
    if stored:
        add_store(pool, [[0] * SIZE for _ in range(30)], 30)
        for _ in range(draw.randrange(6)):
            made = computed(pool, [1] * draw.randrange(20) + [draw.randrange(2) for _ in range(draw.randrange(1, 5))])
            made.insert_prefix()
            made.release()
        pool.release([pool.allocate() for _ in range(draw.randrange(31))])  # evicts some
    for _ in range(draw.randrange(6)):
        made = computed(pool, [1] * draw.randrange(20) + [draw.randrange(2) for _ in range(draw.randrange(1, 5))])
        made.insert_prefix(whole_blocks=draw.random() < 0.3)
        held.append(made)
    for made in held:
        if draw.random() < 0.5:
            made.release()
    sequence = Sequence(pool, 120, [1] * draw.randrange(20) + [draw.randrange(2) for _ in range(draw.randrange(1, 5))])
    before = pool.available
    matched, taken = sequence.foresee()
    assert pool.available == before
    assert sequence.begin() == matched
    sequence.reserve(len(sequence.tokens) - matched)
    assert before - pool.available == taken


@pytest.mark.parametrize("anchor", [0, 3, 8])
def test_chunks_are_the_same_wherever_a_sequence_goes_on(anchor: int):
    sequence = Sequence(BlockPool(20, SIZE), 80, range(30))
    sequence.anchor = anchor
    expected = {}
    for length in range(30):
        tokens, whole = sequence.next_chunk(8, length)
        end = length + tokens
        assert end == 30 or (end - anchor) % 8 == 0
        assert tokens <= 8
        assert expected.setdefault(end, whole) == whole
    assert expected[30] == (30 - anchor) % 8 or 8
    assert sum(expected.values()) == 30
    sequence.length = 5
    assert sequence.next_chunk(8) == sequence.next_chunk(8, 5)
    sequence.tokens += [1] * 20
    assert sequence.next_chunk(8, 29)[0] == 1  # the end of the prompt ends a chunk
    assert sequence.next_chunk(8, 30) == (8, 1)
    assert sequence.next_chunk(8, 47) == (3, 1)


def test_a_block_table_grows_with_its_blocks():
    pool, _ = pool_of(40)
    sequence = computed(pool, [1, 2, 3])
    for _ in range(150):
        sequence.reserve(1)
        sequence.advance(1)
        assert list(sequence.block_table) == [sequence.length, *sequence.blocks]
    assert len(sequence.blocks) == 39
