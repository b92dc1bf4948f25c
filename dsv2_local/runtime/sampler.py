"""From logits to a token.

Tokens that the answer's constraint refuses are left out. Then, in the usual order: repetition penalty (arXiv
1909.05858), presence penalty, frequency penalty and logit bias (as in OpenAI's API), temperature, top-k, top-p (arXiv
1904.09751), min-p (arXiv 2407.01082).
"""

from collections import Counter
from functools import cache, cached_property
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv2_local.errors import InputError, NonFiniteError
from dsv2_local.runtime.constraint import Constraint
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.step import StepResult, TopCandidates

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

# Fractions of the largest probability. Top-p sorts only the tokens above the first of these floors that is enough.
FLOORS = (1e-3, 1e-6, 0.0)
ROUNDING = 1e-5  # of the mass that a GPU computes in fp32


class Sampler:
    """Chooses the tokens of one answer, and counts them for the penalties.

    Attributes:
        params: how to sample.
        constraint: what the answer must look like; moved on by each token that is chosen.
    """

    def __init__(self, params: SamplingParams, prompt: list[int], constraint: Constraint | None = None) -> None:
        self.params, self.constraint = params, constraint
        self._seen = torch.tensor(sorted(set(prompt)), dtype=torch.int64)
        self._chosen: Counter[int] = Counter()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def candidate_params(self) -> SamplingParams:
        """The parameters for which a step returns its top candidates.

        The best token alone, which is enough for greedy decoding, may be one that the constraint refuses.
        """
        if self.constraint and self.params.temperature == 0:
            return _SEVERAL
        return self.params

    def choose(self, result: StepResult) -> int:
        """Choose the token that follows the last accepted one. The logits are not modified.

        If the top candidates are enough, the full logits are not copied from the GPU.

        Raises:
            NonFiniteError: a logit is NaN or infinite.
            InputError: the constraint cannot go on.
        """
        token, candidates = None, result.candidates()
        if candidates and not self._penalises:
            token = self._sample(candidates)
        if token is None:
            values = self._penalised(result.logits()).numpy()
            token = self._sample(TopCandidates(_all_ids(len(values)), values))
        assert token is not None
        self._chosen[token] += 1
        if self.constraint:
            self.constraint.advance(token)
        return token

    def _sample(self, candidates: TopCandidates) -> int | None:
        """Draw a token; None if the candidates are not enough to determine it."""
        if self.constraint is not None and (forced := self.constraint.forced()):
            _check_finite(candidates.values.max())
            return forced[0]
        if self.params.temperature == 0:
            best = candidates.values.argmax()
            _check_finite(candidates.values[best])
            token = int(candidates.ids[best])
            if self.constraint is None or self.constraint.accepts([token]):
                return token
        if self.constraint is not None:
            allowed = among(candidates, self.constraint.mask(), self.params.temperature)
            if allowed is None:
                return None
            candidates = allowed
            if self.params.temperature == 0:
                return int(candidates.ids[candidates.values.argmax()])
        kept = truncated(candidates, self.params)
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
        if p.logit_bias:
            tokens, biases = self._bias
            logits[tokens] += biases
        return logits

    @cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        given = self.params.logit_bias
        return torch.tensor(list(given)), torch.tensor(list(given.values()), dtype=torch.float32)


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise InputError if the logit bias names a token outside the vocabulary."""
    if (largest := max(params.logit_bias, default=0)) >= vocab_size:
        raise InputError(f"logit_bias names token {largest}, but the vocabulary has {vocab_size:,} tokens")


def _check_finite(largest: np.float32) -> None:
    """Check the largest logit, which is NaN if any is.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    if not np.isfinite(largest):
        raise NonFiniteError("the logits")


_SEVERAL = SamplingParams(temperature=1.0)


@cache
def _all_ids(vocab: int) -> Ids:
    return np.arange(vocab)


