"""Asynchronous steps, launched before their token is yielded as on GPUs; here simulated by a step on the CPU."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import pytest
import torch

from dsv2_local import llm
from dsv2_local.chunk import Chunk
from dsv2_local.generation import Generation
from dsv2_local.kernels import reference
from dsv2_local.llm import LLM
from dsv2_local.progress import Progress
from dsv2_local.runtime.batch import Part
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.gpu_step import DRAFT
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.prompt_lookup import PromptLookup
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.step import StepResult, candidate_limits

PROMPT = "The bow of a violin is made of wood and hair. "


class AtOnce:
    """A simulated GPU step: returns top candidates, and overwrites the logits of the last step of the same shape."""

    asynchronous = True
    drafts_together = False
    max_rows = 16

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.launched: list[list[int]] = []
        self._step, self._vocab = CpuStep(model, cache), model.config.vocab_size
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}

    @property
    def max_draft(self) -> int:
        return DRAFT if self._step.max_draft else 0

    def launch(self, parts: Sequence[Part], params: Sequence[SamplingParams]) -> list[StepResult]:
        self.launched.append([tokens[0] for _, tokens in parts])
        counts = tuple(len(tokens) for _, tokens in parts)
        assert counts == (1,) * len(parts) or counts == (1 + DRAFT,)
        logits = self._logits.setdefault(counts, torch.empty(sum(counts), self._vocab))
        logits.copy_(self._step.run(parts))
        results = []
        for part, own, (_, tokens) in zip(logits.split(counts), params, parts, strict=True):
            packed = reference.top_candidates(part, torch.tensor([candidate_limits(own)] * len(part)))
            results.append(StepResult(part, tokens[1:], packed=packed, finish=lambda: 0.25))
        return results

    def warm_up(self, progress: Progress) -> None:
        """Nothing to do."""


@pytest.fixture
def plain() -> LLM:
    return llm.load(context=512)


@pytest.fixture
def early() -> LLM:
    model = llm.load(context=512)
    model.engine.decode_step = AtOnce(model.engine.model, model.engine.cache)
    return model


def generation(model: LLM, prompt: str = PROMPT, tokens: int = 30, **options: object) -> Generation:
    never_end = dict.fromkeys(model._end_tokens, -100.0) if "logit_bias" not in options else {}
    return model.generate(prompt, **{"max_tokens": tokens, "logit_bias": never_end, **options})


def tokens_of(chunks: Iterable[Chunk]) -> list[tuple[object, ...]]:
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
    list(early.generate([5], max_tokens=2))  # records the step, so that drafts can be verified
    early.engine.clear()
    early.engine.decode_step.launched.clear()
    chunks = generation(early, **options)
    assert tokens_of(chunks) == expected
    assert 0 < chunks.stats.accepted_tokens < chunks.stats.draft_tokens
    assert len(early.engine.decode_step.launched) < 29


def test_a_step_is_launched_before_its_token_is_yielded_and_none_after_the_last(early):
    chunks = generation(early, tokens=5)
    tokens = []
    for chunk in chunks:
        tokens.append(chunk.token_id)
        assert early.engine.decode_step.launched == [[token] for token in tokens[:4]]
    assert len(tokens) == 5
    assert chunks.stats.decode_seconds >= 4 * 0.25
    assert chunks.stats.context_used == early.engine.sequence.length == chunks.stats.prompt_tokens + 4


def test_generations_that_take_turns_compute_no_step_twice(plain, early):
    prompts = [PROMPT, "What is a harp?", PROMPT + "It"]
    alone = [tokens_of(generation(plain, prompt, seed=2, logprobs=2)) for prompt in prompts]
    running = [generation(early, prompt, seed=2, logprobs=2) for prompt in prompts]
    columns = zip(*zip_longest(*running), strict=True)
    assert [tokens_of(column) for column in columns] == alone
    assert sum(map(len, early.engine.decode_step.launched)) == 3 * 29
    assert len(early.engine.decode_step.launched) < 40, "in common steps"


def test_an_interrupted_answer_leaves_a_consistent_cache(plain, early):
    expected = tokens_of(generation(plain, temperature=0))
    chunks = generation(early, temperature=0)
    first = [next(chunks).token_id for _ in range(7)]
    chunks.close()
    assert early.engine.tokens == [*early.tokenizer.encode(PROMPT), *first]
    assert early.engine.sequence.length == len(early.engine.tokens)
    assert [token for token, *_ in tokens_of(generation(early, temperature=0))] == [token for token, *_ in expected]


def test_a_full_context_ends_the_answer(early):
    chunks = generation(early, tokens=1000)
    answer = tokens_of(chunks)
    assert len(answer) == 512 - chunks.stats.prompt_tokens + 1
    assert chunks.stats.finish_reason == "length"
