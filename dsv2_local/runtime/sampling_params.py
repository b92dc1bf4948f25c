"""Sampling parameters, and a model's defaults for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from dsv2_local.errors import ConfigError, InputError
from dsv2_local.model_files import read_object
from dsv2_local.values import Fields, Flag, Number, TokenIds, Value, checked, shown

SMALLEST_TEMPERATURE = 2.0**-126
"""The smallest normal number of fp32. Logits divided by less overflow, and the answer is greedy in any case."""

_PENALTY = Number(-1e6, 1e6)
VALUES: dict[str, Value] = {
    "temperature": Number(0), "top_p": Number(0, 1, above=True), "top_k": Number(-1, whole=True), "min_p": Number(0, 1),
    "repetition_penalty": Number(1e-3, 1e3), "presence_penalty": _PENALTY, "frequency_penalty": _PENALTY,
    "seed": Number(-1, 2**64 - 1, whole=True),
}  # fmt: skip
"""What each number of `SamplingParams` may be."""
UNSUPPORTED: dict[str, Any] = {
    "begin_suppress_tokens": [], "bad_words_ids": [], "epsilon_cutoff": 0, "eta_cutoff": 0, "guidance_scale": 1,
    "max_new_tokens": None, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "num_beams": 1,
    "penalty_alpha": 0, "sequence_bias": {}, "stop_strings": [], "suppress_tokens": [], "typical_p": 1,
}  # fmt: skip
"""Settings of transformers that would change answers, with the value that means off, as null does."""
_BIAS = Number(-1e9, 1e9)
_TOKEN = Number(0, whole=True)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample tokens. The order is: penalties, bias, temperature, truncation (see `sampler.py`).

    Attributes:
        temperature: logits are divided by it; 0 is greedy decoding, and then top_p, top_k and min_p have no effect.
        top_p: sample from the most likely tokens whose probabilities reach this sum; 1: from all.
        top_k: sample from this many most likely tokens; 0 or -1: from all.
        min_p: drop tokens with less than this fraction of the largest probability.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt or answer.
        presence_penalty: subtracted once from the logit of each token in the answer.
        frequency_penalty: subtracted from a token's logit for each time that the token occurs in the answer.
        logit_bias: token ids, and what is added to their logits.
        seed: of the random numbers, which are then the same every time; -1 or None: different ones. The answer is the
            same if the prompt is computed in the same steps; a reused prefix changes the rounding of logits.
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
        """Check types and ranges, and give each value the one spelling that the sampler knows.

        Other programs write -1 for "no limit" (top_k) and for "a different answer every time" (seed); here they become
        0 and None. A temperature too small for fp32 becomes 0.

        Raises:
            InputError: a value is of the wrong type, not finite, or out of range.
        """
        for name, kind in VALUES.items():
            value = getattr(self, name)
            if not (name == "seed" and value is None):
                self._set(name, checked(name, value, kind, InputError))
        if self.temperature < SMALLEST_TEMPERATURE:
            self._set("temperature", 0.0)
        if self.top_k == -1:
            self._set("top_k", 0)
        if self.seed == -1:
            self._set("seed", None)
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias must map token ids to numbers, not be {shown(self.logit_bias)}")
        biases = {
            checked("a token of logit_bias", token, _TOKEN, InputError): checked(
                f"logit_bias of token {shown(token)}", bias, _BIAS, InputError
            )
            for token, bias in self.logit_bias.items()
        }
        self._set("logit_bias", biases)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def override(self, **given: Any) -> "SamplingParams":
        """A copy in which the given values replace this object's; None means no replacement.

        Raises:
            InputError: there is no such parameter, or a value is impossible.
        """
        known = (*VALUES, "logit_bias")
        if unknown := [name for name in given if name not in known]:
            raise InputError(f"there is no option {unknown[0]}; the sampling parameters are {', '.join(known)}")
        return replace(self, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class GenerationConfig:
    """A model's defaults, from its `generation_config.json`.

    Attributes:
        params: how to sample.
        eos_token_id: tokens that end an answer.
        left_out: names of its settings that are not supported.
    """

    params: SamplingParams = SamplingParams()
    eos_token_id: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def load(cls, directory: Path, vocabulary: float = inf) -> "GenerationConfig":
        """Read the file; without one, sample with temperature 1 and no truncation.

        Decoding is greedy unless `do_sample` is true, as in transformers: the other settings are kept, since penalties
        apply to greedy decoding too and the rest to a temperature that the user chooses.

        Args:
            directory: the model's.
            vocabulary: number of tokens that the model knows.

        Raises:
            ConfigError: the file is damaged, or a value is of the wrong type or out of range.
        """
        path = directory / "generation_config.json"
        raw = read_object(path, ConfigError)
        if raw is None:
            return cls()
        source = Fields(raw, str(path))
        given = {name: source.get(name, kind) for name, kind in VALUES.items() if name != "seed"}
        params = SamplingParams().override(**given)
        if not source.get("do_sample", Flag()):
            params = params.override(temperature=0.0)
        left_out = tuple(name for name, off in UNSUPPORTED.items() if raw.get(name) not in (None, off))
        return cls(params, source.get("eos_token_id", TokenIds(vocabulary)) or (), left_out)
