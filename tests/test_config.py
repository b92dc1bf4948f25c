"""Reading config.json: both layouts of the file, derived numbers, and errors that name the value."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv2_local.architectures.families import load_config, parse_config
from dsv2_local.errors import ConfigError, UnsupportedModelError

V2: dict[str, Any] = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840, "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "group_limited_greedy", "n_group": 8,
    "topk_group": 3, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "norm_topk_prob": False,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "bos_token_id": 100000, "eos_token_id": 100001,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


def changed(**values: Any) -> dict[str, Any]:
    return {**V2, **values}


@pytest.mark.parametrize(("mscale", "scale"), [(0.707, 0.1147214), (1.0, 0.1352338)])
def test_softmax_scale_of_the_releases(mscale, scale):
    rope = {**V2["rope_scaling"], "mscale": mscale, "mscale_all_dim": mscale}
    config = parse_config(changed(rope_scaling=rope))
    assert config.softmax_scale == pytest.approx(scale, abs=1e-7)
    assert config.yarn is not None
    assert config.yarn.rotation_scale == 1


def test_both_shapes_of_the_file_mean_the_same():
    new = {key: value for key, value in V2.items() if key not in ("rope_scaling", "rope_theta")}
    rope = {key: value for key, value in V2["rope_scaling"].items() if key != "type"}
    new["rope_parameters"] = {**rope, "rope_type": "yarn", "rope_theta": 10000.0}
    assert parse_config(new) == parse_config(V2)


def test_plain_rope_has_no_yarn():
    for rope in (None, {"rope_type": "default", "rope_theta": 500.0}):
        config = parse_config(changed(rope_scaling=rope))
        assert config.yarn is None
        assert config.softmax_scale == pytest.approx(192**-0.5)


def test_yarn_without_mscale_scales_the_rotation_alone():
    rope = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    config = parse_config(changed(rope_scaling=rope))
    assert config.softmax_scale == pytest.approx(192**-0.5)
    assert config.yarn is not None
    assert config.yarn.rotation_scale == pytest.approx(1.3688879)


def test_which_layers_are_mixtures():
    config = parse_config(changed(num_hidden_layers=7, first_k_dense_replace=2, moe_layer_freq=2))
    assert config.moe_layers == (2, 4, 6)
    assert parse_config(changed(n_routed_experts=None)).moe_layers == ()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "deepseek_v3"}, "deepseek_v3"),
        ({"topk_method": "noaux_tc"}, "noaux_tc"),
        ({"scoring_func": "sigmoid"}, "sigmoid"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, named):
    with pytest.raises(UnsupportedModelError, match=named):
        parse_config(changed(**change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "5120"}, "hidden_size must be a whole number"),
        ({"vocab_size": -1}, "vocab_size must be between 1 and"),
        ({"n_group": 7}, "n_group 7"),
        ({"topk_group": 9}, "topk_group 9"),
        ({"num_experts_per_tok": 161}, "num_experts_per_tok 161"),
        ({"qk_rope_head_dim": 63}, "must be even"),
        ({"moe_layer_freq": 0}, "moe_layer_freq"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        (
            {"rope_scaling": {**V2["rope_scaling"], "beta_fast": "32"}},
            "rope_scaling: beta_fast must be a number, not",
        ),
        ({"rope_scaling": {**V2["rope_scaling"], "mscale": True}}, "mscale must be a number, not True"),
        ({"rope_scaling": {**V2["rope_scaling"], "original_max_position_embeddings": 0}}, "between 1 and"),
        ({"rope_theta": "big"}, "rope_theta must be a number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number, not nan"),
        ({"rope_theta": 1}, "rope_theta must be above 1"),
        ({"quantization_config": "awq"}, "quantization_config must be an object, not 'awq'"),
        ({"eos_token_id": "100001"}, "eos_token_id must be a whole number, not '100001'"),
        ({"eos_token_id": [100001, None]}, "eos_token_id must be a whole number, not None"),
        ({"eos_token_id": 102400}, "eos_token_id names token 102400, but vocab_size is 102,400"),
        ({"tie_word_embeddings": 7}, "tie_word_embeddings must be true or false, not 7"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be between 1 and 999, not a number of about 30 digits"),
        ({"num_hidden_layers": 900, "n_routed_experts": 1600}, "more than 131,072 experts"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor must be a number, not inf"),
        ({"model_type": ["deepseek_v2"]}, "model_type must be text"),
    ],
)
def test_impossible_values_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        parse_config(changed(**change))


def test_whole_numbers_may_be_written_as_floats():
    config = parse_config(changed(max_position_embeddings=163840.0, routed_scaling_factor=16))
    assert config == parse_config(V2)
    assert isinstance(config.max_position_embeddings, int)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00\xff", "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, text):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)


def test_the_file_as_it_lies_on_disk(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(V2))
    config = load_config(tmp_path)
    assert (config.latent_dim, config.qk_head_dim, len(config.moe_layers)) == (576, 192, 59)
    assert config.eos_token_id == (100001,)
