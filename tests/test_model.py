"""The whole model in fp32 against transformers, or a naive implementation for options that transformers lacks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv2_local
from dsv2_local.architectures.families import load_config, parse_config
from dsv2_local.kernels import cpu, ops, reference
from dsv2_local.kernels.format import CacheDtype, Format
from dsv2_local.kernels.layout import Matrix
from dsv2_local.quant.convert import convert
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime.batch import Batch
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.rope import Rope, inverse_frequencies
from tests.conftest import kernels
from tests.models import TINY, Naive, rewrite_config, save_random, transformers_logits, yarn
from tests.paging import paged

pytestmark = pytest.mark.usefixtures("reference_kernels")

GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "low-rank query, greedy, plain rope": {},
    "plain query, one shared expert": {"q_lora_rank": None, "n_shared_experts": 1, "first_k_dense_replace": 0},
    "groups, yarn 0.707, hub's config": {**GROUPS, "rope_parameters": yarn(0.707, 0.707), "hub_shape": True},
    "groups, yarn 1.0": {**GROUPS, "rope_parameters": yarn(1.0, 1.0), "num_experts_per_tok": 4},
    "yarn without mscale": {"rope_parameters": yarn(None, None), "num_experts_per_tok": 1, "hub_shape": True},
    "yarn of unequal mscales": {"rope_parameters": yarn(1.0, 0.5, factor=4.0, original=128)},
    "tied, two dense layers, scaled": {
        "tie_word_embeddings": True, "first_k_dense_replace": 2, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-5,
    },
    "odd sizes that need padding": {
        "hidden_size": 100, "moe_intermediate_size": 44, "kv_lora_rank": 36, "q_lora_rank": 28, "v_head_dim": 20,
        "intermediate_size": 76, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "n_shared_experts": 3,
    },
}  # fmt: skip


def ids_of(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, TINY["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def loaded(source: Path, tmp_path: Path, recipe: Recipe = Recipe.BF16, **options: Any) -> dsv2_local.LLM:
    convert(source, tmp_path / "converted", recipe=recipe)
    return dsv2_local.load(tmp_path / "converted", dtype="float32", **options)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Compare the relative error at every position, so that no single token may be wrong."""
    errors = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert errors.max() < tolerance, f"position {int(errors.argmax())} is off by {float(errors.max()):.2e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name, tmp_path):
    source = save_random(tmp_path / "source", **CONFIGS[name])
    ids = ids_of(300)
    assert_close(loaded(source, tmp_path).logits(ids), transformers_logits(source, ids))


@pytest.mark.slow
def test_logits_equal_those_of_transformers_far_beyond_the_original_context(tmp_path):
    changes = {**GROUPS, "rope_parameters": yarn(0.707, 0.707), "num_hidden_layers": 2, "num_attention_heads": 2}
    source = save_random(tmp_path / "source", num_key_value_heads=2, **{"hub_shape": True, **changes})
    ids = ids_of(4400)
    assert_close(loaded(source, tmp_path).logits(ids)[-300:], transformers_logits(source, ids)[-300:])


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": True, "routed_scaling_factor": 9.0},
        {"norm_topk_prob": True, "num_experts_per_tok": 4, **GROUPS},
        {"n_shared_experts": 0},
        {"moe_layer_freq": 2, "num_hidden_layers": 4, "first_k_dense_replace": 1},
        {},
    ],
)
def test_logits_equal_the_naive_form(changes, tmp_path):
    source = save_random(tmp_path / "source", **{**changes, "n_shared_experts": 2})
    _fit_source(source, changes)
    ids = ids_of(60)
    assert_close(loaded(source, tmp_path).logits(ids), Naive(source).logits(ids))


def _fit_source(source: Path, changes: dict[str, Any]) -> None:
    """Build models that transformers cannot: without shared experts, or with MoE in every other layer only."""
    rewrite_config(source, lambda raw: raw.update(changes))
    tensors = load_file(source / "model.safetensors")
    config = load_config(source)
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp."
        if config.n_shared_experts == 0:
            tensors = {name: t for name, t in tensors.items() if ".shared_experts." not in name}
        if not config.is_moe(layer) and mlp + "gate.weight" in tensors:
            tensors = {name: t for name, t in tensors.items() if not name.startswith(mlp)}
            shape = (config.intermediate_size, config.hidden_size)
            for name in ("gate_proj", "up_proj", "down_proj"):
                size = shape[::-1] if name == "down_proj" else shape
                tensors[f"{mlp}{name}.weight"] = (torch.randn(size) * 0.1).bfloat16()
    save_file(tensors, source / "model.safetensors")


@pytest.fixture(scope="module")
def llm(tmp_path_factory, reference_kernels) -> dsv2_local.LLM:
    directory = tmp_path_factory.mktemp("model")
    source = save_random(directory / "source", **{**GROUPS, "rope_parameters": yarn(0.707, 0.707)})
    return loaded(source, directory, Recipe.NF4)


def test_chunked_equals_whole(llm):
    ids = ids_of(700)
    llm.engine.chunk = 1024
    whole = llm.logits(ids)
    for chunk in (1, 64, 333):
        llm.engine.chunk = chunk
        length = 200 if chunk == 1 else 700
        assert_close(llm.logits(ids[:length]), whole[:length], 2e-5)


