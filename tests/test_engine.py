"""Many answers in common steps: each is, to the last bit, the one that is computed alone.

DSV2_LONG=1 runs the random tests far longer.
"""

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import dsv2_local
from dsv2_local.errors import (
    ContextLengthError,
    DeadlineError,
    DeviceError,
    InputError,
    NonFiniteError,
    QueueFullError,
)
from dsv2_local.kernels import cpu
from dsv2_local.llm import LLM
from dsv2_local.offload.balance import Watch
from dsv2_local.offload.plan_request import Mode
from dsv2_local.progress import no_progress
from dsv2_local.quant.convert import convert
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime import engine_core
from dsv2_local.runtime.answer import Answer, GeneratedToken, Request
from dsv2_local.runtime.prompt_logprobs import PromptLogprobs, TokenLogprob
from dsv2_local.runtime.prompt_lookup import PromptLookup
from dsv2_local.runtime.sampler import Sampler
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.stats import Stats
from dsv2_local.runtime.step import StepResult
from dsv2_local.runtime.waiting import State
from tests.conftest import kernels
from tests.models import save_random
from tests.test_placement import devices, loaded

CONTEXT = 448  # 7 blocks
LONG = bool(os.environ.get("DSV2_LONG"))
RUNS = settings(
    max_examples=400 if LONG else 12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not LONG,
    database=None,
    phases=[Phase.generate] if LONG else list(Phase),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    convert(save_random(root / "source"), root / "converted", recipe=Recipe.NF4)
    return root / "converted"


@dataclass
class Reading:
    """A reader of tokens, who may ask for each."""

    tokens: list[GeneratedToken] = field(default_factory=list)
    ends: list[BaseException | None] = field(default_factory=list)

    def receive(self, token: GeneratedToken) -> bool:
        assert not self.ends
        self.tokens.append(token)
        return False

    def end(self, error: BaseException | None) -> None:
        self.ends.append(error)


class World:
    """An engine that computes many answers, and one that computes them one at a time."""

    def __init__(self, shared: LLM, alone: LLM) -> None:
        self.shared, self.alone = shared.engine, alone.engine
        self.preemptions = 0

    def expected(self, request: Request) -> list[GeneratedToken]:
        self.alone.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PromptLookup, "propose", lambda self, most: [])
            return list(self.alone.generate(request, Stats()))

    def expected_prompt(self, request: Request) -> list[TokenLogprob | None]:
        """The log probabilities of the prompt."""
        self.alone.clear()
        answer = self.alone.submit(replace(request, max_tokens=0), Stats(), Reading())
        self.alone.drive(lambda: answer.ended)
        return entries(answer)

    def submit(self, request: Request, *, paced: bool = False) -> tuple[Answer, Reading]:
        reading = Reading()
        return self.shared.submit(request, Stats(), reading, paced=paced), reading

    def step(self) -> bool:
        with self.shared.opened():
            return self.shared.step()

    def check_empty(self) -> None:
        """All answers have ended, and hold nothing."""
        with self.shared.opened():
            engine = self.shared
            assert len(engine.scheduler) == 0
            assert not engine.scheduler.pass_in_flight
            assert not engine.pressing
            assert not engine._open
            assert not engine._drawn
            assert not engine._submitted
            assert not engine._cancelled
        engine.clear()
        pool = engine.cache.pool
        assert pool.available == pool.count == len(pool._free)
        assert not any(pool._references)


def entries(answer: Answer) -> list[TokenLogprob | None]:
    return answer.prompt_logprobs.entries if answer.prompt_logprobs else []


def request(prompt: list[int], count: int = 8, **options: Any) -> Request:
    names = "logprobs", "priority", "timeout", "prompt_logprobs"
    logprobs, priority, timeout, prompt_logprobs = (options.pop(name, None) for name in names)
    params = SamplingParams(**{"temperature": 0.0, **options})
    return Request(
        prompt, params, count, frozenset({1}), logprobs, priority or 0, timeout, prompt_logprobs=prompt_logprobs
    )


