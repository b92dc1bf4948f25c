"""An architecture as a frozen dataclass whose field names are those of `config.json`, with the values that follow."""

import math
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv2_local.errors import ConfigError
from dsv2_local.inlet import read_json


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
    """An architecture. `families.parse_config` and `load_config` make it, and check it."""

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
    model_type: str = "deepseek_v2"

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
    def checked(cls, values: dict[str, Any], where: str) -> "ModelConfig":
        """Make it from values by field name; `where` is the file that errors name.

        Raises:
            ConfigError: a value is missing, of the wrong type or impossible.
        """
        _check_types(values, where)
        config = cls(**values)
        _check_values(config, where)
        return config


def read_config_json(directory: Path) -> dict[str, Any]:
    """Parse `directory/config.json`; a directory without one is not a model."""
    path = directory / "config.json"
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"{directory} has no config.json; is it a model directory?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return raw


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
