"""Prompt lookup decoding: drafts come from the text, and whatever the draft, answers are bit-identical."""

import random

import pytest

from dsv2_local import llm
from dsv2_local.kernels import cpu
from dsv2_local.runtime.prompt_lookup import MAX_DRAFT, NGRAM, RETRY_AFTER, PromptLookup

pytestmark = pytest.mark.skipif(cpu.kernels() is None, reason="the reference rounds one token and many differently")

TEXT = "The bow of a violin is made of wood and hair. " * 12


def steps(model: llm.LLM, **options: object) -> tuple[list[tuple[object, ...]], object]:
    model.engine.clear()  # prefill after a cached prefix rounds differently
    never_end = dict.fromkeys(model._end_tokens, -100.0)
    generation = model.generate(TEXT, max_tokens=60, logprobs=3, logit_bias=never_end, **options)
    return [(chunk.token_id, chunk.logprob, chunk.top_logprobs) for chunk in generation], generation.stats


@pytest.mark.parametrize("kept", ["bf16", "int8"])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.2}])
def test_answers_are_the_same_to_the_last_bit(monkeypatch, options, kept):
    model = llm.load(cache_dtype=kept)
    options = {"seed": 5, **options}
    with monkeypatch.context() as patched:
        patched.setattr(PromptLookup, "propose", lambda self, most: [])
        plain, stats = steps(model, **options)
    assert stats.draft_tokens == 0
    answer, draw = [token for token, *_ in plain], random.Random(1)

    def propose(lookup: PromptLookup, most: int) -> list[int]:
        """Draft tokens that are right at first, then wrong."""
        done = len(lookup._tokens) - prompt
        right = answer[done : done + draw.choice([0, 1, 2, 4, 8, 32])]
        return [*right, draw.randrange(1000)][: draw.choice([0, 1, 4, 8, most])]

    prompt = len(model.tokenizer.encode(TEXT))
    monkeypatch.setattr(PromptLookup, "propose", propose)
    drafted, stats = steps(model, **options)
    assert drafted == plain
    assert 0 < stats.accepted_tokens < stats.draft_tokens


def test_a_full_context_and_an_interrupted_answer_leave_the_right_tokens(monkeypatch):
    model = llm.load(context=200)
    answer = [token for token, *_ in steps(model, temperature=0)[0]]
    prompt = len(model.tokenizer.encode(TEXT))
    monkeypatch.setattr(
        PromptLookup, "propose", lambda self, most: answer[len(self._tokens) - prompt :][:4] or [5, 5, 5]
    )
    never_end = dict.fromkeys(model._end_tokens, -100.0)
    whole = model.generate(TEXT, temperature=0, logit_bias=never_end)
    assert len([*whole]) == 200 - prompt + 1
    assert whole.stats.finish_reason == "length"
    broken = model.generate(TEXT, temperature=0, logit_bias=never_end)
    for _ in range(8):
        next(broken)
    broken.close()
    assert model.engine.tokens == [*model.tokenizer.encode(TEXT), *answer[:7]]
    assert [token for token, *_ in steps(model, temperature=0)[0]] == answer


def test_what_followed_last_time_is_proposed():
    lookup = PromptLookup([*range(100), 0, 1, 2])
    assert lookup.propose() == []
    lookup.append(3)
    assert lookup.propose() == [4, 5, 6, 7]
    lookup.append(9)
    assert lookup.propose() == []


def test_the_longer_a_passage_is_repeated_the_more_of_it_is_proposed():
    lookup = PromptLookup(range(200))
    lengths = []
    for token in range(80):
        lookup.append(token)
        draft = lookup.propose()
        assert draft == [*range(token + 1, token + 1 + len(draft))]
        lengths.append(len(draft))
    assert lengths == [0] * 3 + [4] * 4 + [8] * 8 + [16] * 16 + [MAX_DRAFT] * 49
    assert MAX_DRAFT == 32


def test_a_passage_is_followed_through_ngrams_that_occur_elsewhere_too():
    phrase = [1, 2, 3, 4]
    passage, other = [10, *phrase, 20, *range(30, 60)], [11, *phrase, 21]
    lookup = PromptLookup([9, 8, 7, 6, *passage, *other, 9, 8, 7, 6, 10, *phrase])
    assert lookup.propose()[0] == 20
    assert PromptLookup([*passage, *other, *phrase]).propose()[0] == 21


def test_a_periodic_text_is_proposed_to_continue():
    assert PromptLookup([7] * 5).propose() == [7] * NGRAM
    assert PromptLookup([1, 2, 3] * 4).propose() == [1, 2, 3, 1, 2, 3, 1, 2]


def test_lengths_that_do_not_pay_are_skipped_and_tried_again():
    lookup = PromptLookup([1, 2, 3, 4] * 2)  # four tokens match
    for _ in range(5):
        lookup.observe(1.0, 0, 0)
        lookup.observe(3.0, 4, 1)
    made = sum(bool(lookup.propose()) for _ in range(3 * RETRY_AFTER))
    assert made == 3
    for token in [1, 2, 3, 4]:
        lookup.append(token)
    assert len(lookup.propose()) == 8, "a longer one was not tried yet"
    for _ in range(40):
        lookup.observe(3.0, 4, 4)
    assert (lookup.drafted, lookup.accepted) == (45 * 4, 5 + 160)
