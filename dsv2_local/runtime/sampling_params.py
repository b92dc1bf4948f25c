"""Sampling parameters, and a model's defaults for them."""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsv2_local.architectures.config import id_tuple
from dsv2_local.errors import ConfigError, InputError
from dsv2_local.inlet import read_json


@dataclass(frozen=True)
class SamplingParams:
    """How to sample tokens. The order is: penalties, bias, temperature, truncation (see `sampler.py`).

    Attributes:
        temperature: logits are divided by it; 0 is greedy decoding, and then top_p, top_k and min_p have no effect.
        top_p: sample from the most likely tokens whose probabilities reach this sum; 1: from all.
        top_k: sample from this many most likely tokens; 0: from all.
        min_p: drop tokens with less than this fraction of the largest probability.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt or answer.
        presence_penalty: subtracted once from the logit of each token in the answer.
        frequency_penalty: subtracted from a token's logit for each time that the token occurs in the answer.
        logit_bias: token ids, and what is added to their logits.
        seed: of the random numbers; None: a different answer every time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: a value is out of range.
        """
        numbers = [getattr(self, f.name) for f in fields(self) if f.type in (float, int)]
        if not all(math.isfinite(value) for value in (*numbers, *self.logit_bias.values())):
            raise InputError("sampling parameters must be finite numbers")
        self._require(self.temperature >= 0, "temperature", "at least 0")
        self._require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self._require(self.top_k >= 0, "top_k", "at least 0 (0: no limit)")
        self._require(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        self._require(self.repetition_penalty > 0, "repetition_penalty", "above 0")

    def _require(self, valid: bool, name: str, rule: str) -> None:
        if not valid:
            raise InputError(f"{name} must be {rule}, not {getattr(self, name)}")

    def override(self, **given: Any) -> "SamplingParams":
        """A copy in which the given values replace this object's; None means no replacement."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class GenerationConfig:
    """A model's defaults, from its `generation_config.json`: how to sample, and which tokens end an answer."""

    params: SamplingParams = SamplingParams()
    eos_token_id: tuple[int, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> "GenerationConfig":
        """Read the file; without one, sample with temperature 1 and no truncation.

        Raises:
            ConfigError: the file is damaged, or a value is out of range.
        """
        path = directory / "generation_config.json"
        if not path.is_file():
            return cls()
        try:
            raw = read_json(path)
            return cls(_default_params(raw), id_tuple(raw.get("eos_token_id")))
        except (OSError, ValueError, TypeError, AttributeError, InputError) as error:
            raise ConfigError(f"{path} cannot be used: {error}") from None


def _default_params(raw: dict[str, Any]) -> SamplingParams:
    """The sampling defaults in a generation_config.json; greedy unless `do_sample` is true."""
    if not raw.get("do_sample", False):
        return SamplingParams(temperature=0.0)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return SamplingParams().override(**{name: raw.get(name) for name in names})
