"""The interface of a decode step and its result; `cpu_step.CpuStep` and `gpu_step.GpuStep` implement it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsv2_local.kernels.format import MAX_CANDIDATES
from dsv2_local.offload.device import typed_errors
from dsv2_local.progress import Progress
from dsv2_local.runtime.batch import Part
from dsv2_local.runtime.sampling_params import SamplingParams

# Fraction of the largest probability: less likely tokens are not among the top candidates that a GPU returns.
CANDIDATE_FLOOR = 1e-4


@dataclass(frozen=True)
class TopCandidates:
    """The most likely tokens of a distribution, or all tokens.

    Attributes:
        ids: token ids, int64 [n], ascending.
        values: logits of these tokens, fp32 [n].
        mass: Σ exp((logit - largest logit) / temperature) over all tokens that may be chosen; None if `ids` has all of
            them.
        floor: every token with at least this fraction of the largest probability is included.
        doubt: by how much `mass` may be too large.
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float32]
    mass: float | None = None
    floor: float = 0.0
    doubt: float = 0.0

    @classmethod
    def unpack(cls, packed: NDArray[np.int32]) -> "TopCandidates | None":
        """Read a row of `kernels.ops.top_candidates` that was computed with the limits of `candidate_limits`.

        None if the row has no candidates, or there were more than it has room for.
        """
        count = int(packed[0])
        if not 0 < count <= MAX_CANDIDATES:
            return None
        ids, values = packed[3 : 3 + count], packed[3 + MAX_CANDIDATES : 3 + MAX_CANDIDATES + count].view(np.float32)
        order = ids.argsort()
        return cls(ids[order].astype(np.int64), values[order], float(packed[2:3].view(np.float32)[0]), CANDIDATE_FLOOR)


def candidate_limits(params: SamplingParams) -> tuple[float, float]:
    """The limits for `kernels.ops.top_candidates`: 1 / temperature, and how far below the largest a logit may be."""
    if params.temperature == 0:
        return 1.0, 0.0
    return min(1 / params.temperature, 3e38), -math.log(CANDIDATE_FLOOR) * params.temperature


class StepResult:
    """The logits after a token and after each of its draft tokens; the step may still be running.

    Attributes:
        draft: the draft tokens that the step verifies.
        accepted: number of draft tokens that the sampler chose so far; `logits` and `candidates` are those after the
            last of them.
        seconds: duration of the step; valid after `wait`.
    """

    def __init__(
        self,
        logits: Tensor,
        draft: Sequence[int] = (),
        seconds: float = 0.0,
        *,
        packed: Tensor | None = None,
        finish: Callable[[], float] | None = None,
    ) -> None:
        """A result that is complete, or one that `finish` completes.

        Args:
            logits: fp32 [1 + draft tokens, vocab], on the device that computes them.
            draft: the draft tokens.
            seconds: duration of the step, if it has ended.
            packed: result of `kernels.ops.top_candidates` for the logits, in RAM; None if it was not computed.
            finish: waits until both tensors are filled, and returns the duration in seconds; None: they are filled.
        """
        self.draft, self.accepted, self.seconds = list(draft), 0, seconds
        self._logits, self._packed, self._finish = logits, packed, finish
        self._candidates: list[TopCandidates | None] = []
        self._detached = False

    def wait(self) -> None:
        """Wait until the step has ended.

        Raises:
            DeviceError: the step failed on the GPU.
        """
        if self._finish:
            with typed_errors():
                self.seconds = self._finish()
            self._finish = None
        if self._packed is not None:
            self._candidates = [TopCandidates.unpack(row) for row in self._packed.numpy()]
            self._packed = None

    def logits(self) -> Tensor:
        """Logits after the last accepted token, fp32 [vocab] in RAM; the next step may overwrite them (`detach`)."""
        self.wait()
        if self._logits.is_cpu:
            return self._logits[self.accepted]
        with typed_errors():
            return self._logits[self.accepted].cpu()

    def candidates(self) -> TopCandidates | None:
        """Top candidates after the last accepted token; None if they were not computed, or are too many."""
        self.wait()
        return self._candidates[self.accepted] if self._candidates else None

    def accept(self, token: int) -> bool:
        """Accept `token` if it is the next draft token; returns whether it is."""
        accepted = token in self.draft[self.accepted : self.accepted + 1]
        self.accepted += accepted
        return accepted

    def drop_draft(self) -> None:
        """Forget the draft tokens that the sampler has not chosen."""
        del self.draft[self.accepted :]

    def detach(self) -> None:
        """Wait, and copy the logits, so that the next step does not overwrite them."""
        self.wait()
        if not self._detached:
            with typed_errors():
                self._logits = self._logits.cpu().clone()
            self._detached = True


class Step(Protocol):
    """Runs the next tokens of sequences through the model and its head, appending them to the KV cache.

    For each sequence that is one token, or a token and the draft tokens after it.
    """

    @property
    def max_draft(self) -> int:
        """Maximum number of draft tokens that `launch` takes; 0 if drafts cannot be verified."""
        ...

    @property
    def drafts_together(self) -> bool:
        """Whether several sequences of a step may have draft tokens, or one of several."""
        ...

    @property
    def max_rows(self) -> int:
        """Maximum number of sequences of a step."""
        ...

    @property
    def asynchronous(self) -> bool:
        """Whether `launch` returns long before the step ends, and the step needs no Python code meanwhile."""
        ...

    def launch(self, parts: Sequence[Part], params: Sequence[SamplingParams]) -> list[StepResult]:
        """Start the step of some sequences, and append the tokens to the cache.

        Args:
            parts: each sequence with its token, which may be followed by at most `max_draft` draft tokens.
            params: each sequence's sampling parameters, which determine the top candidates to return.

        Returns:
            The result of each sequence. The next step of the same number of tokens may overwrite their logits.

        Raises:
            ContextLengthError: a context is full.
            CacheFullError: there are not enough blocks.
        """
        ...

    def warm_up(self, progress: Progress) -> None:
        """Compile what the first prompt would otherwise wait for; the cache must be empty, and is empty afterwards."""
        ...
