"""The architectures of the released models, so that they can be planned and measured before they are downloaded."""

import os
from pathlib import Path
from typing import Any

from dsv2_local.architectures.config import ModelConfig, read_config_json
from dsv2_local.architectures.families import parse_config
from dsv2_local.errors import ConfigError, InputError
from dsv2_local.model_files import read_object
from dsv2_local.values import Fields, Object, Text

_FAMILY: dict[str, Any] = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
    "max_position_embeddings": 163840, "rope_theta": 10000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_bias": False, "hidden_act": "silu", "bos_token_id": 100000, "eos_token_id": 100001,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
# What the config.json of the releases says, as far as the architecture needs it.
RELEASED: dict[str, dict[str, Any]] = {
    "deepseek-v2": {
        **_FAMILY, "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128,
        "num_key_value_heads": 128, "intermediate_size": 12288, "moe_intermediate_size": 1536, "q_lora_rank": 1536,
        "n_routed_experts": 160, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    "deepseek-v2-lite": {
        **_FAMILY, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408, "q_lora_rank": None,
        "n_routed_experts": 64, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0,
    },
}  # fmt: skip


def read_config(name: str) -> ModelConfig:
    """The configuration of a released model, of a config.json, or of a directory that has one.

    Raises:
        InputError: `name` is none of these.
        ConfigError: the file is not a supported configuration.
    """
    raw, where = _read(name)
    return parse_config(raw, where=where)


def stored_recipe(name: str) -> str | None:
    """The recipe that a converted model's config.json names; None for what is not converted."""
    raw, where = _read(name)
    described = Fields(raw, where).get("quantization_config", Object()) or {}
    recipe: str | None = Fields(described, f"{where}: quantization_config").get("recipe", Text())
    return recipe


def _read(name: str) -> tuple[dict[str, Any], str]:
    """What a config.json says, and where it stands."""
    if name in RELEASED:
        return RELEASED[name], name
    if not name:
        raise InputError("the model's name is empty; is a variable not set?")
    path = Path(name)
    if os.path.isdir(name):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
        return read_config_json(path), str(path / "config.json")
    raw = read_object(path, ConfigError)
    if raw is None:
        raise InputError(f"{name} is neither {' nor '.join(RELEASED)} nor a config.json")
    return raw, str(path)
