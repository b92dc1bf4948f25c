"""The decode step on GPUs: launched as graphs, with one wait for the device, for the likeliest tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv2_local.cache import LatentCache
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import LIKELY
from dsv2_local.kernels.graphs import Graphs
from dsv2_local.lookup import GRAM
from dsv2_local.model import DecodeStep, Transformer
from dsv2_local.sampling import Likely, Outcome, Outcomes, SamplingParams, likely_limits

PROMPTS = (3, 12, 48, 200, 1000)  # tokens: one length for each set of kernels that some length needs
GUESSES = GRAM  # tokens that a step may check beside its own: as few as are ever guessed, since each length is captured


class GraphStep:
    """Tokens after those in the cache, through a model on GPUs and its head; see `model.DecodeStep`.

    The first run launches kernel by kernel, which compiles and tunes them, and is captured; the others are replays.
    A step of several tokens rounds differently from several steps.

    Attributes:
        recording: None; there are no native calls to be timed.
    """

    recording: None = None

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self._params = SamplingParams()
        self._limits = torch.tensor(likely_limits(self._params)).to(model.layers[-1].where)
        self._launches = {tokens: _Launch(model, cache, tokens, self._limits) for tokens in (1, 1 + GUESSES)}

    @property
    def ahead(self) -> bool:
        """Whether `begin` returns long before the GPU is done: what needs Python in between is done by then."""
        return self._launches[1].whole

    @property
    def guesses(self) -> int:
        """How many tokens `begin` takes beside the first, all or none."""
        return GUESSES if self._launches[1 + GUESSES].whole else 0

    def run(self, token: int) -> Tensor:
        """Add `token` to the cache -> fp32 logits [vocab_size].

        Raises:
            ContextLengthError: the cache is full.
        """
        ((outcome,), _) = self.begin([token], self._params)()
        return outcome.logits()

    @torch.inference_mode()
    def begin(self, tokens: list[int], params: SamplingParams) -> Outcomes:
        """Add tokens to the cache; the function that is returned waits for what comes after each.

        It is called once. All logits can be asked for until the next step of as many tokens begins, and the likeliest
        tokens are told as far as `params` need them.

        Raises:
            ContextLengthError: the cache is full.
        """
        self.cache.make_room(len(tokens))
        if params != self._params:
            self._params = params
            self._limits.copy_(torch.tensor(likely_limits(params)))
        outcomes = self._launches[len(tokens)].begin(tokens)
        self.cache.advance(len(tokens))
        return outcomes

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Compile and tune the kernels, and capture the steps, before the first prompt; the cache is empty then.

        Kernels are kept on disk, so that only the first time on a machine takes long. Prompts run through one layer of
        each kind, which is enough to compile for. `progress` is called with the prompts done and all of them.
        """
        cache, moe = self.cache, self.model.config.moe_layers
        layers = 1 + next(iter(moe), 0)  # the first of each kind among them
        for done, tokens in enumerate(PROMPTS):
            progress(done, len(PROMPTS))
            if tokens < cache.context:
                cache.make_room(tokens)
                x = self.model.embed(torch.zeros(tokens, dtype=torch.int64))
                self.model.through_layers(x, self.model.rotation(0, tokens), cache, layers)
        for _ in range(2):
            self.run(0)
        if self.ahead and cache.context > 2 + GUESSES:
            self.begin([0] * (1 + GUESSES), self._params)()
        cache.clear()
        progress(len(PROMPTS), len(PROMPTS))


class _Launch:
    """The step of so many tokens."""

    def __init__(self, model: Transformer, cache: LatentCache, tokens: int, limits: Tensor) -> None:
        self._model, self._cache, self._limits = model, cache, limits
        self._graphs: Graphs | None = None
        self._ids = torch.zeros(tokens, dtype=torch.int64)
        x, rotation = model.embed(self._ids).pin_memory(), model.rotation(0, tokens).pin_memory()
        where = model.layers[0].where
        self._host_inputs, self._inputs = (x, rotation), (x.to(where), rotation.to(where))
        self._logits, self._likely = torch.empty(0), torch.empty(0)  # where a replay leaves them
        self._host_likely = torch.empty(tokens, 3 + 2 * LIKELY, dtype=torch.int32, pin_memory=True)
        self._span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    @property
    def whole(self) -> bool:
        """Whether it is captured, without work of Python's in between."""
        return self._graphs is not None and self._graphs.whole

    def begin(self, tokens: list[int]) -> Outcomes:
        self._ids.copy_(torch.tensor(tokens))
        x, rotation = self._host_inputs
        x.copy_(self._model.embed(self._ids))
        rotation.copy_(self._model.rotation(self._cache.length, len(tokens)))
        stream = torch.cuda.current_stream(self._limits.device)
        begun, done = self._span
        begun.record(stream)
        for device_input, host_input in zip(self._inputs, self._host_inputs, strict=True):
            device_input.copy_(host_input, non_blocking=True)
        if self._graphs:
            self._graphs.replay()
            logits, likely = self._logits, self._likely
        else:
            likely = self._launch()
            logits = self._logits
        self._host_likely.copy_(likely, non_blocking=True)
        done.record(stream)
        if not self._graphs:
            graphs = Graphs()
            self._likely = graphs.capture(self._launch)
            self._graphs = graphs

        def outcomes() -> tuple[list[Outcome], float]:
            done.synchronize()
            told = map(Likely.unpack, self._host_likely.numpy())
            made = [Outcome(row.cpu, likely) for row, likely in zip(logits, told, strict=True)]
            return made, begun.elapsed_time(done) / 1000

        return outcomes

    def _launch(self) -> Tensor:
        """The step but for its inputs; leaves the logits, and returns the likeliest tokens."""
        self._logits = self._model.head(self._model.through_layers(*self._inputs, self._cache))
        return ops.likely(self._logits, self._limits)


def decode_step(model: Transformer, cache: LatentCache) -> DecodeStep | GraphStep:
    """What decodes for this model: graphs where all of it is on GPUs with Triton's kernels."""
    graphs = all(ops.capturable(layer.where) for layer in model.layers)
    return GraphStep(model, cache) if graphs else DecodeStep(model, cache)
