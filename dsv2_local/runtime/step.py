"""What a decode step is, wherever it runs: `cpu_step.CpuStep` and `gpu_step.GpuStep` implement `Step`."""

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
from dsv2_local.runtime.sampling_params import SamplingParams

# Of the largest probability: less likely tokens are not among the top candidates that a GPU sends.
CANDIDATE_FLOOR = 1e-4


@dataclass(frozen=True)
class TopCandidates:
    """The likeliest tokens of a distribution, or all of them.

    Attributes:
        ids: int64 [n], ascending.
        values: their logits, fp32 [n].
        mass: Σ exp((logit - largest) / temperature) over the whole vocabulary; None where `values` has all of it.
        floor: every token with at least this fraction of the largest probability is among them.
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float32]
    mass: float | None = None
    floor: float = 0.0

    @classmethod
    def unpack(cls, packed: NDArray[np.int32]) -> "TopCandidates | None":
        """From a row of `kernels.ops.top_candidates` with the limits of `candidate_limits`; None if there are too many
        for it, or none."""
        count = int(packed[0])
        if not 0 < count <= MAX_CANDIDATES:
            return None
        ids, values = packed[3 : 3 + count], packed[3 + MAX_CANDIDATES : 3 + MAX_CANDIDATES + count].view(np.float32)
        order = ids.argsort()
        return cls(ids[order].astype(np.int64), values[order], float(packed[2:3].view(np.float32)[0]), CANDIDATE_FLOOR)


def candidate_limits(params: SamplingParams) -> tuple[float, float]:
    """The limits that `kernels.ops.top_candidates` takes."""
    if params.temperature == 0:
        return 1.0, 0.0
    return min(1 / params.temperature, 3e38), -math.log(CANDIDATE_FLOOR) * params.temperature


class StepResult:
    """The logits after a token and after each of its draft tokens, perhaps still being computed.

    Attributes:
        draft: the draft tokens that the step verifies.
        accepted: how many of them were chosen so far; `logits` and `candidates` follow the last of those.
        seconds: what the step took, once `wait` has returned.
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
        """A result that is there, or one that will be.

        Args:
            logits: fp32 [1 + draft tokens, vocab], on the device that computes them.
            draft: see above.
            seconds: what the step took, if it is done.
            packed: what `kernels.ops.top_candidates` told of the logits, in RAM; None where nobody asked.
            finish: waits for both tensors to be filled; returns the seconds. None: they are.
        """
        self.draft, self.accepted, self.seconds = list(draft), 0, seconds
        self._logits, self._packed, self._finish = logits, packed, finish
        self._candidates: list[TopCandidates | None] = []

    def wait(self) -> None:
        """Return when the step is done.

        Raises:
            DeviceError: it failed.
        """
        if self._finish:
            with typed_errors():
                self.seconds = self._finish()
            self._finish = None
        if self._packed is not None:
            self._candidates = [TopCandidates.unpack(row) for row in self._packed.numpy()]
            self._packed = None

    def logits(self) -> Tensor:
        """fp32 [vocab] in RAM. The next step may overwrite it, unless `detach` was called."""
        self.wait()
        with typed_errors():
            return self._logits[self.accepted].cpu()

    def candidates(self) -> TopCandidates | None:
        """The likeliest tokens; None where they were not sought, or are too many."""
        self.wait()
        return self._candidates[self.accepted] if self._candidates else None

    def accept(self, token: int) -> bool:
        """Take `token` for accepted if it is the next draft token; whether it is."""
        accepted = token in self.draft[self.accepted : self.accepted + 1]
        self.accepted += accepted
        return accepted

    def detach(self) -> None:
        """Wait, and copy what the next step would overwrite."""
        self.wait()
        with typed_errors():
            self._logits = self._logits.cpu().clone()


class Step(Protocol):
    """Runs a token after those in the cache through the model and its head, with draft tokens behind it."""

    @property
    def max_draft(self) -> int:
        """The most draft tokens that `launch` takes; 0 where drafts cannot be verified."""
        ...

    @property
    def asynchronous(self) -> bool:
        """Whether `launch` returns long before the step is done, without work for Python in between."""
        ...

    def launch(self, tokens: list[int], params: SamplingParams) -> StepResult:
        """Add a token and its draft tokens to the cache, and start to compute what follows each of them.

        The result's logits may be overwritten by the next step of as many tokens; `params` say which candidates matter.

        Raises:
            ContextLengthError: the cache is full.
        """
        ...

    def warm_up(self, progress: Progress) -> None:
        """Do before the first prompt what would make it wait; the cache is empty then and afterwards."""
        ...
