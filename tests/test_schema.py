"""The table of tensors has exactly the parameters, tensors and bytes of the published releases."""

import pytest

from dsv2_local.architectures.families import parse_config
from dsv2_local.architectures.tensors import Kind
from dsv2_local.quant.schema import Recipe, expert_layout, parameters, source_shapes
from tests.test_config import V2

LITE = {
    **V2, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "q_lora_rank": None, "n_routed_experts": 64,
    "n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "weights", "tensors", "file_bytes"),
    [(V2, 235_741_434_880, 29_102, 471_482_869_760), (LITE, 15_706_484_224, 5_291, 31_412_968_448)],
)
def test_the_releases_add_up(raw, weights, tensors, file_bytes):
    config = parse_config(raw)
    assert parameters(config) == weights
    assert len(source_shapes(config)) == tensors
    assert 2 * weights == file_bytes


@pytest.mark.parametrize(("raw", "record"), [(V2, 12_533_760), (LITE, 4_595_712)])
def test_an_expert_at_4_25_bits(raw, record):
    config = parse_config(raw)
    assert expert_layout(config, Recipe.NF4).nbytes == record


def test_each_recipe_has_the_documented_formats():
    formats = {recipe: {kind: recipe.format_of(kind) for kind in Kind} for recipe in Recipe}
    assert set(formats[Recipe.BF16].values()) == {"bf16"}
    assert set(formats[Recipe.INT8].values()) == {"int8"}
    four_bit = {recipe: {kind for kind, format in formats[recipe].items() if format == "nf4"} for recipe in Recipe}
    assert four_bit[Recipe.MIXED] == {Kind.ROUTED}
    assert {Kind.ATTENTION, Kind.DENSE, Kind.SHARED, Kind.ROUTED} <= four_bit[Recipe.NF4]
    assert not {Kind.EMBEDDING, Kind.HEAD, Kind.KV_B} & four_bit[Recipe.NF4]
