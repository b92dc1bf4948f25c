"""The decode step on GPUs: captured in CUDA graphs, with one synchronization per step, for the top candidates."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import MAX_CANDIDATES
from dsv2_local.kernels.graphs import GraphMemory, PiecewiseGraph
from dsv2_local.offload.sizes import GRAPH_ROWS
from dsv2_local.progress import Progress
from dsv2_local.runtime.batch import Part
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.prompt_lookup import NGRAM
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.step import StepResult, candidate_limits

PROMPTS = (3, 12, 48, 200, 1000)  # warm-up prompt lengths in tokens: together they use every prefill kernel
DRAFT = NGRAM  # draft tokens per step: one length, the shortest ever proposed, since each length needs its own capture


class GpuStep:
    """A `Step` of a model on GPUs.

    The first step of each shape launches its kernels one by one, which compiles and tunes them, and is then captured;
    later steps are replays. The shapes are one token of each of `GRAPH_ROWS` sequences, and one sequence's token with
    `DRAFT` draft tokens. A step of another number of sequences is padded with copies of its last row, which choose the
    same experts, and write the same latents to the same place. Steps of different shapes round differently.
    """

    drafts_together = False
    max_rows = GRAPH_ROWS[-1]

    def __init__(self, model: Transformer, cache: LatentCache, prepared: int = 1) -> None:
        """The steps of a model; `warm_up` captures those of at most `prepared` sequences."""
        self.model, self.cache, self._prepared = model, cache, prepared
        self._memory = GraphMemory()
        self._steps: dict[tuple[int, int], CapturedStep] = {}  # by sequences, and tokens of each

    @property
    def asynchronous(self) -> bool:
        """See `Step`."""
        return any(step.fully_captured for step in self._steps.values())

    @property
    def max_draft(self) -> int:
        """See `Step`; other numbers of draft tokens than this are not verified."""
        step = self._steps.get((1, 1 + DRAFT))
        return DRAFT if step and step.fully_captured else 0

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Tensor:
        """Run the first token of each sequence and append it to the cache -> fp32 logits [B, vocab_size] in RAM.

        Raises:
            ContextLengthError, CacheFullError: see `Step.launch`.
        """
        results = self.launch([(sequence, tokens[:1]) for sequence, tokens in parts], [SamplingParams()] * len(parts))
        return torch.stack([result.logits() for result in results])

    @torch.inference_mode()
    def launch(self, parts: Sequence[Part], params: Sequence[SamplingParams]) -> list[StepResult]:
        """See `Step`. At most `max_rows` sequences."""
        verified = len(parts) == 1 and len(parts[0][1]) == 1 + DRAFT
        if not verified:
            parts = [(sequence, tokens[:1]) for sequence, tokens in parts]
        rows = next(rows for rows in GRAPH_ROWS if rows >= len(parts))
        return self._step(rows, 1 + DRAFT if verified else 1).launch(parts, params)

    def _step(self, rows: int, tokens: int) -> "CapturedStep":
        if (rows, tokens) not in self._steps:
            self._steps[rows, tokens] = CapturedStep(self.model, self.cache, rows, tokens, self._memory)
        return self._steps[rows, tokens]

    @torch.inference_mode()
    def warm_up(self, progress: Progress) -> None:
        """Compile and tune the kernels, and capture the steps.

        Triton caches compiled kernels on disk, so only the first time on a machine takes long. The warm-up prompts run
        through one layer of each kind, which is enough to compile every kernel. `progress` is called with (prompts
        done, number of prompts).
        """
        model, cache, moe = self.model, self.cache, self.model.config.moe_layers
        layers = 1 + next(iter(moe), 0)  # up to the first MoE layer, so one of each kind is among them
        for done, tokens in enumerate(PROMPTS):
            progress(done, len(PROMPTS))
            if tokens < cache.context:
                sequence, batch = cache.new_sequence(), model.new_batch(cache, [tokens])
                batch.fill([(sequence, [0] * tokens)])
                model.through_layers(model.embed(batch.ids), batch.rotation, batch, layers)
                sequence.release()
        # The largest first, so that the others find room in its memory.
        for rows in sorted({1, *(rows for rows in GRAPH_ROWS if rows < 2 * self._prepared)}, reverse=True):
            self._warm_up(rows, 1)
        if self.asynchronous and cache.context > 1 + DRAFT:
            self._warm_up(1, 1 + DRAFT)
        progress(len(PROMPTS), len(PROMPTS))

    def _warm_up(self, rows: int, tokens: int) -> None:
        """Run a step twice: the first time it is captured, the second time replayed."""
        sequence = self.cache.new_sequence()
        for _ in range(2):
            for result in self._step(rows, tokens).launch([(sequence, [0] * tokens)], [SamplingParams()]):
                result.wait()
            sequence.truncate(0)
        sequence.release()


class CapturedStep:
    """The captured step of one shape, with the tensors that its graphs read and write."""

    def __init__(self, model: Transformer, cache: LatentCache, rows: int, tokens: int, memory: GraphMemory) -> None:
        """The step of `tokens` tokens of each of `rows` sequences."""
        self._model, self._memory = model, memory
        self._batch = model.new_batch(cache, [tokens] * rows)
        self._graph: PiecewiseGraph | None = None
        self._capturable = True
        first, last = model.layers[0].device, model.layers[-1].device
        count = len(self._batch.ids)
        x, limits = model.embed(self._batch.ids).pin_memory(), torch.zeros(count, 2).pin_memory()
        self._host_x, self._host_limits = x, limits
        self._x, self._rotation, self._limits = x.to(first), self._batch.rotation.to(first), limits.to(last)
        self._params: list[SamplingParams] = []  # of `limits`
        self._logits, self._packed = torch.empty(0), torch.empty(0)  # the tensors that a replay writes
        self._host_packed = torch.empty(count, 3 + 2 * MAX_CANDIDATES, dtype=torch.int32, pin_memory=True)
        self._span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._running = False  # whether a step may still be reading the tensors in RAM

    @property
    def fully_captured(self) -> bool:
        """Whether the step is captured as a whole, with no Python code between its graphs."""
        return self._graph is not None and self._graph.fully_captured

    def launch(self, parts: Sequence[Part], params: Sequence[SamplingParams]) -> list[StepResult]:
        """See `Step`; at most as many sequences as the step has."""
        start, end = self._span
        if self._running:  # nobody waited for the result of the last step
            end.synchronize()
        stream = torch.cuda.current_stream(self._limits.device)
        padding = len(self._batch.counts) - len(parts)
        self._batch.fill([*parts, *[parts[-1]] * padding])
        self._host_x.copy_(self._model.embed(self._batch.ids))
        start.record(stream)
        self._x.copy_(self._host_x, non_blocking=True)
        self._rotation.copy_(self._batch.rotation, non_blocking=True)
        self._set_limits([*params, *[params[-1]] * padding])
        if self._graph:
            self._graph.replay()
            logits, packed = self._logits, self._packed
        else:
            packed = self._compute(None)
            logits = self._logits
        self._host_packed.copy_(packed, non_blocking=True)
        end.record(stream)
        self._running = True
        if not self._graph and self._capturable:
            self._capture()
        for sequence, tokens in parts:  # the rows that pad the step are not counted
            sequence.advance(len(tokens))
        return [
            StepResult(logits[rows], tokens[1:], packed=self._host_packed[rows], finish=self._finish)
            for (_, tokens), rows in zip(parts, self._batch.rows, strict=False)
        ]

    def _set_limits(self, params: list[SamplingParams]) -> None:
        """Bring each row's limits for `ops.top_candidates` to the device, if they have changed."""
        if params != self._params:
            limits = [
                candidate_limits(own)
                for own, rows in zip(params, self._batch.rows, strict=True)
                for _ in range(rows.stop - rows.start)
            ]
            self._host_limits.copy_(torch.tensor(limits))
            self._limits.copy_(self._host_limits, non_blocking=True)
            self._params = params

    def _finish(self) -> float:
        """Wait for the step; returns how long it took, in seconds."""
        start, end = self._span
        end.synchronize()
        self._running = False
        return float(start.elapsed_time(end)) / 1000

    def _capture(self) -> None:
        """Capture the step, unless there is too little memory for that: then its kernels are launched every time."""
        graph = PiecewiseGraph(self._memory)
        try:
            self._packed = graph.capture(partial(self._compute, graph))
            self._graph = graph
        except torch.cuda.OutOfMemoryError:
            self._capturable = False

    def _compute(self, capture: PiecewiseGraph | None) -> Tensor:
        """Run the step on its input tensors; stores the logits, and returns the packed top candidates."""
        x = self._model.through_layers(self._x, self._rotation, self._batch, capture=capture)
        self._logits = self._model.head(x)
        return ops.top_candidates(self._logits, self._limits)
