"""The split of missing experts between copies and CPU is optimal, and the dispatch is sorted as documented."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsv2_local.offload.balance import MEMORY, Costs, Watch, divide, streaming_pays
from dsv2_local.offload.dispatch import Dispatch
from dsv2_local.offload.sorted_pairs import runs_of

SECONDS = st.floats(1e-6, 1.0)
COSTS = st.builds(Costs, SECONDS, SECONDS, st.floats(0.0, 1.0))


@given(st.lists(st.integers(1, 100), max_size=12), COSTS)
def test_no_other_split_is_faster(counts, costs):
    counts.sort(reverse=True)

    def seconds(fetched: int) -> float:
        return max(fetched * costs.fetch, sum(costs.host(count) for count in counts[fetched:]))

    assert seconds(divide(counts, costs)) <= min(map(seconds, range(len(counts) + 1))) * (1 + 1e-9)


def test_equal_speeds_split_in_half_and_a_slow_link_copies_nothing():
    assert divide([1] * 6, Costs(1, 1, 0)) == 3
    assert divide([1] * 6, Costs(10, 1, 0)) == 0
    assert divide([1] * 6, Costs(1, 10, 0)) == 6
    assert divide([], Costs(1, 1, 0)) == 0


def test_experts_with_many_tokens_are_copied():
    assert divide([50, 2, 1], Costs(fetch=3, read=1, token=1)) == 1


@given(COSTS, st.floats(0, 0.99))
def test_once_streaming_pays_it_pays_for_longer_prompts(costs, resident):
    pays = [streaming_pays(tokens, 64, 6, resident, costs) for tokens in (2, 8, 32, 128, 512, 2048, 8192)]
    if costs.token > 0.01 * costs.fetch:
        assert pays == sorted(pays), pays


def test_a_fast_link_streams_and_a_slow_one_does_not():
    assert streaming_pays(512, 64, 6, 0.0, Costs(1e-3, 1e-3, 1e-3))
    assert not streaming_pays(2, 64, 6, 0.0, Costs(1e-3, 1e-3, 1e-3))
    assert not streaming_pays(512, 64, 6, 0.0, Costs(1.0, 1e-4, 1e-6))


def test_without_the_cpu_a_layer_streams_if_nearly_all_of_its_experts_are_chosen():
    assert not streaming_pays(2, 64, 6, 0.0, Costs(1, 1, 1), shared=False)
    assert not streaming_pays(16, 64, 6, 0.5, Costs(1, 1, 1), shared=False)
    assert streaming_pays(64, 64, 6, 0.5, Costs(1, 1, 1), shared=False)


def test_costs_are_corrected_only_if_they_are_off_by_a_quarter():
    watch = Watch()
    for _ in range(10 * MEMORY):
        watch.observe(1.0, 1.2)
        assert watch.correction() is None
    for _ in range(10 * MEMORY):
        watch.observe(1.0, 2.0)
        if ratio := watch.correction():
            break
    assert 1.25 < ratio < 2
    assert watch.ratio == 1
    for _ in range(MEMORY - 1):  # too few samples
        watch.observe(1.0, 50.0)
        assert watch.correction() is None


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5))
def test_dispatch_sorts_pairs_and_finds_them_again(seed, tokens, per_token, groups):
    draw = np.random.default_rng(seed)
    ids = np.stack([draw.permutation(10)[:per_token] for _ in range(tokens)]).astype(np.int64)
    group_of = draw.integers(0, groups, 10)
    members = [np.flatnonzero(group_of == group).tolist() for group in range(groups)]
    counts = Counter(ids.ravel().tolist())
    if tokens == 1:
        members = [[expert for expert in group if counts[expert]] for group in members]
    dispatch = Dispatch(ids, counts, members)
    assert dispatch.parts[0].start == 0
    assert dispatch.parts[-1].stop == tokens * per_token
    for group, part in enumerate(dispatch.parts):
        experts = dispatch.experts[part].tolist()
        assert set(experts) <= set(members[group])
        assert experts == sorted(experts)
    for token in range(tokens):
        assert dispatch.experts[dispatch.rows[token]].tolist() == ids[token].tolist()
        assert (dispatch.tokens[dispatch.rows[token]] == token).all()


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 50))
def test_runs_are_divided_in_order_and_none_is_empty(counts, most):
    lists = runs_of(enumerate(counts), most)
    sizes = [sum(count for _, count in runs) for runs in lists]
    assert all(0 < size <= most for size in sizes)
    assert all(size == most for size in sizes[:-1])
    pairs = [index for runs in lists for index, count in runs for _ in range(count)]
    assert pairs == [index for index, count in enumerate(counts) for _ in range(count)]
    assert all(count > 0 for runs in lists for _, count in runs)
