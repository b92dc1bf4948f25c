"""Which family a `config.json` belongs to. A family is a module of this folder with the functions of `Family`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from dsv2_local.architectures import deepseek_v2
from dsv2_local.architectures.config import ModelConfig, read_config_json
from dsv2_local.architectures.tensors import TensorSpec
from dsv2_local.errors import UnsupportedModelError
from dsv2_local.values import Fields, Text


class Family(Protocol):
    """What a module says of the models with one `model_type`."""

    def parse(self, raw: dict[str, Any], where: str) -> ModelConfig:
        """Check a parsed `config.json`, and keep what the architecture needs; `where` is the file that errors name."""
        ...

    def outer_tensors(self, c: ModelConfig) -> Iterator[TensorSpec]:
        """The tensors outside the layers."""
        ...

    def layer_tensors(self, c: ModelConfig, layer: int) -> Iterator[TensorSpec]:
        """The tensors of a layer, but for its routed experts."""
        ...

    def expert_tensor(self, layer: int, expert: int, matrix: str) -> str:
        """The name of one matrix ("gate_proj", "up_proj", "down_proj") of one routed expert."""
        ...


FAMILIES: dict[str, Family] = {"deepseek_v2": cast(Family, deepseek_v2)}
"""By `model_type`."""


def family_of(config: ModelConfig) -> Family:
    """The family that made this configuration."""
    return FAMILIES[config.model_type]


def parse_config(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The configuration in a parsed `config.json`; `where` is the file that errors name.

    Raises:
        UnsupportedModelError: the model, or something in it, is not supported; the text names it.
        ConfigError: a value is missing, of the wrong type or impossible.
    """
    model_type = Fields(raw, where).get("model_type", Text())
    if model_type not in FAMILIES:
        supported = " or ".join(repr(name) for name in FAMILIES)
        raise UnsupportedModelError(f"{where}: model_type {model_type!r} is not supported (only {supported})")
    return FAMILIES[model_type].parse(raw, where)


def load_config(directory: Path) -> ModelConfig:
    """Read and check `directory/config.json`. Raises what `parse_config` does."""
    return parse_config(read_config_json(directory), where=str(directory / "config.json"))