def prompts() -> st.SearchStrategy[list[int]]:
    """Prompts that have beginnings in common, or are parts of each other."""

    def make(beginning: int, common: int, rest: int, which: int) -> list[int]:
        shared = random.Random(beginning)
        own = random.Random(which)
        tokens = [shared.randrange(2, 199) for _ in range(200)][:common] + [own.randrange(2, 199) for _ in range(rest)]
        return tokens or [2]

    lengths = st.integers(0, 150) | st.sampled_from([63, 64, 65, 128])
    return st.builds(make, st.integers(0, 1), lengths, st.integers(0, 60), st.integers(0, 5))


def samplers() -> st.SearchStrategy[dict[str, Any]]:
    number = st.sampled_from
    return st.fixed_dictionaries(
        {"temperature": number([0.0, 0.5, 1.5]), "seed": st.integers(0, 3)},
        optional={
            "top_p": number([0.5, 0.9]), "top_k": number([2, 20]), "min_p": number([0.05]),
            "repetition_penalty": number([1.3]), "presence_penalty": number([0.7]), "frequency_penalty": number([0.4]),
            "logit_bias": number([{5: 3.0}, {1: -100.0}, {1: 4.0}]), "logprobs": st.integers(0, 3),
            "priority": st.integers(-1, 1), "prompt_logprobs": st.integers(0, 2),
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Arrival:
    request: Request
    step: int
    paced: bool
    cancelled: int | None  # the step


def arrivals() -> st.SearchStrategy[list[Arrival]]:
    requests = st.builds(lambda p, n, o: request(p, n, **o), prompts(), st.integers(0, 70), samplers())
    cancelled = st.none() | st.none() | st.integers(0, 80)
    return st.lists(st.builds(Arrival, requests, st.integers(0, 30), st.booleans(), cancelled), min_size=2, max_size=9)


def partly_right(choose: random.Random, answers: dict[tuple[int, ...], list[int]]) -> Callable[..., list[int]]:
    """For `PromptLookup.propose`: a draft of which a random part is right."""

    def propose(lookup: PromptLookup, most: int) -> list[int]:
        text, draft = tuple(lookup._tokens), list[int]()
        if choose.random() < 0.3:
            return []
        for prompt, answer in answers.items():
            if text[: len(prompt)] == prompt and list(text[len(prompt) :]) == answer[: len(text) - len(prompt)]:
                draft = answer[len(text) - len(prompt) :]
        draft = draft[: choose.randrange(8)] + [choose.randrange(199) for _ in range(choose.randrange(8))]
        return draft[:most]

    return propose


def run(world: World, coming: list[Arrival], choose: random.Random, *, exact: bool = True, drafts: bool = True) -> None:
    expected = [world.expected(each.request) for each in coming]
    of_prompts = [world.expected_prompt(each.request) for each in coming]
    right = {tuple(a.request.prompt): [t.token for t in e] for a, e in zip(coming, expected, strict=True)}
    answers: list[tuple[Answer, Reading] | None] = [None] * len(coming)
    world.shared.end_all(InputError("left by a test that failed"))
    world.shared.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptLookup, "propose", partly_right(choose, right) if drafts else lambda self, most: [])
        step = 0
        while not all(answer and answer[0].ended for answer in answers):
            for number, each in enumerate(coming):
                answer = answers[number]
                if answer is None and each.step <= step:
                    answers[number] = world.submit(each.request, paced=each.paced)
                elif answer and each.cancelled is not None and each.step + each.cancelled <= step:
                    world.shared.cancel(answer[0])
                elif answer and each.paced and not answer[0].asked and choose.random() < 0.6:
                    answer[0].asked = True
            world.step()
            step += 1
            assert step < 3_000
    for each, wanted, of_prompt, answer in zip(coming, expected, of_prompts, answers, strict=True):
        assert answer
        got, reading = answer
        world.preemptions += got.preemptions
        assert reading.ends == [None]
        if not got.stats.finish_reason:
            assert each.cancelled is not None
            wanted = wanted[: len(reading.tokens)]
        complete = bool(got.stats.finish_reason or reading.tokens)
        if exact:
            assert reading.tokens == wanted
            assert entries(got) == of_prompt[: None if complete else len(entries(got))]
        else:
            assert [each and each.token_id for each in entries(got)] == [each and each.token_id for each in of_prompt]
            for token, other in zip(reading.tokens, wanted, strict=True):
                assert token.token == other.token
                if token.logprob is not None and other.logprob is not None:
                    assert math.isclose(token.logprob, other.logprob, abs_tol=1e-3)
    world.check_empty()


@pytest.fixture(scope="module", params=["bf16", pytest.param("int8", marks=pytest.mark.slow)])
def invariant(request, directory) -> Iterator[World]:
    options: dict[str, Any] = {"context": CONTEXT, "cache_dtype": request.param, "batch_invariant": True}
    with dsv2_local.load(directory, **options) as shared, dsv2_local.load(directory, **options) as alone:
        yield World(shared, alone)


@RUNS
@given(arrivals(), st.integers(1, 5), st.sampled_from([16, 64, 100, 512]), st.booleans(), st.randoms())
def test_answers_are_those_computed_alone(invariant, coming, rows, chunk, drafts, choose):
    invariant.shared.scheduler.rows, invariant.shared.chunk = rows, chunk
    run(invariant, coming, choose, drafts=drafts)


def test_answers_that_compete_for_blocks_are_preempted_and_go_on(invariant):
    invariant.shared.scheduler.rows, invariant.shared.chunk = 5, 64
    some, before = random.Random(3), invariant.preemptions
    prompts = [[some.randrange(2, 199) for _ in range(60 + number)] for number in range(6)]
    options: dict[str, Any] = {"temperature": 0.7, "logit_bias": {1: -100.0}}
    requests = [request(prompt, 90, seed=len(prompt), **options) for prompt in prompts]
    run(invariant, [Arrival(each, 0, False, None) for each in requests], some)
    assert invariant.preemptions > before


def apart(coming: list[Arrival]) -> list[Arrival]:
    """The same with prompts that have no beginning in common."""
    return [
        replace(each, request=replace(each.request, prompt=[2 + number, *each.request.prompt[1:]]))
        for number, each in enumerate(coming)
    ]


@pytest.fixture(scope="module")
def plain(directory) -> Iterator[World]:
    """Engines whose prompts are computed in the form of attention that takes the least time."""
    with dsv2_local.load(directory, context=CONTEXT) as shared, dsv2_local.load(directory, context=CONTEXT) as alone:
        yield World(shared, alone)


@RUNS
@given(arrivals(), st.integers(1, 5), st.sampled_from([16, 100, 512]), st.randoms())
def test_answers_are_those_computed_alone_if_nothing_is_reused(plain, coming, rows, chunk, choose):
    plain.shared.scheduler.rows = rows
    plain.shared.chunk = plain.alone.chunk = chunk
    run(plain, apart(coming), choose)


@pytest.fixture(
    scope="module",
    params=[
        (Mode.HYBRID, 1), pytest.param((Mode.CPU, 1), marks=pytest.mark.slow),
        pytest.param((Mode.STREAM, 1), marks=pytest.mark.slow), pytest.param((Mode.HYBRID, 2), marks=pytest.mark.slow),
        pytest.param((Mode.STREAM, 2), marks=pytest.mark.slow),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
)  # fmt: skip
def placed(request) -> Iterator[World]:
    """dsv2-nano, with some of its experts on simulated devices."""
    mode, number = request.param
    with loaded(mode, on=devices(7, number)) as shared, loaded(mode, on=devices(7, number)) as alone:
        yield World(shared, alone)


@settings(RUNS, max_examples=60 if LONG else 6)
@given(arrivals(), st.integers(1, 5), st.sampled_from([16, 100, 512]), st.randoms())
def test_answers_are_those_computed_alone_wherever_experts_are(placed, coming, rows, chunk, choose):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "correction", lambda self: None)  # costs must not depend on how busy the machine is
        placed.shared.scheduler.rows = rows
        placed.shared.chunk = placed.alone.chunk = chunk
        run(placed, apart(coming), choose)


def test_the_reference_chooses_the_same_tokens(directory):
    some = random.Random(5)
    prompts = [[some.randrange(2, 199) for _ in range(count)] for count in (3, 70, 100)]
    coming = [Arrival(request(prompt, 9, logprobs=2), step, False, None) for step, prompt in enumerate(prompts)]
    with (
        kernels(cpu.REFERENCE),
        dsv2_local.load(directory, context=CONTEXT) as shared,
        dsv2_local.load(directory, context=CONTEXT) as alone,
    ):
        run(World(shared, alone), coming, some, exact=False)


WHERE = ["attend", "feed_forward", "launch", "logits", "choose", "receive", "progress", "prompt_logprobs"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, DeviceError, MemoryError])
@pytest.mark.parametrize("where", WHERE)
def test_an_error_anywhere_harms_nobody_else(invariant, where, error, monkeypatch):
    """An interrupt harms no answer but one that it strikes itself; an error ends those that it concerns."""
    engine, choose = invariant.shared, random.Random(WHERE.index(where))
    engine.scheduler.rows, engine.chunk = 4, 32
    layer = engine.model.layers[1]
    place = {
        "attend": (layer, "attend"), "feed_forward": (layer, "feed_forward"), "launch": (engine.decode_step, "launch"),
        "logits": (engine.model, "logits"), "choose": (Sampler, "choose"), "receive": (Reading, "receive"),
        "prompt_logprobs": (PromptLogprobs, "_compute"),
    }.get(where)  # fmt: skip
    requests = [
        request(
            [choose.randrange(2, 199) for _ in range(choose.randrange(1, 90))], 12, temperature=1.0, seed=seed,
            prompt_logprobs=1,
        )
        for seed in range(5)
    ]  # fmt: skip
    expected = [invariant.expected(each) for each in requests]
    of_prompts = [invariant.expected_prompt(each) for each in requests]
    harmed = raised = 0
    for countdown in [*range(8), *(choose.randrange(8, 60) for _ in range(4))]:
        left = countdown

        def fail() -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise error("failed")

        with monkeypatch.context() as patch:
            if place:
                owner, name = place
                original = getattr(owner, name)

                def failing(*args: Any, original: Any = original, **options: Any) -> Any:
                    fail()
                    return original(*args, **options)

                patch.setattr(owner, name, failing)
                if where in ("attend", "feed_forward"):
                    patch.setattr(engine.decode_step, "_steps", {})  # recorded steps do not call it
            answers = []
            for each in requests:
                reading = Reading()
                progress = (lambda done, total: fail()) if where == "progress" else no_progress
                answers.append((engine.submit(each, Stats(), reading, progress), reading))
            while not all(answer.ended for answer, _ in answers):
                try:
                    invariant.step()
                except error:
                    raised += 1
        ended_early = [reading for _, reading in answers if reading.ends != [None]]
        harmed += len(ended_early)
        if error is KeyboardInterrupt or where in ("choose", "receive", "progress"):
            assert len(ended_early) <= 1
        for (answer, reading), wanted, of_prompt in zip(answers, expected, of_prompts, strict=True):
            assert len(reading.ends) == 1
            assert entries(answer) == of_prompt[: None if reading.tokens else len(entries(answer))]
            assert reading.tokens == wanted[: len(reading.tokens)]
            assert len(reading.tokens) == len(wanted) or isinstance(reading.ends[0], (error, DeviceError))
        invariant.check_empty()
    assert raised > 0 if error is KeyboardInterrupt else raised == 0
    assert harmed > 0 or error is KeyboardInterrupt


