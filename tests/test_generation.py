"""Answers as programs read them: by threads and by tasks, all at once, interrupted, dropped, and from slow sources."""

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest

import dsv2_local
from dsv2_local.errors import ContextLengthError, DeadlineError, InputError
from dsv2_local.generation import Generation
from dsv2_local.llm import LLM
from dsv2_local.quant.convert import convert
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime import interrupts
from tests.models import heed_signals, save_random

CONTEXT = 512


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("generation")
    convert(save_random(root / "source"), root / "converted", recipe=Recipe.NF4)
    return root / "converted"


@pytest.fixture
def llm(directory) -> Iterator[LLM]:
    with dsv2_local.load(directory, context=CONTEXT, batch_invariant=True, parallel=4) as model:
        yield model
        assert_empty(model)


def assert_empty(model: LLM) -> None:
    """All answers have ended, and hold nothing."""
    gc.collect()
    model._thread.join()
    with model.engine.opened():
        assert len(model.engine.scheduler) == 0
        assert not model.engine.pressing
    model.engine.clear()
    pool = model.engine.cache.pool
    assert pool.available == pool.count == len(pool._free)


def ask(model: LLM, number: int, tokens: int = 12, **options: Any) -> Generation:
    some = random.Random(number)
    prompt = [some.randrange(2, 199) for _ in range(some.randrange(1, 70))]
    return model.generate(prompt, max_tokens=tokens, seed=number, logprobs=0, logit_bias={1: -100.0}, **options)


def tokens_of(generation: Any) -> list[tuple[Any, Any]]:
    return [(chunk.token_id, chunk.logprob) for chunk in generation]


async def read(generation: Generation) -> list[tuple[Any, Any]]:
    return [(chunk.token_id, chunk.logprob) async for chunk in generation]


@pytest.fixture
def expected(directory) -> list[list[tuple[Any, Any]]]:
    with dsv2_local.load(directory, context=CONTEXT, batch_invariant=True) as alone:
        return [tokens_of(ask(alone, number)) for number in range(20)]


def test_twenty_tasks_at_once(llm, expected):
    async def main() -> list[list[tuple[Any, Any]]]:
        return await asyncio.gather(*(read(ask(llm, number)) for number in range(20)))

    assert asyncio.run(main()) == expected


def test_tasks_that_share_an_answer_get_each_chunk_once(llm, expected):
    async def main() -> list[list[tuple[Any, Any]]]:
        shared = ask(llm, 3)
        return await asyncio.gather(*(read(shared) for _ in range(4)))

    parts = asyncio.run(main())
    assert sorted(chain(*parts)) == sorted(expected[3])


def test_the_event_loop_goes_on_while_an_answer_is_computed(llm):
    """Each turn of the ticker lets the loop do what is ready; if a step blocked the loop, there would be none."""
    ticks = list[int]()

    async def ticker() -> None:
        while True:
            ticks.append(0)
            await asyncio.sleep(0)

    async def main() -> None:
        ticking = asyncio.create_task(ticker())
        await asyncio.sleep(0)
        before = len(ticks)
        await read(ask(llm, 1, 100))
        assert len(ticks) > before + 100
        ticking.cancel()

    asyncio.run(main())


