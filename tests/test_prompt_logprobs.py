"""Log probabilities of prompts are, to the last bit, those of the logits, whatever is cached and however it is cut."""

import asyncio
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import dsv2_local
from dsv2_local.errors import ContextLengthError, NonFiniteError
from dsv2_local.kernels import cpu
from dsv2_local.llm import LLM
from dsv2_local.runtime import engine_core, prompt_logprobs
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.prompt_logprobs import ROWS, TokenLogprob
from tests.conftest import kernels


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with dsv2_local.load(device="cpu") as loaded:
        yield loaded


@pytest.fixture
def empty(llm) -> LLM:
    llm.engine.clear()
    return llm


def some(count: int, seed: int = 0) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(2, 1000) for _ in range(count)]


def expected(llm: LLM, ids: list[int], top: int) -> list[TokenLogprob | None]:
    """What the logits of the whole prompt say."""
    wanted: list[TokenLogprob | None] = [None]
    for token, row in zip(ids[1:], llm.logits(ids).log_softmax(-1), strict=False):
        values, tokens = row.topk(top)
        wanted.append(TokenLogprob(token, float(row[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True))))
    return wanted


@pytest.mark.parametrize("count", [1, 2, ROWS, ROWS + 1, ROWS + 2, 600])
def test_they_are_those_of_the_logits(empty, count):
    ids = some(count)
    wanted = expected(empty, ids, 3)  # and the prompt is in the prefix cache now
    generation = empty.generate(ids, prompt_logprobs=3, max_tokens=2, temperature=0, logprobs=3)
    assert generation.prompt_logprobs == []
    chunks = list(generation)
    assert generation.prompt_logprobs == wanted
    assert generation.stats.reused_tokens == 0
    assert len(chunks) >= 1
    assert empty.generate(ids).prompt_logprobs == []


def test_the_first_token_after_the_prompt_has_the_log_probability_of_the_next_entry(empty):
    ids = some(100)
    first = next(empty.generate(ids, prompt_logprobs=2, logprobs=2, temperature=0))
    assert first.token_id is not None
    (*_, last) = expected(empty, [*ids, first.token_id], 2)
    assert last == (first.token_id, first.logprob, first.top_logprobs)


def test_greedy_is_exact(empty):
    ids = [chunk.token_id for chunk in empty.generate("A dog is", max_tokens=30, temperature=0)]
    prompt = [*empty.tokenizer.encode("A dog is"), *(token for token in ids if token is not None)]
    generation = empty.generate(prompt, prompt_logprobs=1, max_tokens=0)
    list(generation)
    entries = generation.prompt_logprobs[-len(ids) :]
    assert all(entry and entry.logprob == max(value for _, value in entry.top_logprobs) for entry in entries)


@pytest.mark.parametrize("top", [None, 0, 2])
def test_a_prompt_alone_is_computed_and_kept(empty, top):
    ids = some(80)
    generation = empty.generate(ids, max_tokens=0, prompt_logprobs=top)
    assert list(generation) == []
    stats = generation.stats
    assert (stats.finish_reason, stats.completion_tokens, stats.context_used) == ("length", 0, 80)
    assert len(generation.prompt_logprobs) == (0 if top is None else 80)
    again = empty.generate(ids, max_tokens=1)
    next(again)
    assert again.stats.reused_tokens == 79


def test_a_prompt_alone_may_fill_the_context(empty):
    ids = some(empty.context)
    generation = empty.generate(ids, max_tokens=0, prompt_logprobs=1).submit()
    assert list(generation) == []
    assert generation.prompt_logprobs == expected(empty, ids, 1)
    with pytest.raises(ContextLengthError):
        next(empty.generate([*ids, 5], max_tokens=0))
    with pytest.raises(ContextLengthError):
        next(empty.generate(ids, max_tokens=1))