def test_nan_ends_one_answer_and_the_prefix_cache(invariant, monkeypatch):
    requests = [request([9 + number] * 70, 20) for number in range(3)]
    expected = [invariant.expected(each) for each in requests]
    original = Sampler.choose

    def choose(sampler: Sampler, result: StepResult) -> int:
        if sampler is answers[1][0]._sampler and len(answers[1][1].tokens) == 5:
            raise NonFiniteError("the logits")
        return original(sampler, result)

    monkeypatch.setattr(Sampler, "choose", choose)
    answers = [invariant.submit(each) for each in requests]
    while not all(answer.ended for answer, _ in answers):
        invariant.step()
    assert [reading.tokens for _, reading in answers] == [expected[0], expected[1][:5], expected[2]]
    assert [type(reading.ends[0]) for _, reading in answers] == [type(None), NonFiniteError, type(None)]
    invariant.check_empty()


def test_what_is_submitted_while_the_engine_closes_ends(directory, monkeypatch):
    model = dsv2_local.load(directory, context=CONTEXT)
    engine = model.engine
    monkeypatch.setattr(engine, "check_usable", lambda: None)  # as if it was asked just before
    original = engine.cache.new_sequence

    def closing(*args: Any) -> Any:
        monkeypatch.undo()
        model.close()
        return original(*args)

    monkeypatch.setattr(engine.cache, "new_sequence", closing)
    late = model.generate([5, 6, 7]).submit()
    model._thread.join()
    with pytest.raises(InputError, match="closed"):
        next(late)
    assert not engine.pressing


