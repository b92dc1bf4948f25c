"""`GpuStep`, run on the CPU with a simulated CUDA graph: a replay runs the captured Python step again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv2_local import llm
from dsv2_local.errors import ContextLengthError
from dsv2_local.kernels import cpu
from dsv2_local.llm import LLM
from dsv2_local.runtime import gpu_step
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.gpu_step import DRAFT, GpuStep
from dsv2_local.runtime.prompt_lookup import PromptLookup
from dsv2_local.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(cpu.kernels() is None, reason="the reference rounds one token and many differently")

PROMPT = "The bow of a violin is made of wood and hair. "
GREEDY = SamplingParams(temperature=0)


class Again:
    """A simulated graph whose replay runs the captured step again, into the same result tensor."""

    fully_captured = True

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        self._step, self._result = step, step()
        return self._result

    def replay(self) -> None:
        self._result.copy_(self._step())


class Event:
    """A simulated event of a stream that has always ended."""

    def __init__(self, enable_timing: bool) -> None: ...
    def record(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: "Event") -> float:
        return 250.0  # milliseconds


@pytest.fixture
def model(monkeypatch) -> LLM:
    """dsv2-nano on the CPU, decoding with `GpuStep`."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **given: empty(*shape, **given))
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(gpu_step, "PiecewiseGraph", Again)
    made = llm.load(context=256)
    made.engine.step = GpuStep(made.engine.model, made.engine.cache)
    made.engine.warm_up()
    return made


def plain(model: LLM, tokens: list[int]) -> Tensor:
    """Logits [T, vocab] from `CpuStep`, with an empty cache before and after."""
    cache = model.engine.cache
    cache.clear()
    step = CpuStep(model.engine.model, cache)
    logits = torch.stack([step.run(token).clone() for token in tokens])
    cache.clear()
    return logits


def test_warming_up_captures_both_lengths_and_leaves_an_empty_cache(model):
    assert model.engine.step.asynchronous
    assert model.engine.step.max_draft == DRAFT
    assert model.engine.cache.length == 0


def test_steps_of_one_and_of_several_tokens(model):
    tokens = [100 + i for i in range(12)]
    expected, step = plain(model, tokens), model.engine.step
    at = 0
    for count in (1, 1 + DRAFT, 1, 1 + DRAFT):
        result = step.launch(tokens[at : at + count], GREEDY)
        result.wait()
        assert result.seconds == 0.25
        for token, logits in zip([*tokens[at + 1 : at + count], -1], expected[at : at + count], strict=True):
            assert torch.equal(result.logits(), logits)
            assert result.candidates().ids.tolist() == [int(logits.argmax())]
            assert result.accept(token) == (token != -1)
        at += count
        assert model.engine.cache.length == at
    assert torch.equal(step.run(7), plain(model, [*tokens, 7])[-1])


def test_parameters_change_from_step_to_step(model):
    step = model.engine.step
    counts = [
        len(step.launch([5], params).candidates().ids)
        for params in (GREEDY, SamplingParams(temperature=0.5), GREEDY, SamplingParams(temperature=0.5))
    ]
    assert counts[0] == counts[2] == 1
    assert min(counts[1], counts[3]) > 1


def test_a_full_cache_is_refused_and_stays_as_it_was(model):
    step, cache = model.engine.step, model.engine.cache
    for _ in range(254):
        step.launch([5], GREEDY).wait()
    with pytest.raises(ContextLengthError):
        step.launch([5] * (1 + DRAFT), GREEDY)
    assert cache.length == 254


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": 2, "top_p": 0.9}, {"seed": 2, "repetition_penalty": 1.1}]
)
def test_answers_are_those_of_the_cpu_with_right_and_wrong_drafts(model, monkeypatch, options):
    expected = [chunk.token_id for chunk in llm.load(context=256).generate(PROMPT, max_tokens=50, **options)]
    prompt = len(model.tokenizer.encode(PROMPT))

    def propose(lookup: PromptLookup, most: int) -> list[int]:
        done = len(lookup._tokens) - prompt
        return [*expected[done : done + done % (most + 1)], 5, 5, 5, 5][:most]

    monkeypatch.setattr(PromptLookup, "propose", propose)
    chunks = model.generate(PROMPT, max_tokens=50, **options)
    assert [chunk.token_id for chunk in chunks] == expected
    if len(expected) > 10:
        assert 0 < chunks.stats.accepted_tokens < chunks.stats.draft_tokens