def among(candidates: TopCandidates, mask: Mask, temperature: float) -> TopCandidates | None:
    """Those candidates that a mask allows, bool [vocabulary].

    Args:
        candidates: of the whole distribution.
        mask: which tokens may be chosen.
        temperature: if it is 0, only ids and values of the result are meant to be used.

    Raises:
        NonFiniteError: a logit is NaN or infinite, of whatever token.

    Returns:
        The candidates for `truncated`; None if none of them is allowed.
    """
    largest = candidates.values.max()
    _check_finite(largest)
    if candidates.mass is None:
        ids = np.flatnonzero(mask)
        return TopCandidates(ids, candidates.values[ids])
    at = np.flatnonzero(mask[candidates.ids])
    if not len(at):
        return None
    ids, values = candidates.ids[at], candidates.values[at]
    if temperature == 0:
        return TopCandidates(ids, values, candidates.mass)
    weights = np.exp((candidates.values - largest) / np.float32(temperature), dtype=np.float64)
    # Of the tokens that are no candidates only their mass is known, and not how much of it is allowed.
    outside = max(0.0, candidates.mass - float(weights.sum())) + ROUNDING * candidates.mass
    inside, best = float(weights[at].sum()), float(weights[at].max())
    if best == 0:  # too unlikely to compare
        return None
    return TopCandidates(ids, values, (inside + outside) / best, candidates.floor / best, outside / best)


def truncated(candidates: TopCandidates, params: SamplingParams) -> tuple[Ids, Floats] | None:
    """The distribution after temperature, top_k, top_p and min_p.

    Sorting a vocabulary of 100,000 tokens would take longer than a GPU's decode step, so only the most likely tokens
    are sorted: as many as are provably enough.

    Raises:
        NonFiniteError: a logit is NaN or infinite.

    Returns:
        Token ids, int64 [n], and their probabilities, fp64 [n], which sum to 1; the most likely token is always among
        them. None if the distribution has tokens that `candidates` lacks, or may have.
    """
    values, whole = candidates.values, candidates.mass is None
    _check_finite(values.max())
    # The largest logit is subtracted first, so that a tiny temperature gives exp(0) = 1 and exp(-inf) = 0, not NaN.
    with np.errstate(over="ignore"):
        all_weights = np.exp((values - values.max()) / np.float32(params.temperature))
    mass = float(all_weights.sum(dtype=np.float64)) if candidates.mass is None else candidates.mass
    doubt = candidates.doubt
    if params.top_k and not (whole and params.top_k >= len(values)):
        if params.top_k > len(values):
            return None
        least = torch.from_numpy(values).topk(params.top_k).values[-1].item()
        at = np.flatnonzero(values >= least)  # ties with the last one are included
        mass, doubt = float(all_weights[at].sum(dtype=np.float64)), 0.0
    elif params.top_p < 1:
        floors = (np.flatnonzero(all_weights >= floor) for floor in FLOORS)
        enough = (at for at in floors if all_weights[at].sum(dtype=np.float64) >= params.top_p * mass)
        found = next(enough, None)
        if found is None:
            return None
        at = found
    elif params.min_p > candidates.floor:
        at = np.flatnonzero(all_weights >= params.min_p)
    elif whole:
        return candidates.ids, all_weights.astype(np.float64) / mass
    else:
        return None
    ids, weights = candidates.ids[at], all_weights[at].astype(np.float64)
    if params.top_p < 1:
        order = _descending(all_weights[at])
        ids, weights = ids[order], weights[order]
        # A token is dropped if the more likely ones already have top_p of the probability mass.
        before = weights.cumsum() - weights
        count = max(1, int(np.searchsorted(before / mass, params.top_p)))
        if doubt and count != max(1, int(np.searchsorted(before / (mass - doubt), params.top_p))):
            return None
        ids, weights = ids[:count], weights[:count]
    kept = weights >= params.min_p
    ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def _descending(weights: NDArray[np.float32]) -> Ids:
    """The indices of positive weights in descending order, equal ones in ascending order of index.

    Numpy sorts integers about ten times as fast as it finds the order of floats. The bits of a positive float are in
    the order of the floats, so they are the upper half of a key, and the index is the lower half.
    """
    last = len(weights) - 1
    keys = weights.view(np.int32).astype(np.int64) << 32
    keys |= np.arange(last, -1, -1)
    keys.sort()
    return last - (keys[::-1] & 0xFFFFFFFF)
