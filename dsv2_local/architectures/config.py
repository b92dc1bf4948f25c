"""The model's `config.json` as a frozen dataclass; what is not supported is refused here, by name.

Field names are those of `config.json`. Both shapes of it are read: the hub's (`rope_scaling` beside `rope_theta`)
and the one transformers 5 writes (`rope_parameters`).
"""

import json
import math
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv2_local.errors import ConfigError, UnsupportedModelError


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1·mscale·ln(factor) + 1 (YaRN, arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class Yarn:
    """The parameters of YaRN as `rope_scaling` names them.

    `mscale` and `mscale_all_dim` default to what the model's own code assumes when they are absent (1 and 0).
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def rotation_scale(self) -> float:
        """What cos and sin are multiplied by; 1 in every released model."""
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)

    @property
    def softmax_scale(self) -> float:
        """What the softmax scale is multiplied by: m(mscale_all_dim)²."""
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V2 architecture. Build it with `from_dict` or `load`, which check it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    q_lora_rank: int | None = None
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    topk_method: str = "greedy"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    @property
    def qk_head_dim(self) -> int:
        """Numbers per head in a query or key: nope and rope together."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers the cache keeps per token and layer: the latent and the shared rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @cached_property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5 times YaRN's m(mscale_all_dim)²; the same for absorbed attention."""
        return float(self.qk_head_dim**-0.5) * (self.yarn.softmax_scale if self.yarn else 1.0)

    def is_moe(self, layer: int) -> bool:
        """Whether the layer's MLP is a mixture of experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_moe(layer))

    @classmethod
    def load(cls, directory: Path) -> "ModelConfig":
        """Read and check `directory/config.json`."""
        return cls.from_dict(read_config_json(directory), where=str(directory / "config.json"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Check a parsed `config.json` and keep what the architecture needs.

        Raises:
            UnsupportedModelError: the model needs something not implemented; the text names it.
            ConfigError: a value is missing, of the wrong type or impossible.
        """
        _refuse_unsupported(raw, where)
        values = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        values["yarn"], rope_theta = _rope(raw, where)
        values["rope_theta"] = rope_theta
        values["eos_token_id"] = id_tuple(raw.get("eos_token_id"))
        _check_types(values, where)
        config = cls(**values)
        _check_values(config, where)
        return config


def read_config_json(directory: Path) -> dict[str, Any]:
    """Parse `directory/config.json`; a directory without one is not a model."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{directory} has no config.json; is it a model directory?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return raw


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    """Name the first feature that this runtime does not implement."""
    expected: dict[str, tuple[Any, ...]] = {
        "model_type": ("deepseek_v2",),
        "scoring_func": ("softmax", None),
        "topk_method": ("greedy", "group_limited_greedy", None),
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
    }
    for key, allowed in expected.items():
        if raw.get(key) not in allowed:
            supported = " or ".join(repr(value) for value in allowed if value is not None)
            raise UnsupportedModelError(f"{where}: {key} {raw.get(key)!r} is not supported (only {supported})")
    method = (raw.get("quantization_config") or {}).get("quant_method", "dsv2")
    if method != "dsv2":
        raise UnsupportedModelError(
            f"{where}: weights quantised as {method!r} are not supported; convert from the bf16, fp16 or fp32 release"
        )
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise UnsupportedModelError(f"{where}: num_key_value_heads {kv_heads} differs from num_attention_heads {heads}")


def _rope(raw: dict[str, Any], where: str) -> tuple[Yarn | None, float]:
    """YaRN's parameters (None for plain RoPE) and rope_theta, from either shape of the file."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: rope_scaling must be an object, not {rope!r}")
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None, float(theta)
    if kind != "yarn":
        raise UnsupportedModelError(f"{where}: RoPE scaling {kind!r} is not supported (only 'yarn' or none)")
    if rope.get("attention_factor") is not None:
        raise UnsupportedModelError(f"{where}: YaRN's attention_factor is not supported; use mscale")
    names = {f.name for f in fields(Yarn)}
    given = {key: value for key, value in rope.items() if key in names and value is not None}
    given.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    if not isinstance(given.get("factor"), (int, float)) or given["factor"] <= 0:
        raise ConfigError(f"{where}: YaRN needs a positive factor, not {given.get('factor')!r}")
    return Yarn(**given), float(theta)


def id_tuple(value: Any) -> tuple[int, ...]:
    """Token ids written as nothing, one number or a list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _check_types(values: dict[str, Any], where: str) -> None:
    for field in fields(ModelConfig):
        required = field.default is MISSING
        if field.name not in values:
            if required:
                raise ConfigError(f"{where} lacks {field.name}")
            continue
        value = values[field.name]
        if field.type in (int, int | None) and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"{where}: {field.name} must be a whole number, not {value!r}")
        if field.type is float and not isinstance(value, (int, float)):
            raise ConfigError(f"{where}: {field.name} must be a number, not {value!r}")
        if required and value <= 0:
            raise ConfigError(f"{where}: {field.name} must be positive, not {value}")


def _check_values(config: ModelConfig, where: str) -> None:
    """Relations between values that no single one shows."""
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"{where}: qk_rope_head_dim {config.qk_rope_head_dim} must be even")
    if config.moe_layer_freq < 1:
        raise ConfigError(f"{where}: moe_layer_freq {config.moe_layer_freq} must be at least 1")
    if not config.moe_layers:
        return
    if not 0 < config.num_experts_per_tok <= config.n_routed_experts:
        raise ConfigError(
            f"{where}: num_experts_per_tok {config.num_experts_per_tok} must lie between 1 and "
            f"n_routed_experts {config.n_routed_experts}"
        )
    if config.topk_method == "group_limited_greedy":
        if config.n_group < 1 or config.n_routed_experts % config.n_group:
            raise ConfigError(
                f"{where}: n_group {config.n_group} does not divide n_routed_experts {config.n_routed_experts}"
            )
        if not 0 < config.topk_group <= config.n_group:
            raise ConfigError(
                f"{where}: topk_group {config.topk_group} must lie between 1 and n_group {config.n_group}"
            )
