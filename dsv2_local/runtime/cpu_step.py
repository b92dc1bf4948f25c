"""The decode step on the CPU: its kernel calls are recorded once, then replayed without Python."""

from contextlib import nullcontext
from time import perf_counter

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.cpu.recording import Recording
from dsv2_local.progress import Progress
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.prompt_lookup import MAX_DRAFT
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.step import StepResult


class CpuStep:
    """A `Step` that has ended when `launch` returns.

    The first step of one token records the native kernels that it calls, and later ones replay these calls
    (`kernels/cpu/recording.py`), with bit-identical results. If some kernel of the step is not native, nothing is
    recorded and every step runs from Python.

    Attributes:
        recording: the recorded kernel calls; None before the first step, or if steps cannot be replayed.
        asynchronous: False.
    """

    asynchronous = False

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self.recording: Recording | None = None
        self._recordable = model.replayable
        self._ids = torch.empty(1, dtype=torch.int64)
        self._rotation = torch.empty_like(model.rotation(0, 1))
        self._logits = torch.empty(0)  # the tensor that a replay writes

    @property
    def max_draft(self) -> int:
        """See `Step`. Only native kernels give the same bits for several tokens in one step as one by one."""
        return MAX_DRAFT if self.recording else 0

    def launch(self, tokens: list[int], params: SamplingParams) -> StepResult:
        """See `Step`."""
        start = perf_counter()
        if len(tokens) == len(self._ids):
            logits = self.run(tokens[0])[None]
        else:
            logits = self.model.logits(self.model.forward(torch.tensor(tokens), self.cache))
        return StepResult(logits, tokens[1:], perf_counter() - start)

    @torch.inference_mode()
    def run(self, token: int) -> Tensor:
        """Run one token and append it to the cache -> fp32 logits [vocab_size], which the next call may overwrite.

        Raises:
            ContextLengthError: the context is full.
        """
        self.cache.reserve(1)
        self._ids.fill_(token)
        self._rotation.copy_(self.model.rotation(self.cache.length, 1))
        if self.recording:
            self.recording.replay()
        else:
            self._logits = self._record() if self._recordable else self._compute()
        self.cache.advance(1)
        return self._logits

    def warm_up(self, progress: Progress) -> None:
        """Nothing to do: the native kernels were compiled at installation."""

    def _compute(self) -> Tensor:
        return self.model.logits(self.model.layers_of(self._ids, self._rotation, self.cache))[0]

    def _record(self) -> Tensor:
        recording = self.recording = ops.recording()
        try:
            with recording or nullcontext():
                logits = self._compute()
        except BaseException:  # the recording is incomplete: the next step records again
            self.recording = None
            raise
        self._recordable = recording is not None and recording.complete
        if not self._recordable:
            self.recording = None
        return logits