def test_a_refusal_by_the_scheduler_ends_the_answer(invariant):
    engine = invariant.shared
    queue, engine.scheduler.queue = engine.scheduler.queue, 2
    try:
        answers = [invariant.submit(request([5, each], 3, timeout=100.0)) for each in range(2, 4)]
        with pytest.raises(QueueFullError):
            invariant.submit(request([5], 3))
        engine.scheduler.queue = 1  # as if others had been preempted
        invariant.step()
        assert isinstance(answers[1][1].ends[0], QueueFullError)
        while not answers[0][0].ended:
            invariant.step()
    finally:
        engine.scheduler.queue = queue
    assert answers[0][1].ends == [None]
    invariant.check_empty()


def test_what_a_garbage_collection_cancels_in_the_middle_of_a_step_waits_until_its_end(invariant, monkeypatch):
    engine = invariant.shared
    expected = invariant.expected(request([7] * 30, 10))
    doomed = [invariant.submit(request([each] * 9, 50)) for each in range(2, 9)]
    kept = invariant.submit(request([7] * 30, 10))
    original = engine.scheduler.finish

    def finish(answer: Answer, **options: Any) -> None:
        for each, _ in doomed[:2]:
            engine.cancel(each)
        del doomed[:2]
        depth.append(len(depth))
        assert len(depth) == 1  # never inside itself
        original(answer, **options)
        depth.pop()

    depth: list[int] = []
    every = list(doomed)
    monkeypatch.setattr(engine.scheduler, "finish", finish)
    engine.cancel(doomed.pop()[0])
    while not all(answer.ended for answer, _ in [*every, kept]):
        invariant.step()
    assert kept[1].tokens == expected
    monkeypatch.undo()
    invariant.check_empty()


