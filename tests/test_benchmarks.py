"""What the benchmarks compute themselves: statistics, filler texts, caches, models of transformers, cases of a GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from dsv2_local.architectures.families import parse_config
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.kernels.latents import dequantize_latents
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime import placement
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.random_weights import build
from tests.models import TINY

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import against_transformers
import agent_reuse
import batching
import cache_error
import cache_perplexity
import needle

ROOT = Path(__file__).resolve().parents[1]


def test_only_whole_words_count_as_the_answer():
    assert needle.says("A Violin is a bowed instrument.", "violin")
    assert needle.says("the king", "king")
    assert not needle.says("A thing is a kind of making.", "king")


def test_the_standard_error_is_that_of_paired_differences():
    samples = [needle.Sample(10 + i, 40 + i, seen, seen - gain) for i, (seen, gain) in enumerate([(-9, 1), (-5, 3)])]
    result = needle.summary("tokens", "bf16", 8, samples)
    assert (result.mean, result.control, result.difference) == (-7, -9, 2)
    assert result.se == pytest.approx(1.0)  # gains of 1 and 3: deviation √2, over √2
    assert (result.distance, result.longest, result.needles) == (10.5, 41, 2)


def test_filler_is_whole_turns_until_the_distance_is_reached():
    turns = needle.Turns.__new__(needle.Turns)
    turns.ids = [[1, 2, 3], [4, 5]]
    assert turns.reach(0, Random(0)) == []
    for distance in range(1, 30):
        assert distance <= len(turns.reach(distance, Random(distance))) < distance + 3


def test_each_length_is_a_quarter_of_the_next():
    assert cache_error.lengths(32_768) == [512, 2048, 8192, 32_768]
    assert cache_error.lengths(100) == [100]


@pytest.fixture
def tiny(reference_kernels):
    config = parse_config({**TINY, "model_type": "deepseek_v2"})
    random_model = build(config, Recipe.NF4)
    weights = placement.ModelWeights(config, random_model.weights, random_model.layout, random_model.records)
    return placement.place_in_ram(weights, torch.float32).model


def test_filling_the_cache_alone_gives_the_cache_of_forward(tiny):
    ids = list(range(70))
    whole, alone = (LatentCache(tiny.config, 128, CacheDtype.FP32) for _ in range(2))
    forward, filled = whole.new_sequence(), alone.new_sequence()
    tiny.forward(whole, [(forward, ids)])
    cache_error.read(tiny, alone, (filled, ids))
    assert forward.length == filled.length == 70
    for layer in range(tiny.config.num_hidden_layers):
        assert torch.equal(alone.rows(filled, layer), whole.rows(forward, layer))


@pytest.mark.parametrize(("kind", "error"), [(CacheDtype.BF16, 0.003), (CacheDtype.INT8, 0.007)])
def test_a_rounded_cache_has_the_same_rows_up_to_rounding(tiny, kind, error):
    cache = LatentCache(tiny.config, 128, CacheDtype.FP32)
    sequence = cache.new_sequence()
    cache_error.read(tiny, cache, (sequence, list(range(70))))
    copy, again = cache_error.rounded(cache, sequence, tiny.config, kind)
    assert again.length == 70
    for layer in range(tiny.config.num_hidden_layers):
        rows, rank = copy.rows(again, layer), tiny.config.kv_lora_rank
        got = dequantize_latents(rows, rank) if kind is CacheDtype.INT8 else rows.float()
        wanted = cache.rows(sequence, layer)
        assert 0 < (got - wanted).norm() < error * wanted.norm()


def test_perplexity_is_over_tokens_and_its_error_over_conversations():
    logits = torch.zeros(5, 4)
    logits[1, 3] = logits[3, 2] = 100.0
    talk = cache_perplexity.Conversation([0, 1, 3, 0, 2], [2, 3, 4])
    log_probs = cache_perplexity.log_probabilities(logits, talk)
    torch.testing.assert_close(
        log_probs, torch.tensor([0.0, -math.log(4), 0.0], dtype=torch.float64), atol=1e-9, rtol=0
    )
    same = cache_perplexity.compare("", [log_probs, log_probs], [log_probs, log_probs])
    assert (same.tokens, same.conversations, same.difference, same.se) == (6, 2, 0.0, 0.0)
    assert same.bf16 == same.int8 == pytest.approx(4 ** (1 / 3))
    worse = cache_perplexity.compare("", [log_probs, log_probs], [log_probs - 0.01, log_probs - 0.03])
    assert worse.difference == pytest.approx(100 * math.expm1(0.02))
    assert worse.se == pytest.approx(100 * 0.01)  # 0.01 and 0.03: deviation 0.01 * sqrt(2), over sqrt(2)


@pytest.fixture(scope="module")
def nano() -> batching.Subject:
    return batching.converted(None)


def test_many_answers_are_the_same_in_steps_of_any_number_of_sequences(nano, monkeypatch):
    one, four = batching.answers(nano, [1, 4], prompts=6, most=5, rounds=2)
    assert (one["parallel"], four["parallel"], one["tokens"], len(four["tok_s_runs"])) == (1, 4, 30, 2)
    assert 0 < four["first_token_median_seconds"] <= four["first_token_max_seconds"]
    submit = batching.ask
    shorter = {1: 5, 4: 4}
    monkeypatch.setattr(
        batching, "ask", lambda engine, prompt, most, ends: submit(engine, prompt, shorter[engine.rows], ends)
    )
    with pytest.raises(ValueError, match="answers of 4 rows differ"):
        batching.answers(nano, [1, 4], prompts=6, most=5, rounds=1)


def test_a_common_prefix_is_computed_once_and_the_pause_is_measured(nano, monkeypatch):
    monkeypatch.setattr(batching, "PREFIX", 200)
    found = batching.prefix(nano)
    assert found["prompt_tokens"] == 16 * 220
    assert found["computed_tokens"] == 220 + 15 * (220 - 192)  # all but whole blocks of the prefix
    monkeypatch.setattr(batching, "LONG_PROMPT", 600)
    found = batching.pause(nano)
    assert 0 < found["seconds_per_token_before"] <= found["longest_pause_seconds"] < 60
    assert found["tokens_meanwhile"] > 1


def test_the_engines_own_time_contains_that_of_its_parts(nano):
    found = batching.own_time(nano)
    assert 0 < found["scheduler_seconds"] + found["sampler_seconds"] < found["step_seconds"]


@pytest.fixture(scope="module")
def peers():
    """The model of transformers with its experts as they come, in nf4, and as modules: logits, and formats by name."""
    pytest.importorskip("accelerate")
    model = against_transformers.from_pretrained(against_transformers.TINY)
    ids, logits, formats = torch.arange(8)[None], {}, {}
    changes = {"bf16-experts": lambda _: None, "nf4-fused": against_transformers.fuse}
    for name, change in {**changes, "nf4-modules": against_transformers.separate}.items():
        change(model)
        formats[name] = against_transformers.formats_of(model)
        for implementation in ("grouped_mm", "batched_mm"):  # which transformers takes for prompts, and to decode
            model.set_experts_implementation(implementation)
            with torch.no_grad():
                logits[name, implementation] = model(ids).logits.float()
    return logits, formats


def test_loading_in_4_bits_leaves_the_experts_of_transformers_in_bf16(peers):
    experts = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    formats = peers[1]
    assert experts <= {*formats["bf16-experts"]["bfloat16"]}
    assert {"mlp.gate_proj", "mlp.shared_experts.up_proj", "self_attn.q_proj"} <= {*formats["bf16-experts"]["nf4"]}
    assert experts <= {*formats["nf4-fused"]["nf4"]}
    assert {"mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"} <= {*formats["nf4-modules"]["nf4"]}
    for formats_of_program in formats.values():
        assert {"embed_tokens", "lm_head"} <= {*formats_of_program["bfloat16"]}


def test_experts_in_nf4_compute_the_same_fused_and_as_modules(peers):
    def error(got, wanted):
        return float((got - wanted).norm() / wanted.norm())

    wanted = peers[0]["nf4-fused", "grouped_mm"]
    assert error(peers[0]["nf4-fused", "batched_mm"], wanted) < 0.01  # rounding to bf16
    assert error(peers[0]["nf4-modules", "grouped_mm"], wanted) < 0.01
    assert 0.01 < error(peers[0]["bf16-experts", "grouped_mm"], wanted) < 0.2  # quantisation, too


def test_the_comparison_with_transformers_begins_no_figure_too_late():
    looks = iter([False, False, False, True])
    *_, result = against_transformers.results(["dsv2"], True, lambda: next(looks))
    program = result["programs"]["dsv2"]
    assert not program["complete"]
    assert {"prefill_4_tok_s", "prefill_16_tok_s"} == {key for key in program if key.endswith("_tok_s")}
    assert "error" not in program


def test_the_comparison_with_transformers_measures_all_programs():
    pytest.importorskip("accelerate")
    *_, result = against_transformers.results(against_transformers.NAMES, True, lambda: False)
    assert [*result["programs"]] == [*against_transformers.NAMES]
    for program in result["programs"].values():
        assert program["complete"]
        assert len([key for key in program if key.endswith("_tok_s")]) == 4


@pytest.mark.slow
def test_the_gpu_benchmark_measures_the_cases_that_are_asked_for_and_skips_late_ones(tmp_path):
    """In Triton's interpreter, on simulated devices."""
    file, script = tmp_path / "gpu.json", ROOT / "benchmarks/gpu.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}

    def run(*options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        command = [sys.executable, script, "--interpret", "--tiny", "--json", file, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
        return done, json.loads(file.read_text()) if file.exists() else {}

    done, result = run("--only", "236b-24g-hybrid,236b-24g-cpu")
    assert done.returncode == 0, done.stderr
    assert [case["case"] for case in result["cases"]] == ["236b-24g-hybrid", "236b-24g-cpu"]
    assert [(case["plan"]["mode"], case["plan"]["slots"]) for case in result["cases"]] == [("hybrid", 2), ("cpu", 0)]
    assert all(case["phases"].keys() >= {"placing", "warming up", "parts of a token"} for case in result["cases"])
    assert result["software"]["torch"] == torch.__version__
    assert "236b-24g-cpu: placing took" in done.stdout
    done, _ = run("--seconds", "0")
    assert done.returncode == 0, done.stderr
    assert "skipped: 236b-24g-hybrid, 236b-24g-stream" in done.stdout
    done, _ = run("--only", "huge")
    assert done.returncode == 1
    assert "'huge' is none of 236b-24g-hybrid" in done.stderr


@pytest.mark.slow
def test_agents_compute_no_more_than_the_least_where_the_store_has_room():
    found = {reuse.trace: reuse for reuse in agent_reuse.measure(1536, 3)}
    assert len(found) == 8
    for name, reuse in found.items():
        assert reuse.computed == reuse.least or name == "two"
        assert (reuse.restored > 0) == (name in ("restart", "two, RAM", "two, files"))
    assert found["header"].computed == found["header"].tokens
    assert found["two"].computed > found["two, RAM"].computed == found["two, files"].computed
