"""Guessed tokens: the same answers to the last bit, whatever is guessed; and guesses that are the text's own."""

import random

import pytest

from dsv2_local import llm
from dsv2_local.kernels import cpu
from dsv2_local.lookup import GRAM, GUESSES, PATIENCE, Lookup

pytestmark = pytest.mark.skipif(cpu.kernels() is None, reason="the reference rounds one token and many differently")

TEXT = "The bow of a violin is made of wood and hair. " * 12


def steps(model: llm.LLM, **options: object) -> tuple[list[tuple[object, ...]], object]:
    model.engine.cache.clear()  # another way through the prompt rounds in another way
    never_end = dict.fromkeys(model._end_tokens, -100.0)
    generation = model.generate(TEXT, max_tokens=60, logprobs=3, logit_bias=never_end, **options)
    return [(chunk.token_id, chunk.logprob, chunk.top_logprobs) for chunk in generation], generation.stats


@pytest.mark.parametrize("kept", ["bf16", "int8"])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.2}])
def test_answers_are_the_same_to_the_last_bit(monkeypatch, options, kept):
    model = llm.load(cache=kept)
    options = {"seed": 5, **options}
    with monkeypatch.context() as patched:
        patched.setattr(Lookup, "guess", lambda self, most: [])
        plain, stats = steps(model, **options)
    assert stats.guessed_tokens == 0
    answer, draw = [token for token, *_ in plain], random.Random(1)

    def guess(lookup: Lookup, most: int) -> list[int]:
        """Right for a while, then wrong."""
        done = len(lookup._tokens) - prompt
        right = answer[done : done + draw.choice([0, 1, 2, 4, 8, 32])]
        return [*right, draw.randrange(1000)][: draw.choice([0, 1, 4, 8, most])]

    prompt = len(model.tokenizer.encode(TEXT))
    monkeypatch.setattr(Lookup, "guess", guess)
    guessed, stats = steps(model, **options)
    assert guessed == plain
    assert 0 < stats.right_guesses < stats.guessed_tokens


def test_a_full_context_and_an_answer_broken_off_leave_what_was_said(monkeypatch):
    model = llm.load(context=200)
    answer = [token for token, *_ in steps(model, temperature=0)[0]]
    prompt = len(model.tokenizer.encode(TEXT))
    monkeypatch.setattr(Lookup, "guess", lambda self, most: answer[len(self._tokens) - prompt :][:4] or [5, 5, 5])
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


def test_what_followed_last_time_is_guessed():
    lookup = Lookup([*range(100), 0, 1, 2])
    assert lookup.guess() == []
    lookup.push(3)
    assert lookup.guess() == [4, 5, 6, 7]
    lookup.push(9)
    assert lookup.guess() == []


def test_the_longer_a_passage_is_repeated_the_more_of_it_is_guessed():
    lookup = Lookup(range(200))
    lengths = []
    for token in range(80):
        lookup.push(token)
        guess = lookup.guess()
        assert guess == [*range(token + 1, token + 1 + len(guess))]
        lengths.append(len(guess))
    assert lengths == [0] * 3 + [4] * 4 + [8] * 8 + [16] * 16 + [GUESSES] * 49
    assert GUESSES == 32


def test_a_passage_is_followed_past_words_that_stand_elsewhere_too():
    phrase = [1, 2, 3, 4]
    passage, other = [10, *phrase, 20, *range(30, 60)], [11, *phrase, 21]
    lookup = Lookup([9, 8, 7, 6, *passage, *other, 9, 8, 7, 6, 10, *phrase])
    assert lookup.guess()[0] == 20
    assert Lookup([*passage, *other, *phrase]).guess()[0] == 21


def test_what_goes_round_in_a_circle_is_guessed_to_go_on():
    assert Lookup([7] * 5).guess() == [7] * GRAM
    assert Lookup([1, 2, 3] * 4).guess() == [1, 2, 3, 1, 2, 3, 1, 2]


def test_lengths_that_do_not_pay_are_left_off_and_tried_again():
    lookup = Lookup([1, 2, 3, 4] * 2)  # four have agreed
    for _ in range(5):
        lookup.took(1.0, 0, 0)
        lookup.took(3.0, 4, 1)
    made = sum(bool(lookup.guess()) for _ in range(3 * PATIENCE))
    assert made == 3
    for token in [1, 2, 3, 4]:
        lookup.push(token)
    assert len(lookup.guess()) == 8, "a longer one was not tried yet"
    for _ in range(40):
        lookup.took(3.0, 4, 4)
    assert (lookup.guessed, lookup.right) == (45 * 4, 5 + 160)
