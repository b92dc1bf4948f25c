"""The decode step on the CPU: its kernel calls are recorded once, then replayed without Python."""

from collections.abc import Sequence
from contextlib import nullcontext
from time import perf_counter

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.cpu.recording import Recording
from dsv2_local.offload.sizes import RECORDED_ROWS
from dsv2_local.progress import Progress
from dsv2_local.runtime.batch import Part
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.prompt_lookup import MAX_DRAFT
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.step import StepResult


class CpuStep:
    """A `Step` that has ended when `launch` returns.

    The first step of so many sequences records the native kernels that it calls, and later ones replay these calls
    (`kernels/cpu/recording.py`), with bit-identical results. Steps of more than `RECORDED_ROWS` sequences take so long
    that Python's part is small. If some kernel of the step is not native, nothing is
    recorded and every step runs from Python. A step with draft tokens is not recorded.

    Attributes:
        asynchronous: False.
    """

    asynchronous = False
    drafts_together = True
    max_rows = 256

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self._steps: dict[int, RecordedStep] = {}  # by the number of sequences

    @property
    def recording(self) -> Recording | None:
        """The recorded kernel calls of one sequence; None before its first step, or if steps cannot be replayed."""
        return self._steps[1].recording if 1 in self._steps else None

    @property
    def max_draft(self) -> int:
        """See `Step`. Only native kernels give the same bits for several tokens in one step as one by one."""
        return MAX_DRAFT if any(step.recording for step in self._steps.values()) else 0

    def launch(self, parts: Sequence[Part], params: Sequence[SamplingParams]) -> list[StepResult]:
        """See `Step`."""
        start = perf_counter()
        logits = self.run(parts)
        seconds = perf_counter() - start
        if len(parts) == 1:
            return [StepResult(logits, parts[0][1][1:], seconds)]
        rows = logits.split([len(tokens) for _, tokens in parts])  # type: ignore[no-untyped-call]
        return [StepResult(own, tokens[1:], seconds) for (_, tokens), own in zip(parts, rows, strict=True)]

    def run(self, parts: Sequence[Part]) -> Tensor:
        """Run the tokens and append them to the cache -> fp32 logits [T, vocab_size]; the next call may overwrite them.

        Raises:
            ContextLengthError, CacheFullError: see `Step.launch`.
        """
        count = len(parts)
        if count <= RECORDED_ROWS and all(len(tokens) == 1 for _, tokens in parts):
            step = self._steps.get(count) or self._steps.setdefault(count, RecordedStep(self.model, self.cache, count))
            return step.run(parts)
        with torch.inference_mode():
            batch = self.model.new_batch(self.cache, [len(tokens) for _, tokens in parts], [1] * count)
            batch.fill(parts)
            logits = self.model.logits(self.model.layers_of(batch))
        batch.advance()
        return logits

    def warm_up(self, progress: Progress) -> None:
        """Nothing to do: the native kernels were compiled at installation."""


class RecordedStep:
    """The step of one token of each of `count` sequences."""

    def __init__(self, model: Transformer, cache: LatentCache, count: int) -> None:
        self.model = model
        self.recording: Recording | None = None
        self._batch = model.new_batch(cache, [1] * count)
        self._recordable = model.replayable
        self._logits = torch.empty(0)  # the tensor that a replay writes

    def run(self, parts: Sequence[Part]) -> Tensor:
        """See `CpuStep.run`."""
        self._batch.fill(parts)
        if self.recording:
            self.recording.replay()
        else:
            self._logits = self._record() if self._recordable else self._compute()
        self._batch.advance()
        return self._logits

    @torch.inference_mode()
    def _compute(self) -> Tensor:
        return self.model.logits(self.model.layers_of(self._batch))

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
