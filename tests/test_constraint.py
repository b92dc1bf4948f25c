"""Answers that follow a constraint: what the sampler draws, and what the engine does with it."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dsv2_local import llm
from dsv2_local.errors import InputError
from dsv2_local.generation import Generation
from dsv2_local.llm import LLM
from dsv2_local.runtime.answer import Answer, Stats
from dsv2_local.runtime.prompt_lookup import PromptLookup
from dsv2_local.runtime.sampler import Sampler
from dsv2_local.runtime.sampling_params import SamplingParams
from tests.test_asynchronous_step import AtOnce
from tests.test_sampling import ENOUGH, Fetched, known, logits

PROMPT = "The violin is a wooden chordophone. "
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["old", "new", "red"]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SAMPLINGS = [
    {"temperature": 0}, {"temperature": 1.0, "seed": 1}, {"top_p": 0.9, "seed": 2}, {"top_k": 5, "seed": 3},
    {"min_p": 0.05, "seed": 4}, {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 0.7, "top_p": 0.95, "seed": 5, "logit_bias": {30: 2.0}, "logprobs": 0},
]  # fmt: skip


class Fixed:
    """A constraint that allows the same tokens all the time."""

    ended = False

    def __init__(self, mask: np.ndarray, forced: Sequence[int] = ()) -> None:
        self._mask, self._forced, self.taken = mask, list(forced), list[int]()

    def forced(self) -> list[int]:
        return self._forced[len(self.taken) :]

    def mask(self) -> np.ndarray:
        return self._mask

    def accepts(self, tokens: Sequence[int]) -> int:
        return next((at for at, token in enumerate(tokens) if not self._mask[token]), len(tokens))

    def advance(self, token: int) -> None:
        assert self._mask[token]
        self.taken.append(token)

    def copy(self) -> "Fixed":
        return Fixed(self._mask, self._forced)


def mask(seed: int, size: int, share: float) -> np.ndarray:
    found = np.random.default_rng(seed).random(size) < share
    found[seed % size] = True
    return found


@pytest.mark.parametrize("share", [0.9, 0.3, 0.01])
@pytest.mark.parametrize(
    "params",
    [*ENOUGH, {}, {"temperature": 0, "repetition_penalty": 1.3}, {"presence_penalty": 1, "logit_bias": {3: 2}}],
)
def test_what_is_drawn_is_what_remains_of_the_distribution_without_refused_tokens(params, share):
    params = SamplingParams(**params, seed=5)
    for seed in range(40):
        allowed = mask(seed, 500, share)
        constrained, naive = Sampler(params, [3], Fixed(allowed)), Sampler(params, [3])
        for step in range(4):
            values = logits(seed + step, 500) * 3
            # Penalties and bias are finite, so that what is refused stays so.
            refused = torch.where(torch.from_numpy(allowed), values, torch.tensor(-torch.inf))
            assert constrained.choose(known(values)) == naive.choose(known(refused))


@pytest.mark.parametrize("share", [0.95, 0.5, 0.02])
@pytest.mark.parametrize("params", ENOUGH)
def test_candidates_decide_only_what_all_logits_would(params, share):
    params, fetched = SamplingParams(**params, seed=5), 0
    for seed in range(80):
        allowed = mask(seed, 20_000, share)
        fast, slow = Sampler(params, [], Fixed(allowed)), Sampler(params, [], Fixed(allowed))
        values = logits(seed, 20_000)
        values[100:400] += 12
        result = Fetched(values, fast.candidate_params)
        assert fast.choose(result) == slow.choose(known(values))
        assert result.asked or allowed[result.candidates().ids].any()
        fetched += result.asked
        if params.temperature == 0:
            assert not result.asked or not allowed[result.candidates().ids].any()
    assert fetched < 80 or share < 0.1, "candidates are enough for some"


def test_a_part_of_the_mass_that_may_be_refused_decides_nothing():
    """Whether the second token is within top_p depends on how many of those that are no candidates are allowed."""
    size = 20_000
    values = torch.full((size,), -3.0)
    values[[5, 9]] = torch.tensor([8.0, 6.6])
    params = SamplingParams(top_p=0.7, seed=1)
    for allowed in (np.ones(size, bool), np.arange(size) < 10):
        drawn = []
        for seed in range(30):
            params = SamplingParams(top_p=0.75, seed=seed)
            fast, slow = Sampler(params, [], Fixed(allowed)), Sampler(params, [], Fixed(allowed))
            result = Fetched(values, fast.candidate_params)
            drawn.append(fast.choose(result))
            assert drawn[-1] == slow.choose(known(values))
            assert result.asked == 1
        assert (9 in drawn) == allowed.all()


def test_forced_tokens_need_no_mask():
    constraint = Fixed(np.zeros(50, bool) | (np.arange(50) == 7) | (np.arange(50) == 8), forced=[7, 8])
    constraint.mask = None  # type: ignore[assignment, method-assign]
    sampler = Sampler(SamplingParams(seed=1), [], constraint)
    assert [sampler.choose(known(logits())) for _ in range(2)] == [7, 8]


@pytest.fixture
def plain() -> LLM:
    return llm.load(context=512)


@pytest.fixture
def early() -> LLM:
    model = llm.load(context=512)
    model.engine.decode_step = AtOnce(model.engine.model, model.engine.cache)
    return model


def tokens_of(generation: Generation) -> list[tuple[object, ...]]:
    return [(each.token_id, each.logprob, each.top_logprobs) for each in generation if each.token_id is not None]


def person(model: LLM, **options: object) -> Generation:
    return model.generate(PROMPT, **{"max_tokens": 150, "schema": PERSON, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", SAMPLINGS)
def test_steps_on_gpus_give_the_same_answer(plain, early, options):
    found = person(early, **options)
    assert tokens_of(found) == tokens_of(person(plain, **options))
    assert found.stats.finish_reason == "stop"
    assert json.loads(found.text).keys() == {"name", "age", "tags"}


@pytest.mark.parametrize("options", SAMPLINGS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_drafts_change_nothing(plain, early, monkeypatch, options, asynchronous):
    model = early if asynchronous else plain
    list(model.generate([5], max_tokens=2))  # records the step, so that drafts can be verified
    with monkeypatch.context() as patch:
        patch.setattr(Answer, "propose", lambda answer, most: None)
        expected = tokens_of(person(model, **options))
    answer = [token for token, *_ in expected]
    drafts, sizes = np.random.default_rng(0), []

    def propose(lookup: PromptLookup, most: int) -> list[int]:
        """The right tokens first, and then any."""
        done = len(lookup._tokens) - len(model.tokenizer.encode(PROMPT))
        right = answer[done : done + int(drafts.integers(0, most + 1))]
        return [*right, *map(int, drafts.integers(0, 8192, most - len(right)))]

    monkeypatch.setattr(PromptLookup, "propose", propose)
    accepts = type(model.grammars.constraint('start: "a"')).accepts
    monkeypatch.setattr(
        type(model.grammars.constraint('start: "a"')), "accepts",
        lambda constraint, tokens: sizes.append((len(tokens), found := accepts(constraint, tokens))) or found,
    )  # fmt: skip
    found = person(model, **options)
    assert tokens_of(found) == expected
    assert found.stats.accepted_tokens
    assert any(0 < taken < given for given, taken in sizes), "cut inside"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_forced_is_a_draft(plain, early, monkeypatch, asynchronous):
    monkeypatch.setattr(PromptLookup, "propose", lambda lookup, most: [])
    model = early if asynchronous else plain
    list(model.generate([5], max_tokens=2))
    text = "the violin is a string instrument of the family of the viola"
    answer = model.generate(PROMPT, grammar=f'start: /[0-9]/ "{text}" /[0-9]{{30}}/', seed=1)
    tokens = [chunk.token_id for chunk in answer if chunk.token_id is not None]
    assert answer.text[1:-30] == text
    assert model.tokenizer.decode(tokens) == answer.text
    assert answer.stats.finish_reason == "stop"
    assert answer.stats.accepted_tokens == answer.stats.draft_tokens > 3


def test_an_answer_ends_where_nothing_may_follow_and_may_end_where_it_is_complete(plain):
    fixed = plain.generate(PROMPT, regex="[a-z]{3}", max_tokens=50)
    tokens = [chunk.token_id for chunk in fixed]
    assert fixed.stats.finish_reason == "stop"
    assert len(fixed.text) == 3
    assert not plain._end_tokens.intersection(tokens)
    (one,) = plain._end_tokens
    free = plain.generate(PROMPT, regex="[a-z ]*", max_tokens=50, logit_bias={one: 100.0})
    assert [chunk.token_id for chunk in free] == [one]
    assert (free.text, free.stats.finish_reason) == ("", "stop")
    empty = plain.generate(PROMPT, grammar='start: ""', max_tokens=50)
    assert "".join(chunk.text for chunk in empty) == ""
    assert empty.stats.finish_reason == "stop"
    cut = plain.generate(PROMPT, regex="[a-z ]{500}", max_tokens=5)
    assert len(list(cut)) == 5
    assert cut.stats.finish_reason == "length"
    last = plain.generate(PROMPT, regex="[0-9]", max_tokens=1)
    assert len([chunk for chunk in last if chunk.token_id is not None]) == 1
    assert last.stats.finish_reason == "stop"
    stopped = plain.generate(PROMPT, regex="[0-9]{3}xy", stop="x")
    assert len("".join(chunk.text for chunk in stopped)) == 3


def test_log_probabilities_are_those_without_the_constraint(plain):
    chunks = [chunk for chunk in person(plain, temperature=0, logprobs=2) if chunk.token_id is not None]
    prompt = plain.tokenizer.encode(PROMPT)
    ids = [*prompt, *(chunk.token_id for chunk in chunks)]
    expected = plain.logits(ids).log_softmax(1)[len(prompt) - 1 : -1]
    for chunk, row in zip(chunks, expected, strict=True):
        assert chunk.logprob == pytest.approx(float(row[chunk.token_id]), abs=1e-2)
        assert chunk.top_logprobs[0][1] == pytest.approx(float(row.max()), abs=1e-2)
    assert any(chunk.top_logprobs[0][0] != chunk.token_id for chunk in chunks), "the constraint refused the best"


@pytest.mark.slow
def test_answers_that_are_preempted_go_on_as_alone(monkeypatch):
    preempted = []
    before = Answer.preempted
    monkeypatch.setattr(Answer, "preempted", lambda answer: preempted.append(answer) or before(answer))
    model = llm.load(context=256, parallel=8, batch_invariant=True)
    options = [{"temperature": 1.0, "seed": seed, "top_p": 0.95} for seed in range(8)]
    schemas = [{"type": "array", "items": PERSON, "minItems": 3, "maxItems": 3}] * 8
    alone = []
    for own, schema in zip(options, schemas, strict=True):
        alone.append(tokens_of(person(model, **own, schema=schema, max_tokens=120)))
        model.engine.clear()
    assert not preempted
    together = list(
        model.batch(
            person(model, **own, schema=schema, max_tokens=120) for own, schema in zip(options, schemas, strict=True)
        )
    )
    assert preempted
    for found, expected in zip(together, alone, strict=True):
        assert found.error is None
        assert [chunk.token_id for chunk in found.chunks if chunk.token_id is not None] == [
            token for token, *_ in expected
        ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_constraint_that_cannot_go_on_ends_its_answer_alone(plain, early, monkeypatch, asynchronous):
    model = early if asynchronous else plain
    kind = type(model.grammars.constraint('start: "a"'))
    mask, bad = kind.mask, []

    def fails(constraint: object) -> np.ndarray:
        if constraint in bad:
            raise InputError("too complex")
        return mask(constraint)

    first, second = person(model, seed=1), person(model, seed=2)
    expected = tokens_of(person(model, seed=2))
    monkeypatch.setattr(kind, "mask", fails)
    taken = [next(first), next(second)]
    bad.append(first._answer._constraint)
    with pytest.raises(InputError, match="too complex"):
        list(first)
    assert [taken[1].token_id, *(token for token, *_ in tokens_of(second))] == [token for token, *_ in expected]
    assert not model.engine.scheduler.everything


def test_a_request_can_be_generated_again(plain):
    request = person(plain, temperature=0)._request
    first, second = (list(plain.engine.generate(request, Stats())) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"schema": {}, "regex": "a"}, "schema and regex exclude each other"),
        ({"grammar": 'start: "a"', "regex": "a"}, "grammar and regex exclude each other"),
        ({"schema": {"not": {}}, "strict": True}, "uses not"), ({"schema": 3}, "must be an object, not 3"),
        ({"regex": 3}, "regex must be text"), ({"grammar": 3}, "grammar must be text"), ({"grammar": ""}, "Empty"),
        ({"schema": {}, "strict": 1}, "strict must be true or false"), ({"regex": "("}, "unclosed group"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_by_the_call(plain, options, named):
    with pytest.raises(InputError, match=named):
        plain.generate(PROMPT, **options)
    with pytest.raises(InputError, match=named):
        plain.chat([{"role": "user", "content": "a"}], **options)


def test_several_answers_in_common_steps_follow_their_own_grammars(plain):
    grammars = [{"schema": PERSON}, {"regex": "[0-9]{30}"}, {"grammar": 'start: ("ab" | "cd")~10'}, {}] * 3
    grammars = [options | {"seed": seed} for seed, options in enumerate(grammars)]
    answers = list(plain.batch(plain.generate(PROMPT, **options, max_tokens=150) for options in grammars))
    for answer, options in zip(answers, grammars, strict=True):
        assert answer.error is None
        if "regex" in options:
            assert len(answer.text) == 30
            assert answer.text.isdecimal()
        if "grammar" in options:
            assert len(answer.text.replace("ab", "").replace("cd", "")) == 0
            assert len(answer.text) == 20
        if "schema" in options:
            found = json.loads(answer.text)
            assert 0 <= found["age"] <= 150
            assert {*found["tags"]} <= {"old", "new", "red"}