def test_tasks_that_stop_early(llm, expected):
    async def main() -> None:
        left = ask(llm, 1, 400)
        async for _ in left:
            break
        task = asyncio.create_task(read(ask(llm, 2, 400)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        slow = ask(llm, 4, 400)
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(read(slow), 0.001)
        assert len(slow._inbox._awaiting) <= 1
        slow.close()
        assert await read(slow) == []
        with pytest.raises(DeadlineError):
            await read(ask(llm, 5, 400, timeout=0.001))
        assert await read(ask(llm, 6)) == expected[6]

    asyncio.run(main())


def test_an_answer_may_be_read_by_several_loops_and_a_loop_may_end(llm, expected):
    background = ask(llm, 7).submit()
    first = asyncio.run(_some(background, 5))
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(asyncio.run, read(ask(llm, number))) for number in range(4)]
        assert [each.result() for each in others] == expected[:4]
    assert first + asyncio.run(read(background)) == expected[7]


async def _some(generation: Generation, count: int) -> list[tuple[Any, Any]]:
    return [(c.token_id, c.logprob) for c in [await anext(generation) for _ in range(count)]]


def test_a_closed_answer_stays_closed(llm):
    generation = ask(llm, 1)
    next(generation)
    generation.close()
    assert list(generation) == []
    assert list(generation.submit()) == []
    never = ask(llm, 2)
    never.close()
    never.submit()
    assert never._answer is None
    assert list(llm.batch([never])) == [never]


def test_a_token_that_is_computed_while_the_answer_is_closed_is_not_read(llm, monkeypatch):
    generation = ask(llm, 1)
    inbox = generation._inbox
    original = type(inbox).receive

    def receive(self: Any, token: Any) -> bool:
        if len(received) == 2:
            generation._cancel()  # as another thread does at this moment
        received.append(token)
        return original(self, token)

    received = list[Any]()
    monkeypatch.setattr(type(inbox), "receive", receive)
    assert len(list(generation)) == 2
    assert generation.stats.finish_reason is None


def test_a_paused_source_does_not_pause_the_answers(llm, expected):
    go_on = threading.Event()

    def source() -> Iterator[Generation]:
        yield ask(llm, 0)
        yield ask(llm, 1)
        assert go_on.wait(30)
        yield ask(llm, 2)

    answers = llm.batch(source(), ordered=True)
    assert [each.chunks[-1].token_id for each in (next(answers), next(answers))] == [e[-1][0] for e in expected[:2]]
    assert not go_on.is_set()
    go_on.set()
    assert [tokens_of(each.chunks) for each in answers] == expected[2:3]


def test_a_batch_that_is_closed_does_not_wait_for_its_source(llm):
    release = threading.Event()
    taken = list[int]()

    def source() -> Iterator[Generation]:
        for number in range(3):
            taken.append(number)
            yield ask(llm, number, 300 if number else 2)
        release.wait()
        taken.append(99)
        yield ask(llm, 0)

    answers: Any = llm.batch(source(), ordered=False)
    next(answers)
    answers.close()
    assert taken == [0, 1, 2]
    with llm.engine.opened():
        assert len(llm.engine.scheduler) == 0
    release.set()


def test_prompts_are_taken_as_they_are_needed(llm):
    taken = 0

    def source() -> Iterator[Generation]:
        nonlocal taken
        while True:
            taken += 1
            yield ask(llm, taken % 20, 2)

    answers: Any = llm.batch(source())
    for _ in range(5):
        next(answers)
    assert taken <= 16 + 5 + 1  # four for each row, those that were yielded, and one that is being made
    answers.close()


def test_errors_of_a_batch(llm, expected):
    def source() -> Iterator[Any]:
        yield ask(llm, 0)
        yield [5] * CONTEXT
        yield ask(llm, 1)
        raise ValueError("the source is broken")

    answers = llm.batch(source())
    done = list(islice(answers, 3))
    with pytest.raises(ValueError, match="broken"):
        next(answers)
    assert [tokens_of(each.chunks) for each in done] == [expected[0], [], expected[1]]
    assert [type(each.error) for each in done] == [type(None), ContextLengthError, type(None)]


def test_answers_of_a_batch_come_in_order_or_as_they_end(llm):
    lengths = [200, 3, 60, 2]
    for ordered in (True, False):
        answers = list(llm.batch([ask(llm, n, length) for n, length in enumerate(lengths)], ordered=ordered))
        found = [each.stats.completion_tokens for each in answers]
        assert found == (lengths if ordered else found)
        assert sorted(found) == sorted(lengths)
        assert ordered or found[-1] == 200


@pytest.mark.parametrize("seconds", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_threads_do_what_they_like(llm, expected, seconds):
    """Eight threads read, submit, close and drop answers; those that are read are right, and nothing is left."""
    end, done = time.monotonic() + seconds, list[int]()

    def work(number: int) -> None:
        choose = random.Random(number)
        kept = list[Generation]()
        while time.monotonic() < end:
            which = choose.randrange(20)
            generation = ask(llm, which)
            match choose.randrange(6):
                case 0 | 1:
                    assert tokens_of(generation) == expected[which]
                case 2:
                    assert tokens_of(generation.submit()) == expected[which]
                case 3:
                    assert asyncio.run(read(generation)) == expected[which]
                case 4:
                    (generation.submit if choose.random() < 0.5 else generation.__next__)()
                    cycle: list[Any] = [generation]  # only a garbage collection finds it
                    cycle.append(cycle)
                case 5:
                    next(generation)
                    kept.append(generation)
                    if len(kept) > 3:
                        choose.shuffle(kept)
                        kept.pop().close()
            done.append(which)

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(work, number) for number in range(8)]:
            each.result()
    assert len(done) > 20


def test_closing_the_model_ends_what_threads_read(directory):
    model = dsv2_local.load(directory, context=CONTEXT)
    started = threading.Barrier(7)

    def work(number: int) -> type[BaseException] | None:
        generation = ask(model, number, 400)
        if number % 2:
            generation.submit()
        next(generation)
        started.wait()
        try:
            list(generation)
        except InputError as error:
            return type(error)
        return None

    with ThreadPoolExecutor(6) as pool:
        ended = [pool.submit(work, number) for number in range(6)]
        started.wait()
        model.close()
        assert InputError in {each.result(20) for each in ended}
    assert model._thread._thread is None


INTERRUPTED = """
import gc, os, signal, sys, threading, time, random
import dsv2_local
llm = dsv2_local.load(sys.argv[1], context=512, batch_invariant=True, threads=1)
def ask(number, tokens):
    return llm.generate([7 + number] * 20, max_tokens=tokens, seed=number, logprobs=0, logit_bias={1: -100.0})
expected = [[(c.token_id, c.logprob) for c in ask(number, 200)] for number in range(3)]
choose, wrong, interrupts, done = random.Random(1), [], 0, threading.Event()
def background():
    while not done.is_set():
        for number in range(3):
            if [(c.token_id, c.logprob) for c in ask(number, 200)] != expected[number]:
                wrong.append(number)
def kill():
    while not done.is_set():
        time.sleep(choose.random() * 0.02)
        os.kill(os.getpid(), signal.SIGINT)
def guarded(action):
    global interrupts
    while True:
        try:
            return action()
        except KeyboardInterrupt:
            interrupts += 1
reader = threading.Thread(target=background)
killer = threading.Thread(target=kill)
end = time.monotonic() + float(sys.argv[2])
submitted, unharmed = ask(2, 200), []
def main():
    global submitted
    while time.monotonic() < end:
        if submitted.ended:
            unharmed.append([(c.token_id, c.logprob) for c in tuple(submitted._inbox.ready)] == expected[2])
            submitted = ask(2, 200)
        submitted.submit()
        for chunk in ask(0, 200):
            pass
reader.start()
guarded(lambda: (killer.is_alive() or killer.start(), main()))
signal.signal(signal.SIGINT, signal.SIG_IGN)
done.set(); killer.join(); reader.join()
submitted.close(); llm._thread.join(); gc.collect()
with llm.engine.opened():
    left = len(llm.engine.scheduler), llm.engine.pressing, len(llm.engine._open), len(llm.engine._drawn)
llm.engine.clear()
pool = llm.engine.cache.pool
print(interrupts, wrong, unharmed.count(False), left, pool.available - pool.count, flush=True)
"""


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_interrupts_at_any_moment(directory, seconds):
    """Ctrl-C in a program whose other threads read answers: these are right to the last bit, and nothing is left."""
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(directory), str(seconds)], capture_output=True, text=True, timeout=90,
        preexec_fn=heed_signals, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert result.stdout, result.stderr
    interrupts, rest = result.stdout.strip().split(" ", 1)
    assert int(interrupts) > 10
    assert rest == "[] 0 (0, False, 0, 0) 0"


def test_a_program_that_ends_while_answers_are_computed(directory):
    script = (
        "import sys, dsv2_local\n"
        "llm = dsv2_local.load(sys.argv[1], context=512)\n"
        "kept = [llm.generate([number], max_tokens=400).submit() for number in range(2, 9)]\n"
        "next(kept[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", script, str(directory)], env=environment, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


def test_signal_handlers_are_put_back(llm):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    list(ask(llm, 1))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_that_hangs_can_be_interrupted(llm, monkeypatch):
    monkeypatch.setattr(interrupts, "PATIENCE", 0.05)
    reached = list[str]()

    def launch(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the first")
        time.sleep(0.06)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("never")

    monkeypatch.setattr(llm.engine.decode_step, "launch", launch)
    with pytest.raises(KeyboardInterrupt):
        list(ask(llm, 1))
    assert reached == ["after the first"]
