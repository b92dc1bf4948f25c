"""Sampling: each step against its definition, and against transformers' logits processors."""

from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsv2_local.errors import ConfigError, InputError
from dsv2_local.kernels import reference
from dsv2_local.kernels.format import MAX_CANDIDATES
from dsv2_local.runtime import sampler
from dsv2_local.runtime.sampler import Sampler, check_bias
from dsv2_local.runtime.sampling_params import GenerationConfig, SamplingParams
from dsv2_local.runtime.step import StepResult, TopCandidates, candidate_limits


def logits(seed: int = 0, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def every(values: torch.Tensor) -> TopCandidates:
    return TopCandidates(torch.arange(len(values)).numpy(), values.numpy())


def known(values: torch.Tensor) -> StepResult:
    return StepResult(values[None])


def dense(values: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The probabilities of all tokens after truncation."""
    ids, probabilities = sampler.truncated(every(values), params)
    return torch.zeros(len(values), dtype=torch.float64).index_put((torch.tensor(ids),), torch.tensor(probabilities))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("params", "theirs"),
    [
        (SamplingParams(top_k=7), TopKLogitsWarper(7)),
        (SamplingParams(top_p=0.8), TopPLogitsWarper(0.8)),
        (SamplingParams(min_p=0.1), MinPLogitsWarper(0.1)),
    ],
)
@pytest.mark.parametrize("flat", [1, 20])
def test_truncations_keep_what_transformers_keeps(params, theirs, seed, flat):
    """Also for flat distributions, where the first floor is not enough, and for a small vocabulary."""
    values = logits(seed, 2000) / flat if seed else logits(seed) * 3
    values -= values.max()
    expected = theirs(None, values[None])[0].softmax(0)
    torch.testing.assert_close(dense(values, params), expected.double(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("floors", [(1.0, -1.0), (0.1, 1e-3, -1.0), (-1.0,)])
def test_how_many_tokens_are_looked_at_changes_nothing(monkeypatch, floors):
    monkeypatch.setattr(sampler, "FLOORS", floors)
    values = logits(3, 3000)
    values -= values.max()
    warpers = {"top_k": TopKLogitsWarper(30), "top_p": TopPLogitsWarper(0.9), "min_p": MinPLogitsWarper(0.02)}
    given = {"top_k": 30, "top_p": 0.9, "min_p": 0.02}
    for size in range(4):
        for names in combinations(warpers, size):
            kept = values[None]
            for name in names:
                kept = warpers[name](None, kept)
            ours = dense(values, SamplingParams(**{name: given[name] for name in names}))
            torch.testing.assert_close(ours, kept[0].softmax(0).double(), atol=1e-6, rtol=1e-4)


def test_truncations_always_keep_the_likeliest():
    params = SamplingParams(top_k=1, top_p=1e-9, min_p=1.0)
    values = logits() - logits().max()
    ids, probabilities = sampler.truncated(every(values), params)
    assert (ids.tolist(), probabilities.tolist()) == ([int(values.argmax())], [1.0])


def test_repetition_penalty_counts_prompt_and_answer_as_transformers_does():
    values = logits()
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=1.3), [3, 4, 3])
    first = sampler.choose(known(values))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 4, first]]), values[None].clone())[0]
    torch.testing.assert_close(sampler._penalised(values), expected)


def test_presence_and_frequency_count_the_answer_alone():
    values = torch.tensor([5.0, 4.0, 3.0])
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25), [0, 0, 1])
    assert [sampler.choose(known(values)) for _ in range(3)] == [0, 0, 0]
    assert sampler._penalised(values).tolist() == [5 - 0.5 - 0.75, 4, 3]


def test_bias_can_force_and_forbid_a_token():
    values = logits()
    assert Sampler(SamplingParams(temperature=0, logit_bias={9: 100.0}), []).choose(known(values)) == 9
    best = int(values.argmax())
    assert Sampler(SamplingParams(temperature=0, logit_bias={best: -100.0}), []).choose(known(values)) != best
    with pytest.raises(InputError, match="token 50"):
        check_bias(SamplingParams(logit_bias={49: 1.0, 50: 1.0}), 50)


def test_greedy_is_the_maximum_and_leaves_the_logits_alone():
    values = logits()
    before = values.clone()
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=1.5), [1])
    assert sampler.choose(known(values)) == int(values.argmax())
    assert torch.equal(values, before)


def test_seeds_repeat_and_differ():
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), [])
        return [sampler.choose(known(logits())) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_a_tiny_temperature_is_greedy():
    values = logits() * 100
    assert Sampler(SamplingParams(temperature=1e-40, seed=0), []).choose(known(values)) == int(values.argmax())


class Fetched(StepResult):
    """A result as from a GPU: top candidates, and a count of how often the full logits were fetched."""

    def __init__(self, values: torch.Tensor, params: SamplingParams) -> None:
        packed = reference.top_candidates(values[None], torch.tensor([candidate_limits(params)]))
        super().__init__(values[None], packed=packed)
        self.asked = 0

    def logits(self) -> torch.Tensor:
        self.asked += 1
        return super().logits()


ENOUGH = [
    {"temperature": 0}, {"temperature": 1e-40, "top_k": 1}, {"top_p": 0.9}, {"top_p": 0.95, "temperature": 0.3},
    {"top_k": 30}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("params", ENOUGH)
def test_the_likeliest_tokens_are_enough_to_choose_the_same(params):
    params = SamplingParams(**params, seed=5)
    fast, slow = Sampler(params, []), Sampler(params, [])
    for seed in range(60):
        values = logits(seed, 20_000)
        values[100:400] += 12
        result = Fetched(values, params)
        assert fast.choose(result) == slow.choose(known(values))
        assert not result.asked


@pytest.mark.parametrize(
    ("params", "flat"),
    [
        ({}, 1), ({"min_p": 1e-6}, 1), ({"top_p": 0.99}, 10), ({"top_k": 500, "temperature": 0.1}, 1),
        ({"top_p": 0.9, "logit_bias": {7: 2.0}}, 1), ({"temperature": 0, "repetition_penalty": 1.2}, 1),
    ],
)  # fmt: skip
def test_all_logits_are_fetched_where_the_likeliest_tokens_are_not_enough(params, flat):
    params = SamplingParams(**params, seed=5)
    fast, slow = Sampler(params, [3]), Sampler(params, [3])
    for seed in range(20):
        values = logits(seed, 20_000) / flat
        result = Fetched(values, params)
        assert fast.choose(result) == slow.choose(known(values))
        assert result.asked


def test_ties_beyond_the_limit_and_nan_give_no_candidates():
    plain = SamplingParams(temperature=0)
    assert Fetched(torch.zeros(MAX_CANDIDATES + 1), plain).candidates() is None
    assert Fetched(torch.zeros(MAX_CANDIDATES), plain).candidates().ids.tolist() == [*range(MAX_CANDIDATES)]
    assert Fetched(torch.full((9,), float("nan")), plain).candidates() is None
    assert Sampler(plain, []).choose(Fetched(torch.tensor([1.0, 5.0, 5.0]), plain)) == 1


@pytest.mark.parametrize("params", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.05}])
def test_tokens_are_drawn_as_often_as_they_are_likely(params):
    values = logits(1, 8)
    sampler = Sampler(SamplingParams(seed=0, **params), [])
    counts = torch.bincount(torch.tensor([sampler.choose(known(values)) for _ in range(20_000)]), minlength=8)
    expected = dense(values - values.max(), sampler.params)
    assert not counts[expected == 0].any()
    assert (counts / 20_000 - expected).abs().max() < 0.015


def test_frequencies_follow_the_temperature():
    values = torch.tensor([1.0, 0.0])
    sampler = Sampler(SamplingParams(temperature=0.5, seed=0), [])
    share = sum(sampler.choose(known(values)) == 0 for _ in range(4000)) / 4000
    assert share == pytest.approx(1 / (1 + torch.e**-2), abs=0.02)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -2}, {"min_p": 2}, {"repetition_penalty": 0},
        {"temperature": float("nan")}, {"presence_penalty": float("inf")}, {"temperature": "0.5"}, {"top_k": 2.5},
        {"top_p": True}, {"temperature": 10**400}, {"seed": 2**64}, {"seed": "1"}, {"seed": -2}, {"min_p": None},
        {"logit_bias": {"5": 1.0}}, {"logit_bias": {5: "1"}}, {"logit_bias": {5: float("nan")}}, {"logit_bias": [5]},
        {"logit_bias": {-1: 1.0}},
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused(bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))}.* (must|map)"):
        SamplingParams(**bad)


def test_spellings_of_other_programs_for_off():
    assert SamplingParams(top_k=-1, seed=-1, temperature=np.float32(1)) == SamplingParams()
    with pytest.raises(InputError, match="no option temprature; the sampling parameters are temperature"):
        SamplingParams().override(temprature=1)


@pytest.mark.parametrize("temperature", [1e-46, 5e-324, 1e-39])
def test_a_temperature_that_fp32_cannot_hold_is_greedy(temperature):
    assert SamplingParams(temperature=temperature) == SamplingParams(temperature=0)


def test_settings_that_are_not_supported_are_told(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"num_beams": 1, "typical_p": null, "stop_strings": [], "guidance_scale": 1.0, "max_length": 20}')
    assert GenerationConfig.load(tmp_path).left_out == ()
    path.write_text('{"num_beams": 4, "no_repeat_ngram_size": 3, "max_new_tokens": 512, "typical_p": {}}')
    assert GenerationConfig.load(tmp_path).left_out == (
        "max_new_tokens", "no_repeat_ngram_size", "num_beams", "typical_p",
    )  # fmt: skip


def test_defaults_come_from_generation_config(tmp_path):
    assert GenerationConfig.load(tmp_path) == GenerationConfig()
    file = tmp_path / "generation_config.json"
    file.write_text('{"do_sample": true, "temperature": 0.3, "top_p": 0.95, "eos_token_id": [1, 2]}')
    loaded = GenerationConfig.load(tmp_path)
    assert loaded.params == SamplingParams(temperature=0.3, top_p=0.95)
    assert loaded.eos_token_id == (1, 2)
    assert loaded.params.override(temperature=0, top_k=None) == SamplingParams(temperature=0, top_p=0.95)
    file.write_text('{"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.1, "top_k": -1, "min_p": null}')
    greedy = SamplingParams(temperature=0, top_p=0.9, repetition_penalty=1.1)  # penalties apply to greedy decoding too
    assert GenerationConfig.load(tmp_path).params == greedy


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"do_sample": true, "temperature": -3}', "temperature must be at least 0, not -3"),
        ('{"do_sample": "false"}', "do_sample must be true or false, not 'false'"),
        ('{"temperature": "0.3"}', "temperature must be a number, not '0.3'"),
        ('{"top_p": NaN}', "top_p must be a number, not nan"),
        ('{"top_k": true}', "top_k must be a whole number, not True"),
        ('{"eos_token_id": "7"}', "eos_token_id must be a whole number, not '7'"),
        ('{"eos_token_id": [1, 50]}', "eos_token_id names token 50, but vocab_size is 50"),
        ('{"eos_token_id": -1}', "eos_token_id must be at least 0"),
        ("[]", "not a JSON object"), ("{", "not valid JSON"), ("[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_impossible_defaults_name_file_and_key(tmp_path, text, named):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"generation_config.json.*{named}"):
        GenerationConfig.load(tmp_path, 50)


@pytest.mark.parametrize("count", [1, 2, 100, 20_000])
def test_the_order_of_weights_is_stable(count):
    """Equal weights keep the order of their ids, so that a seed draws the same token on every machine."""
    draw = np.random.default_rng(count)
    weights = np.exp(draw.standard_normal(count).astype(np.float32) * 9)
    weights[draw.integers(0, count, count // 2)] = 0.5
    expected = np.argsort(-weights.astype(np.float64), kind="stable")
    assert (sampler._descending(weights) == expected).all()