def test_an_idle_engine_gives_back_the_blocks_of_a_prefill_that_was_cancelled(invariant, monkeypatch):
    monkeypatch.setattr(engine_core, "PREFILL_SECONDS", 0.0)  # half a layer in a step
    engine, pool = invariant.shared, invariant.shared.cache.pool
    answer, _ = invariant.submit(request([7] * 30, 10))
    invariant.step()
    assert answer.in_pass
    engine.cancel(answer)  # and no further step
    assert pool.available == pool.count
    invariant.check_empty()


@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_deadlines_end_answers_in_every_phase(invariant, monkeypatch, phase):
    engine, now = invariant.shared, time.monotonic()
    engine.scheduler.rows, engine.chunk = 1, 16
    monkeypatch.setattr(engine_core, "PREFILL_SECONDS", 0.0)
    first = invariant.submit(request([3] * 20, 200, priority=1))[0] if phase == "queue" else None
    answer, reading = invariant.submit(request([2] * 40, 200, timeout=1000.0))
    wanted = {"queue": State.WAITING, "prefill": State.PREFILLING, "decode": State.DECODING}[phase]
    while answer.state is not wanted or (first and first.state is not State.DECODING):
        invariant.step()
    monkeypatch.setattr(time, "monotonic", lambda: now + 999)
    invariant.step()
    assert not answer.ended
    monkeypatch.setattr(time, "monotonic", lambda: now + 2000)
    invariant.step()
    assert isinstance(reading.ends[0], DeadlineError)
    monkeypatch.undo()
    if first:
        engine.cancel(first)
    invariant.step()
    invariant.check_empty()


def test_the_highest_priority_is_answered_first(invariant):
    engine = invariant.shared
    engine.scheduler.rows = 1
    answers = [invariant.submit(request([3 + each], 5, priority=each)) for each in (0, 2, 1)]
    ended = []
    while len(ended) < 3:
        invariant.step()
        ended += [number for number, (answer, _) in enumerate(answers) if answer.ended and number not in ended]
    assert ended == [1, 2, 0]


def test_impossible_requests_are_refused_when_they_are_submitted(invariant):
    with pytest.raises(ContextLengthError):
        invariant.submit(request([5] * CONTEXT))
    with pytest.raises(InputError):
        invariant.submit(request([199]))
    with pytest.raises(InputError):
        invariant.submit(request([]))
    invariant.check_empty()
