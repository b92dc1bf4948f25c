"""The decode step on GPUs: captured in CUDA graphs, with one synchronization per step, for the top candidates."""

from functools import partial

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import MAX_CANDIDATES
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.progress import Progress
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.prompt_lookup import NGRAM
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.step import StepResult, candidate_limits

PROMPTS = (3, 12, 48, 200, 1000)  # warm-up prompt lengths in tokens: together they use every prefill kernel
DRAFT = NGRAM  # draft tokens per step: one length, the shortest ever proposed, since each length needs its own capture


class GpuStep:
    """A `Step` of a model on GPUs.

    The first step of each length launches its kernels one by one, which compiles and tunes them, and is then captured;
    later steps are replays. Verifying a draft rounds differently from single steps.
    """

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self._params = SamplingParams()
        self._limits = torch.tensor(candidate_limits(self._params)).to(model.layers[-1].device)
        self._steps = {tokens: _CapturedStep(model, cache, tokens, self._limits) for tokens in (1, 1 + DRAFT)}

    @property
    def asynchronous(self) -> bool:
        """See `Step`."""
        return self._steps[1].fully_captured

    @property
    def max_draft(self) -> int:
        """See `Step`; `launch` takes this number of draft tokens, or none."""
        return DRAFT if self._steps[1 + DRAFT].fully_captured else 0

    def run(self, token: int) -> Tensor:
        """Run one token and append it to the cache -> fp32 logits [vocab_size] in RAM.

        Raises:
            ContextLengthError: the context is full.
        """
        return self.launch([token], self._params).logits()

    @torch.inference_mode()
    def launch(self, tokens: list[int], params: SamplingParams) -> StepResult:
        """See `Step`."""
        self.cache.reserve(len(tokens))
        if params != self._params:
            self._params = params
            self._limits.copy_(torch.tensor(candidate_limits(params)))
        result = self._steps[len(tokens)].launch(tokens)
        self.cache.advance(len(tokens))
        return result

    @torch.inference_mode()
    def warm_up(self, progress: Progress) -> None:
        """Compile and tune the kernels, and capture the steps.

        Triton caches compiled kernels on disk, so only the first time on a machine takes long. The warm-up prompts run
        through one layer of each kind, which is enough to compile every kernel. `progress` is called with (prompts
        done, number of prompts).
        """
        cache, moe = self.cache, self.model.config.moe_layers
        layers = 1 + next(iter(moe), 0)  # up to the first MoE layer, so one of each kind is among them
        for done, tokens in enumerate(PROMPTS):
            progress(done, len(PROMPTS))
            if tokens < cache.context:
                cache.reserve(tokens)
                x = self.model.embed(torch.zeros(tokens, dtype=torch.int64))
                self.model.through_layers(x, self.model.rotation(0, tokens), cache, layers)
        for _ in range(2):
            self.run(0)
        if self.asynchronous and cache.context > 2 + DRAFT:
            self.launch([0] * (1 + DRAFT), self._params).wait()
        cache.clear()
        progress(len(PROMPTS), len(PROMPTS))


class _CapturedStep:
    """The captured step for one number of tokens, with the tensors that its graphs read and write."""

    def __init__(self, model: Transformer, cache: LatentCache, tokens: int, limits: Tensor) -> None:
        self._model, self._cache, self._limits = model, cache, limits
        self._graph: PiecewiseGraph | None = None
        self._ids = torch.zeros(tokens, dtype=torch.int64)
        x, rotation = model.embed(self._ids).pin_memory(), model.rotation(0, tokens).pin_memory()
        device = model.layers[0].device
        self._host_inputs, self._inputs = (x, rotation), (x.to(device), rotation.to(device))
        self._logits, self._packed = torch.empty(0), torch.empty(0)  # the tensors that a replay writes
        self._host_packed = torch.empty(tokens, 3 + 2 * MAX_CANDIDATES, dtype=torch.int32, pin_memory=True)
        self._span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    @property
    def fully_captured(self) -> bool:
        """Whether the step is captured as a whole, with no Python code between its graphs."""
        return self._graph is not None and self._graph.fully_captured

    def launch(self, tokens: list[int]) -> StepResult:
        self._ids.copy_(torch.tensor(tokens))
        x, rotation = self._host_inputs
        x.copy_(self._model.embed(self._ids))
        rotation.copy_(self._model.rotation(self._cache.length, len(tokens)))
        stream = torch.cuda.current_stream(self._limits.device)
        start, end = self._span
        start.record(stream)
        for device_input, host_input in zip(self._inputs, self._host_inputs, strict=True):
            device_input.copy_(host_input, non_blocking=True)
        if self._graph:
            self._graph.replay()
            logits, packed = self._logits, self._packed
        else:
            packed = self._compute(None)
            logits = self._logits
        self._host_packed.copy_(packed, non_blocking=True)
        end.record(stream)
        if not self._graph:
            graph = PiecewiseGraph()
            self._packed = graph.capture(partial(self._compute, graph))
            self._graph = graph

        def finish() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000

        return StepResult(logits, tokens[1:], packed=self._host_packed, finish=finish)

    def _compute(self, capture: PiecewiseGraph | None) -> Tensor:
        """Run the step on its input tensors; stores the logits, and returns the packed top candidates."""
        x = self._model.through_layers(*self._inputs, self._cache, capture=capture)
        self._logits = self._model.head(x)
        return ops.top_candidates(self._logits, self._limits)
