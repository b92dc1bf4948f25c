"""An architecture as a frozen dataclass whose field names are those of `config.json`, with the values that follow."""

import math
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv2_local.errors import ConfigError
from dsv2_local.model_files import read_object
from dsv2_local.values import Fields, Flag, Number, Text, TokenIds, Value

_SIZE = Number(1, 2**24, whole=True)
_COUNT = Number(0, 2**16, whole=True)
_POSITIONS = Number(1, 2**30, whole=True)
_ROPE_THETA = Number(1, 1e15, above=True)
MAX_EXPERTS = 2**17
"""The most routed experts of all layers together; the 236B model has 9,440. Their tensors are listed in memory."""

VALUES: dict[str, Value] = {
    "vocab_size": _SIZE, "hidden_size": _SIZE, "intermediate_size": _SIZE, "moe_intermediate_size": _SIZE,
    "num_hidden_layers": Number(1, 999, whole=True), "num_attention_heads": Number(1, 2**16, whole=True),
    "kv_lora_rank": _SIZE, "qk_nope_head_dim": _SIZE, "qk_rope_head_dim": _SIZE, "v_head_dim": _SIZE,
    "max_position_embeddings": _POSITIONS, "q_lora_rank": _SIZE, "n_routed_experts": _COUNT,
    "n_shared_experts": _COUNT, "num_experts_per_tok": _COUNT, "first_k_dense_replace": _COUNT,
    "moe_layer_freq": Number(1, 2**16, whole=True), "topk_method": Text(), "n_group": _COUNT, "topk_group": _COUNT,
    "norm_topk_prob": Flag(), "routed_scaling_factor": Number(0, 1e6), "rms_norm_eps": Number(0, 1),
    "rope_theta": _ROPE_THETA, "tie_word_embeddings": Flag(), "bos_token_id": Number(0, 2**24, whole=True),
    "model_type": Text(),
}  # fmt: skip
"""What each value of `ModelConfig` may be that is read as it is, by its name in config.json."""

YARN_VALUES: dict[str, Value] = {
    "factor": Number(1, 1e6), "original_max_position_embeddings": _POSITIONS,
    "beta_fast": Number(1e-3, 1e6), "beta_slow": Number(1e-3, 1e6),
    "mscale": Number(0, 1e3), "mscale_all_dim": Number(0, 1e3),
}  # fmt: skip
"""What each value of `Yarn` may be."""


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
    def read(cls, raw: dict[str, Any], where: str, *, yarn: Yarn | None, rope_theta: float) -> "ModelConfig":
        """Make it from a parsed `config.json`; `where` is the file that errors name.

        Raises:
            ConfigError: a value is missing, of the wrong type, out of range, or does not go with another.
        """
        source = Fields(raw, where)
        values = {name: source.get(name, kind) for name, kind in VALUES.items()}
        for field in fields(cls):
            if field.default is MISSING and values[field.name] is None:
                raise ConfigError(f"{where} lacks {field.name}")
        ends = source.get("eos_token_id", TokenIds(values["vocab_size"])) or ()
        given = {name: value for name, value in values.items() if value is not None}
        config = cls(**{**given, "yarn": yarn, "rope_theta": rope_theta, "eos_token_id": ends})
        _check_relations(config, where)
        return config


def read_config_json(directory: Path) -> dict[str, Any]:
    """Parse `directory/config.json`; a directory without one is not a model."""
    raw = read_object(directory / "config.json", ConfigError)
    if raw is None:
        raise ConfigError(f"{directory} has no config.json; is it a model directory?")
    return raw


def _check_relations(config: ModelConfig, where: str) -> None:
    """Relations between values that no single one shows."""
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"{where}: qk_rope_head_dim {config.qk_rope_head_dim} must be even")
    if not config.moe_layers:
        return
    if len(config.moe_layers) * config.n_routed_experts > MAX_EXPERTS:
        raise ConfigError(
            f"{where}: num_hidden_layers {config.num_hidden_layers} and n_routed_experts {config.n_routed_experts} are "
            f"more than {MAX_EXPERTS:,} experts"
        )
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
