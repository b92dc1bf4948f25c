"""The expert cache against naive implementations of its policies, and hit rates on routing traces."""

import itertools
import random
from collections import defaultdict
from functools import lru_cache

import pytest
import torch

import dsv2_local
from dsv2_local.errors import InputError
from dsv2_local.kernels import ops
from dsv2_local.offload.expert_cache import HALF_LIFE, ExpertCache, Key, Policy
from dsv2_local.offload.trace import Trace, best_hit_rate, hit_rate
from tests.test_cli import dsv2

LAYERS, EXPERTS, CHOSEN = 4, 12, 3


def random_trace(seed: int, tokens: int = 120) -> Trace:
    """A trace of experts with unequal, drifting popularity."""
    draw = random.Random(seed)
    weights = [[draw.expovariate(1) for _ in range(EXPERTS)] for _ in range(LAYERS)]
    found = []
    for _ in range(tokens):
        token = []
        for layer in weights:
            layer[draw.randrange(EXPERTS)] = draw.expovariate(1)
            token.append(sorted(range(EXPERTS), key=lambda e: -layer[e] * draw.random())[:CHOSEN])
        found.append(token)
    return Trace("random", LAYERS, EXPERTS, found)


class Naive:
    """A cache written from the definitions of the policies, which compares all cached experts at every eviction."""

    def __init__(self, slots: int, policy: Policy) -> None:
        self.slots, self.policy, self.cached = slots, policy, set[Key]()
        self.uses: dict[Key, list[int]] = defaultdict(list)  # tokens that used the expert
        self.last: dict[Key, int] = {}

    def worth(self, key: Key, token: int) -> tuple[float, int]:
        if self.policy is Policy.LRU:
            return (0, self.last[key])
        if self.policy is Policy.LFU:
            return (len(self.uses[key]), self.last[key])
        return (sum(0.5 ** ((token - use) / HALF_LIFE) for use in self.uses[key]), self.last[key])

    def hits(self, trace: Trace) -> int:
        clock = itertools.count()
        hits = 0
        for token, layers in enumerate(trace.tokens):
            for layer, chosen in enumerate(layers):
                keys = [(layer, expert) for expert in chosen]
                for key in keys:
                    self.uses[key].append(token)
                    self.last[key] = next(clock)
                hits += len([key for key in keys if key in self.cached])
                for key in keys:
                    if key in self.cached:
                        continue
                    if len(self.cached) == self.slots:
                        victim = min(self.cached - set(keys), key=lambda k: self.worth(k, token), default=None)
                        if victim is None:
                            continue
                        if self.policy is Policy.LRFU and self.worth(victim, token) > self.worth(key, token):
                            continue
                        self.cached.remove(victim)
                    self.cached.add(key)
        return hits


@pytest.mark.parametrize("policy", [Policy.LRU, Policy.LFU, Policy.LRFU])
@pytest.mark.parametrize("slots", [1, 3, 7, 12, 30, 48])
def test_policies_agree_with_their_definitions(policy, slots):
    for seed in range(4):
        trace = random_trace(seed)
        uses = len(list(trace.uses()))
        assert hit_rate(trace, slots, policy) == Naive(slots, policy).hits(trace) / uses


def test_no_policy_beats_the_optimal_cache():
    for seed, slots in itertools.product(range(6), (1, 5, 13, 24, 40)):
        trace = random_trace(seed)
        best = best_hit_rate(trace, slots)
        assert all(hit_rate(trace, slots, policy) <= best for policy in Policy)
    assert best_hit_rate(trace, 0) == 0
    all_but_first_uses = 1 - len(set(trace.uses())) / len(list(trace.uses()))
    assert best_hit_rate(trace, 48) == all_but_first_uses == hit_rate(trace, 48, Policy.LRU)


def test_the_optimal_cache_is_the_best_of_all_choices():
    """On traces so small that all choices of evictions can be tried."""
    for seed in range(12):
        draw = random.Random(seed)
        uses = [draw.randrange(4) for _ in range(9)]

        @lru_cache(None)
        def most_hits(position: int, cached: frozenset[int], uses: tuple[int, ...] = tuple(uses)) -> int:
            if position == len(uses):
                return 0
            if uses[position] in cached:
                return 1 + most_hits(position + 1, cached)
            choices = [cached, *((cached - {victim}) | {uses[position]} for victim in cached)]
            if len(cached) < 2:
                choices.append(cached | {uses[position]})
            return max(most_hits(position + 1, choice) for choice in choices)

        trace = Trace("tiny", 1, 4, [[[expert]] for expert in uses])
        assert best_hit_rate(trace, 2) * len(uses) == most_hits(0, frozenset())