def test_many_prompts_and_answers_at_once(empty, monkeypatch):
    monkeypatch.setattr(engine_core, "PREFILL_SECONDS", 0.0)  # a pass in as many pieces as there can be
    prompts = [some(30 + 97 * number, number) for number in range(6)]
    wanted = [expected(empty, prompt, 1) for prompt in prompts]
    alone = []
    for prompt in prompts:
        empty.engine.clear()
        alone.append([chunk.token_id for chunk in empty.generate(prompt, max_tokens=8, temperature=0)])
    empty.engine.clear()
    options = [{"prompt_logprobs": 1} if number % 2 else {} for number in range(6)]
    mixed = [empty.generate(p, max_tokens=8, temperature=0, **o) for p, o in zip(prompts, options, strict=True)]
    done = list(empty.batch(mixed))
    assert [[chunk.token_id for chunk in each.chunks] for each in done] == alone
    assert [each.prompt_logprobs for each in done] == [wanted[n] if n % 2 else [] for n in range(6)]


def test_no_more_logits_exist_than_are_reduced_at_a_time(empty, monkeypatch):
    rows = []
    original = Transformer.head

    def head(self: Transformer, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return original(self, hidden)

    monkeypatch.setattr(Transformer, "head", head)
    list(empty.generate(some(1000), max_tokens=0, prompt_logprobs=0))
    assert max(rows) == ROWS
    assert sum(rows) == 999 + 1


def test_they_are_there_with_the_first_chunk_in_every_way_to_read(empty):
    ids = some(50)
    wanted = expected(empty, ids, 0)
    generation = empty.generate(ids, prompt_logprobs=0)
    next(generation)
    assert generation.prompt_logprobs == wanted

    async def read() -> None:
        generation = empty.generate(ids, prompt_logprobs=0, max_tokens=5)
        async for _ in generation:
            assert generation.prompt_logprobs == wanted

    asyncio.run(read())


def test_one_that_is_closed_in_its_prefill_keeps_what_is_computed(empty, monkeypatch):
    ids = some(1200)
    wanted = expected(empty, ids, 0)
    empty.engine.clear()
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done >= 1024:
            raise RuntimeError("enough")

    generation = empty.generate(ids, prompt_logprobs=0, progress=progress)
    with pytest.raises(RuntimeError, match="enough"):
        next(generation)
    assert seen == [0, 512, 1024]
    assert generation.prompt_logprobs == wanted[:1025]
    again = empty.generate(ids, prompt_logprobs=0)
    next(again)
    assert again.prompt_logprobs == wanted


@pytest.mark.parametrize(
    "options", [{"prompt_logprobs": 0, "max_tokens": 0}, {"prompt_logprobs": 1}, {"max_tokens": 0}]
)
def test_nan_in_a_prompt_is_an_error_that_names_its_place(empty, monkeypatch, options):
    ids = some(90)
    original = Transformer.head

    def head(self: Transformer, hidden: Tensor) -> Tensor:
        logits = original(self, hidden)
        logits[-1, 7] = torch.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "head", head)
        generation = empty.generate(ids, **options)
        with pytest.raises(NonFiniteError, match="the last norm or the head"):
            list(generation)
    assert empty.engine.cache.pool.prefixes.match(ids)[1] == 0
    again = empty.generate(ids, max_tokens=0, prompt_logprobs=1)
    list(again)
    assert again.prompt_logprobs == expected(empty, ids, 1)


def test_the_reference_computes_the_same(monkeypatch):
    ids = some(150)
    monkeypatch.setattr(prompt_logprobs, "ROWS", 40)
    with kernels(cpu.REFERENCE), dsv2_local.load(device="cpu") as loaded:
        generation = loaded.generate(ids, prompt_logprobs=0, max_tokens=0)
        list(generation)
        for got, wanted in zip(generation.prompt_logprobs[1:], expected(loaded, ids, 0)[1:], strict=True):
            assert got
            assert wanted
            assert got.token_id == wanted.token_id
            assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4)
