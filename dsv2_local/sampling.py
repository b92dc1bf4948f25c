"""From logits to a token: penalties, bias, temperature and the truncations, in the order that is usual in the field.

Repetition penalty (arXiv 1909.05858), presence and frequency penalty and bias (as in OpenAI's API), temperature,
top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082).
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv2_local.config import id_tuple
from dsv2_local.errors import ConfigError, InputError
from dsv2_local.kernels.format import LIKELY

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

# Of the likeliest token's probability: less likely ones are looked at only where they matter, and fetched from a GPU.
FLOORS, FETCHED_FLOOR = (1e-3, 1e-6, 0.0), 1e-4


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


@dataclass(frozen=True)
class Likely:
    """The likeliest tokens of a distribution, or all.

    Attributes:
        ids: int64 [n], ascending.
        values: their logits, fp32 [n].
        mass: Σ exp((logit - largest) / temperature) over all tokens; None where `values` has them all.
        floor: every token at least this many times as likely as the likeliest is among them.
    """

    ids: Ids
    values: NDArray[np.float32]
    mass: float | None = None
    floor: float = 0.0

    @classmethod
    def unpack(cls, packed: NDArray[np.int32]) -> "Likely | None":
        """From what `kernels.ops.likely` tells, with limits of `likely_limits`; None if there are too many, or none."""
        count = int(packed[0])
        if not 0 < count <= LIKELY:
            return None
        ids, values = packed[3 : 3 + count], packed[3 + LIKELY : 3 + LIKELY + count].view(np.float32)
        order = ids.argsort()
        return cls(ids[order].astype(np.int64), values[order], float(packed[2:3].view(np.float32)[0]), FETCHED_FLOOR)


def likely_limits(params: SamplingParams) -> tuple[float, float]:
    """The limits that `kernels.ops.likely` takes."""
    if params.temperature == 0:
        return 1.0, 0.0
    return min(1 / params.temperature, 3e38), -math.log(FETCHED_FLOOR) * params.temperature


@dataclass(frozen=True)
class Outcome:
    """What a step says of the next token: its logits, fp32 [vocab], for the asking, and the likeliest if at hand."""

    logits: Callable[[], Tensor]
    likely: Likely | None = None

    @classmethod
    def known(cls, logits: Tensor) -> "Outcome":
        """What is in RAM."""
        return cls(lambda: logits)


Outcomes = Callable[[], tuple[list[Outcome], float]]
"""Waits for a step: what comes after each of its tokens, and the seconds it took."""


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

    def choose(self, outcome: Outcome) -> int:
        """The next token; logits are left as they were."""
        token = None
        if outcome.likely and not self._penalises:
            token = self._among(outcome.likely)
        if token is None:
            values = self._penalised(outcome.logits()).numpy()
            token = self._among(Likely(_all_ids(len(values)), values))
        assert token is not None
        self._chosen[token] += 1
        return token

    def _among(self, likely: Likely) -> int | None:
        """The next token; None where these are not enough to tell."""
        if self.params.temperature == 0:
            return int(likely.ids[likely.values.argmax()])
        kept = candidates(likely, self.params)
        if kept is None:
            return None
        ids, probabilities = kept
        sums = probabilities.cumsum()
        point = float(torch.rand(1, dtype=torch.float64, generator=self._generator)) * sums[-1]
        return int(ids[min(np.searchsorted(sums, point, side="right"), len(ids) - 1)])

    @property
    def _penalises(self) -> bool:
        p = self.params
        return bool(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty or p.logit_bias)

    def _penalised(self, logits: Tensor) -> Tensor:
        if not self._penalises:
            return logits
        p, logits = self.params, logits.clone()
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


@cache
def _all_ids(vocab: int) -> Ids:
    return np.arange(vocab)


def candidates(likely: Likely, params: SamplingParams) -> tuple[Ids, Floats] | None:
    """The tokens that temperature, top_k, top_p and min_p leave.

    Sorting a vocabulary of 100,000 takes longer than a GPU takes for a token, so only the likeliest are sorted, as many
    as are provably enough.

    Returns:
        Token ids, int64 [n], and their probabilities, fp64 [n], which add up to 1; the likeliest token is among them.
        None where tokens matter that `likely` does not have.
    """
    values, whole = likely.values, likely.mass is None
    with np.errstate(over="ignore"):  # the largest becomes 0 first, so that a tiny temperature gives 0 and -inf
        all_weights = np.exp((values - values.max()) / np.float32(params.temperature))
    mass = float(all_weights.sum(dtype=np.float64)) if likely.mass is None else likely.mass
    if params.top_k and not (whole and params.top_k >= len(values)):
        if params.top_k > len(values):
            return None
        least = torch.from_numpy(values).topk(params.top_k).values[-1].item()
        at = np.flatnonzero(values >= least)  # equals of the last stay too
        mass = float(all_weights[at].sum(dtype=np.float64))
    elif params.top_p < 1:
        floors = (np.flatnonzero(all_weights >= floor) for floor in FLOORS)
        enough = (at for at in floors if all_weights[at].sum(dtype=np.float64) >= params.top_p * mass)
        found = next(enough, None)
        if found is None:
            return None
        at = found
    elif params.min_p > likely.floor:
        at = np.flatnonzero(all_weights >= params.min_p)
    elif whole:
        return likely.ids, all_weights.astype(np.float64) / mass
    else:
        return None
    ids, weights = likely.ids[at], all_weights[at].astype(np.float64)
    if params.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        ids, weights = ids[order], weights[order]
        # A token is dropped when those before it already hold top_p of the mass.
        count = max(1, int(np.searchsorted((weights.cumsum() - weights) / mass, params.top_p)))
        ids, weights = ids[:count], weights[:count]
    kept = weights >= params.min_p
    ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()