@pytest.mark.parametrize("policy", Policy)
def test_random_operations_never_mix_up_slots(policy):
    draw = random.Random(7)
    cache = ExpertCache(10, LAYERS, EXPERTS, policy)
    pinned: set[Key] = set()
    slot_of: dict[Key, int] = {}
    for _ in range(20_000):
        action = draw.random()
        layer = draw.randrange(LAYERS)
        if action < 0.55:
            chosen = draw.sample(range(EXPERTS), draw.randrange(1, 5))
            hits, misses = cache.use(layer, chosen)
            assert hits == {e: slot_of[layer, e] for e in chosen if (layer, e) in slot_of}
            assert sorted([*hits, *misses]) == sorted(chosen)
            for expert in misses:
                in_use = pinned | {(layer, e) for e in hits}
                if admission := cache.admit((layer, expert), free_only=draw.random() < 0.2):
                    if admission.evicted:
                        assert admission.evicted not in in_use
                        assert slot_of.pop(admission.evicted) == admission.slot
                    assert admission.slot not in slot_of.values()
                    slot_of[layer, expert] = admission.slot
                    hits[expert] = admission.slot
                    if draw.random() < 0.1:  # the copy fails
                        cache.evict((layer, expert))
                        del slot_of[layer, expert], hits[expert]
            pinned |= {(layer, e) for e in hits}
        if draw.random() < 0.5:
            cache.release()
            pinned.clear()
        assert len(cache) == len(slot_of) <= 10
    assert {key: cache.peek(key) for key in slot_of} == slot_of
    assert cache.total.hits + cache.total.misses > 10_000


def test_prefill_does_not_evict_the_experts_of_a_conversation():
    cache = ExpertCache(4, 1, 12)
    for expert in range(3):
        cache.use(0, [expert])
        cache.admit((0, expert))
        cache.release()
    before = cache.counter(0)
    for expert in range(3, 12):
        assert cache.peek((0, expert)) is None
        admission = cache.admit((0, expert), free_only=True)
        assert (admission is not None) == (expert == 3)  # there is one free slot
    assert all(cache.peek((0, expert)) is not None for expert in range(4))
    assert cache.counter(0).hits == before.hits


def test_traces_are_saved_and_damaged_ones_refused(tmp_path):
    trace, file = random_trace(1), tmp_path / "a.trace"
    trace.save(file)
    assert Trace.load(file) == trace
    for number, (line, fault) in enumerate([("1 2;x", "not a list"), ("1;2", "layers"), ("99;1;1;1", "below 12")]):
        lines = file.read_text().splitlines()
        lines[3 + number] = line
        broken = tmp_path / f"{number}.trace"
        broken.write_text("\n".join(lines))
        with pytest.raises(InputError, match=f"line {4 + number}: .*{fault}"):
            Trace.load(broken)
    for text in ("", "{}", "hello", '{"format": "dsv2 routing trace 1"}', "[1]"):
        file.write_text(text)
        with pytest.raises(InputError, match="not a routing trace"):
            Trace.load(file)
    with pytest.raises(InputError, match="cannot be read"):
        Trace.load(tmp_path / "none")


@pytest.mark.slow
def test_bench_records_the_experts_that_the_model_chooses(tmp_path, monkeypatch):
    text, file = "A river is a large natural stream of water.", tmp_path / "nano.trace"
    done = dsv2("bench", "--record-trace", file, stdin=text.encode())
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    trace = Trace.load(file)
    llm = dsv2_local.load()
    ids = llm.tokenizer.encode(text)
    assert (len(trace.tokens), trace.layers, trace.experts) == (len(ids), 5, 24)
    chosen = []
    route = ops.route
    monkeypatch.setattr(ops, "route", lambda *args: chosen.append(route(*args)[0]) or route(*args))
    llm.logits(ids)  # in one prefill step: the same choices, except for ties within the kernels' tolerance
    prefilled = torch.stack(chosen, 1).tolist()
    pairs = [(set(a), set(b)) for x, y in zip(trace.tokens, prefilled, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(len(a & b) for a, b in pairs) > 0.97 * sum(len(a) for a, _ in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--record-trace", "none/x"], "directory does not exist"),
        (["--record-trace", "x", "--random-weights", "deepseek-v2"], "the routing of --random-weights is random"),
        (["--record-trace", "x", "--text", "no-such-file"], "cannot be read"),
    ],
)
def test_invalid_trace_options_are_refused(options, message, tmp_path):
    options = [tmp_path / option if option in ("x", "none/x") else option for option in options]
    done = dsv2("bench", *options, stdin=b"a text")
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()
    assert list(tmp_path.iterdir()) == []
