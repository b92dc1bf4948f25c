"""From logits to a token: penalties, bias, temperature and the truncations, in the order that is usual in the field.

Repetition penalty (arXiv 1909.05858), presence and frequency penalty and bias (as in OpenAI's API), temperature,
top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082).
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv2_local.config import id_tuple
from dsv2_local.errors import ConfigError, InputError

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

FLOORS = (
    1e-3,
    1e-6,
    0.0,
)  # of the likeliest token's probability: less likely ones are looked at only where they matter


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Temperature 0 is greedy, whatever the truncations say.

    `repetition_penalty` counts prompt and answer; `presence_penalty` and `frequency_penalty` the answer alone.
    `logit_bias` maps token ids to what is added to their logits. `top_k` 0 means all tokens.
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
        """Raises InputError for a value out of its range."""
        numbers = [getattr(self, f.name) for f in fields(self) if f.type in (float, int)]
        if not all(math.isfinite(value) for value in (*numbers, *self.logit_bias.values())):
            raise InputError("sampling parameters must be finite numbers")
        self._require(self.temperature >= 0, "temperature", "at least 0")
        self._require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self._require(self.top_k >= 0, "top_k", "at least 0 (0: no limit)")
        self._require(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        self._require(self.repetition_penalty > 0, "repetition_penalty", "above 0")

    def _require(self, met: bool, name: str, rule: str) -> None:
        if not met:
            raise InputError(f"{name} must be {rule}, not {getattr(self, name)}")

    def override(self, **given: Any) -> "SamplingParams":
        """A copy with every given value that is not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class GenerationConfig:
    """The model makers' own defaults, `generation_config.json`: how to sample, and which tokens end an answer."""

    params: SamplingParams = SamplingParams()
    eos_token_id: tuple[int, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> "GenerationConfig":
        """Read the file; without one, plain sampling. ConfigError when it is damaged."""
        path = directory / "generation_config.json"
        if not path.is_file():
            return cls()
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(_default_params(raw), id_tuple(raw.get("eos_token_id")))
        except (OSError, ValueError, TypeError, AttributeError, InputError) as error:
            raise ConfigError(f"{path} cannot be used: {error}") from None


def _default_params(raw: dict[str, Any]) -> SamplingParams:
    """Greedy where the makers do not sample."""
    if not raw.get("do_sample", False):
        return SamplingParams(temperature=0.0)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return SamplingParams().override(**{name: raw.get(name) for name in names})


class Sampler:
    """Chooses tokens one after the other, remembering what it has chosen."""

    def __init__(self, params: SamplingParams, prompt: list[int]) -> None:
        self.params = params
        self._seen = torch.tensor(sorted(set(prompt)), dtype=torch.int64)
        self._chosen: Counter[int] = Counter()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token for fp32 logits [vocab] in RAM; `logits` is left as it was."""
        logits = self._penalised(logits)
        if self.params.temperature == 0:
            token = int(logits.numpy().argmax())  # torch's own takes ten times as long
        else:
            ids, probabilities = candidates(logits, self.params)
            sums = probabilities.cumsum()
            point = float(torch.rand(1, dtype=torch.float64, generator=self._generator)) * sums[-1]
            token = int(ids[min(np.searchsorted(sums, point, side="right"), len(ids) - 1)])
        self._chosen[token] += 1
        return token

    def _penalised(self, logits: Tensor) -> Tensor:
        p = self.params
        if p.repetition_penalty == 1 and not (p.presence_penalty or p.frequency_penalty or p.logit_bias):
            return logits
        logits = logits.clone()
        chosen = torch.tensor(list(self._chosen), dtype=torch.int64)
        if p.repetition_penalty != 1:
            seen = torch.unique(torch.cat((self._seen, chosen)))
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if p.presence_penalty or p.frequency_penalty:
            counts = torch.tensor(list(self._chosen.values()), dtype=torch.float32)
            logits[chosen] -= p.presence_penalty + p.frequency_penalty * counts
        for token, bias in p.logit_bias.items():
            if not 0 <= token < len(logits):
                raise InputError(f"logit_bias names token {token}; the vocabulary has {len(logits):,}")
            logits[token] += bias
        return logits


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Ids, Floats]:
    """The tokens that temperature, top_k, top_p and min_p leave of fp32 logits [vocab].

    Sorting a vocabulary of 100,000 takes longer than a GPU takes for a token, so only the likeliest are sorted, as many
    as are provably enough.

    Returns:
        Token ids, int64 [n], and their probabilities, fp64 [n], which add up to 1; the likeliest token is among them.
    """
    values = logits.numpy()
    with np.errstate(over="ignore"):  # the largest becomes 0 first, so that a tiny temperature gives 0 and -inf
        all_weights = np.exp((values - values.max()) / np.float32(params.temperature))
    mass = float(all_weights.sum(dtype=np.float64))
    if 0 < params.top_k < len(values):
        ids = np.flatnonzero(values >= logits.topk(params.top_k).values[-1].item())  # equals of the last stay too
        mass = float(all_weights[ids].sum(dtype=np.float64))
    elif params.top_p < 1:
        floors = (np.flatnonzero(all_weights >= floor) for floor in FLOORS)
        ids = next(ids for ids in floors if all_weights[ids].sum(dtype=np.float64) >= params.top_p * mass)
    elif params.min_p > 0:
        ids = np.flatnonzero(all_weights >= params.min_p)
    else:
        return np.arange(len(values)), all_weights.astype(np.float64) / mass
    weights = all_weights[ids].astype(np.float64)
    if params.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        ids, weights = ids[order], weights[order]
        # A token is dropped when those before it already hold top_p of the mass.
        count = max(1, int(np.searchsorted((weights.cumsum() - weights) / mass, params.top_p)))
        ids, weights = ids[:count], weights[:count]
    kept = weights >= params.min_p
    ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()