def test_cached_equals_uncached(llm):
    prompt = ids_of(40)
    tokens = [chunk.token_id for chunk in llm.generate(prompt, max_tokens=30, temperature=0)]
    uncached = []
    for _ in range(30):
        uncached.append(int(llm.logits(prompt + uncached)[-1].argmax()))
    assert tokens == uncached


def test_a_shared_prefix_is_reused_and_changes_nothing(llm):
    first, second = ids_of(50), ids_of(30) + ids_of(40, seed=2)
    fresh = [chunk.token_id for chunk in llm.generate(second, max_tokens=12, temperature=0)]
    llm.engine.clear()
    list(llm.generate(first, max_tokens=12, temperature=0))
    for reused in (30, 69):
        generation = llm.generate(second, max_tokens=12, temperature=0)
        assert [chunk.token_id for chunk in generation] == fresh
        assert generation.stats.reused_tokens == reused


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_absorbed_equals_materialised_equals_dispatched(heads, queries, monkeypatch):
    torch.manual_seed(heads + queries)
    N, P, V, C, S = 32, 16, 24, 64, 90
    uk, uv = torch.randn(heads, C, N) / 6, torch.randn(heads, V, C) / 8
    matrices = (
        Matrix(Format.BF16, heads * C, N, uk.view(-1, N)), Matrix(Format.BF16, heads * V, C, uv.view(-1, C)),
    )  # fmt: skip
    q_nope, q_rope, latents = torch.randn(queries, heads, N), torch.randn(queries, heads, P), torch.randn(S, C + P)
    unrotated = torch.ones(queries, P // 2, dtype=torch.complex64)
    q, cached = torch.cat((q_nope, q_rope), 2), S - queries
    forms = [(q, unrotated, *paged(latents, cached, absorbed), *matrices, 0.11) for absorbed in (True, False)]
    keys = torch.einsum("sc,hcn->shn", latents[:, :C], uk)
    scores = torch.einsum("thn,shn->hts", q_nope, keys) + torch.einsum("thp,sp->hts", q_rope, latents[:, C:])
    visible = torch.arange(S)[None] <= torch.arange(S - queries, S)[:, None]
    weights = (scores * 0.11).masked_fill(~visible, float("-inf")).softmax(2)
    values = torch.einsum("sc,hvc->shv", latents[:, :C], uv)
    naive = torch.einsum("hts,shv->thv", weights, values).flatten(1)
    monkeypatch.setattr(reference, "ATTENTION_WORKSPACE", 5 * S * 56)  # several groups of heads
    for args in forms:
        for result in (reference.attention(*args), ops.attention(*args)):
            assert_close(result, naive, 1e-5)


@pytest.mark.parametrize("rope", [None, yarn(0.707, 0.5)])
def test_the_rotation_of_any_positions_is_that_of_each_position(rope):
    """In any order, to the bit, whichever positions were asked for before."""
    config = parse_config({**TINY, "model_type": "deepseek_v2", **({"rope_parameters": rope} if rope else {})})
    positions = np.array([5000, 0, 255, 256, 1023, 1024, 7, 7, 8191])
    at_once, rising, cache = Rope(config), Rope(config), LatentCache(config, 16_384, CacheDtype.FP32)
    parts = []
    for position in positions.tolist():
        sequence = cache.new_sequence()
        sequence.advance(position)
        parts.append((sequence, [5]))
        sequence.reserve = lambda tokens: None  # no blocks are needed to know the positions
    batch = Batch(cache, at_once, [1] * 9, [True] * 9)
    batch.fill(parts)
    factors = batch.rotation
    for position in np.sort(positions).tolist():
        known = torch.from_numpy(rising.table(position + 1)[position])
        assert all(torch.equal(row, known) for row in factors[positions == position])
    angles = torch.from_numpy(positions).double()[:, None] * inverse_frequencies(config).double()
    scale = config.yarn.rotation_scale if config.yarn else 1.0
    assert (factors - torch.polar(torch.full_like(angles, scale), angles)).abs().max() < 1e-3  # 8191 radians in fp32


@pytest.mark.parametrize("variant", [cpu.REFERENCE, *cpu.usable()])
def test_router_scores_a_group_by_its_maximum(variant):
    config = parse_config({**TINY, "model_type": "deepseek_v2", **GROUPS, "num_experts_per_tok": 2})
    scores = torch.tensor([0.30, 0.0, 0.20, 0.19, 0.0, 0.25, 0.03, 0.03])  # by sums, group 1 would win over 2
    gate = scores.clamp_min(1e-30).log()[:, None]
    with kernels(variant):
        ids, weights = ops.route(torch.ones(1, 1), gate, config)
    assert ids.tolist() == [[0, 5]]
    assert weights[0].tolist() == pytest.approx([4.8, 4.0])


def test_bfloat16_activations_stay_close(tmp_path):
    source = save_random(tmp_path / "source", **CONFIGS["groups, yarn 0.707, hub's config"])
    exact = loaded(source, tmp_path).logits(ids_of(50))
    rough = dsv2_local.load(tmp_path / "converted", dtype="bfloat16").logits(ids_of(50))
    theirs = transformers_logits(source, ids_of(50), torch.bfloat16).float()
    ours_off, theirs_off = ((x - exact).norm(dim=1) / exact.norm(dim=1) for x in (rough, theirs))
    assert 1e-3 < ours_off.median() < 1.3 * theirs_off.median()
