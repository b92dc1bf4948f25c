"""Asynchronous steps, launched before their token is yielded as on GPUs; here simulated by a step on the CPU."""

from collections.abc import Iterable
from itertools import zip_longest

import pytest
import torch

from dsv2_local import llm
from dsv2_local.kernels import reference
from dsv2_local.llm import LLM
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.gpu_step import DRAFT, GpuStep
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.prompt_lookup import PromptLookup
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.step import StepResult, candidate_limits

PROMPT = "The bow of a violin is made of wood and hair. "


class AtOnce(GpuStep):
    """A simulated GPU step: returns top candidates, and overwrites the logits of the last step of the same length."""

    asynchronous = True

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.launched: list[int] = []
        self._step = CpuStep(model, cache)
        self._logits = {tokens: torch.empty(tokens, model.config.vocab_size) for tokens in (1, 1 + DRAFT)}

    @property
    def max_draft(self) -> int:
        return DRAFT if self._step.max_draft else 0

    def run(self, token: int) -> torch.Tensor:
        return self._step.run(token)

    def launch(self, tokens: list[int], params: SamplingParams) -> StepResult:
        self.launched.append(tokens[0])
        made = self._step.launch(tokens, params)
        logits = self._logits[len(tokens)]
        logits.copy_(made._logits)
        packed = reference.top_candidates(logits, torch.tensor(candidate_limits(params)))
        return StepResult(logits, tokens[1:], packed=packed, finish=lambda: 0.25)


@pytest.fixture
def plain() -> LLM:
    return llm.load(context=512)


@pytest.fixture
def early() -> LLM:
    model = llm.load(context=512)
    model.engine.step = AtOnce(model.engine.model, model.engine.cache)
    return model


def generation(model: LLM, prompt: str = PROMPT, tokens: int = 30, **options: object) -> llm.Generation:
    never_end = dict.fromkeys(model._end_tokens, -100.0) if "logit_bias" not in options else {}
    return model.generate(prompt, **{"max_tokens": tokens, "logit_bias": never_end, **options})


def tokens_of(chunks: Iterable[llm.Chunk]) -> list[tuple[object, ...]]:
    return [(chunk.token_id, chunk.logprob, chunk.top_logprobs) for chunk in chunks]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "logit_bias": {}}, {"temperature": 0, "logprobs": 3}, {"seed": 1, "temperature": 1.0},
        {"seed": 1, "top_p": 0.9, "logit_bias": {}}, {"seed": 1, "top_k": 5, "logit_bias": {}, "logprobs": 2},
    ],
)  # fmt: skip
def test_answers_are_the_same_to_the_last_bit(plain, early, options):
    assert tokens_of(generation(early, **options)) == tokens_of(generation(plain, **options))


def test_drafts_of_the_captured_length_are_verified_in_one_step(plain, early, monkeypatch):
    options = {"temperature": 0, "logprobs": 1}
    expected = tokens_of(generation(plain, **options))
    prompt, answer = len(plain.tokenizer.encode(PROMPT)), [token for token, *_ in expected]

    def propose(lookup: PromptLookup, most: int) -> list[int]:
        done = len(lookup._tokens) - prompt
        right = answer[done : done + done % (most + 1)]
        return [*right, 5, 5, 5, 5][:most]

    monkeypatch.setattr(PromptLookup, "propose", propose)
    early.engine.step.run(0)  # records the step, so that drafts can be verified
    early.engine.cache.clear()
    chunks = generation(early, **options)
    assert tokens_of(chunks) == expected
    assert 0 < chunks.stats.accepted_tokens < chunks.stats.draft_tokens
    assert len(early.engine.step.launched) < 29


def test_a_step_is_launched_before_its_token_is_yielded_and_none_after_the_last(early):
    chunks = generation(early, tokens=5)
    tokens = []
    for chunk in chunks:
        tokens.append(chunk.token_id)
        assert early.engine.step.launched == tokens[:4]
    assert len(tokens) == 5
    assert chunks.stats.decode_seconds >= 4 * 0.25
    assert chunks.stats.context_used == early.engine.cache.length == chunks.stats.prompt_tokens + 4


def test_generations_that_take_turns_compute_no_step_twice(plain, early):
    prompts = [PROMPT, "What is a harp?", PROMPT + "It"]
    alone = [tokens_of(generation(plain, prompt, seed=2, logprobs=2)) for prompt in prompts]
    running = [generation(early, prompt, seed=2, logprobs=2) for prompt in prompts]
    columns = zip(*zip_longest(*running), strict=True)
    assert [tokens_of(column) for column in columns] == alone
    assert len(early.engine.step.launched) == 3 * 29


def test_an_interrupted_answer_leaves_a_consistent_cache(plain, early):
    expected = tokens_of(generation(plain, temperature=0))
    chunks = generation(early, temperature=0)
    first = [next(chunks).token_id for _ in range(7)]
    chunks.close()
    assert early.engine.tokens == [*early.tokenizer.encode(PROMPT), *first]
    assert early.engine.cache.length == len(early.engine.tokens)
    assert [token for token, *_ in tokens_of(generation(early, temperature=0))] == [token for token, *_ in expected]


def test_a_full_context_ends_the_answer(early):
    chunks = generation(early, tokens=1000)
    answer = tokens_of(chunks)
    assert len(answer) == 512 - chunks.stats.prompt_tokens + 1
    assert chunks.stats.finish_reason == "length"
