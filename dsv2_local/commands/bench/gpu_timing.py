"""Times a model on GPUs: prefill, decoding, and the parts of a decoded token.

Decoding is the engine's own step (`runtime/gpu_step.py`), and chooses greedily; but the token that goes in is random,
so that the text does not fall into a loop, whose experts would all be cached. The KV cache is filled with random
latents.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from dsv2_local.commands.bench import timing
from dsv2_local.commands.bench.gpu_rates import seconds_of
from dsv2_local.commands.bench.replay import ReplayedRouting
from dsv2_local.commands.bench.timing import BURST, GREEDY, PrefillRun, Status, filled, random_parts, take_back
from dsv2_local.kernels import graphs, ops
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.offload.device import Device, typed_errors
from dsv2_local.offload.offloaded_experts import ExpertStats, OffloadedExperts
from dsv2_local.runtime.batch import Batch
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.model import MLP, Block, MoE, Transformer
from dsv2_local.runtime.placement import PlacedModel
from dsv2_local.runtime.sampler import Sampler
from dsv2_local.runtime.sequence import Sequence

WARM_UP_STEPS = 3  # before each measurement of decoding
TRACE_WARM_UP = 96  # tokens of a trace at most: four half-lives of a use in the expert cache
PART_REPEATS = 10

Launch = Callable[[PiecewiseGraph | None], Tensor]
"""Runs the kernels of a part, or captures them."""


@dataclass(frozen=True)
class GpuRun:
    """What was measured, and what the routed experts did meanwhile.

    Attributes:
        tokens: tokens of the prompt, or tokens decoded.
        context: tokens in the KV cache before.
        seconds: of all tokens.
        first_token_seconds: of prefill: seconds to the token that follows.
        experts: the counters of these tokens; None if all experts are resident.
        sequences: how many were decoded in each step.
    """

    tokens: int
    context: int
    seconds: float
    first_token_seconds: float = 0.0
    experts: ExpertStats | None = None
    sequences: int = 1

    def plus(self, tokens: int, seconds: float, experts: ExpertStats | None) -> "GpuRun":
        """The same with more tokens."""
        both = self.experts + experts if self.experts and experts else experts
        return replace(self, tokens=self.tokens + tokens, seconds=self.seconds + seconds, experts=both)


def measure_prefill(engine: Engine, placed: PlacedModel, tokens: int, status: Status) -> GpuRun:
    """Measure the second of two prompts of the same length: the first one compiles and tunes kernels."""
    timing.prefill(engine, tokens, status)
    before = stats(placed)
    run: PrefillRun = timing.prefill(engine, tokens, status)
    return GpuRun(tokens, 0, run.seconds, run.first_token_seconds, _since(placed, before))


def measure_decode(
    engine: Engine, placed: PlacedModel, context: int, steps: int, replay: ReplayedRouting | None, status: Status
) -> GpuRun:
    """Decode `steps` tokens after `context` tokens."""
    with filled(engine, context) as sequences:
        decode_tokens(engine, sequences, min(WARM_UP_STEPS, steps), replay)
        take_back(sequences, context)
        status(f"decoding {steps} tokens at context {context:,}")
        before, start = stats(placed), perf_counter()
        decode_tokens(engine, sequences, steps, replay)
        seconds = perf_counter() - start
    return GpuRun(steps, context, seconds, experts=_since(placed, before))


def measure_parallel(
    engine: Engine, placed: PlacedModel, counts: Iterable[int], context: int, steps: int, status: Status
) -> list[GpuRun]:
    """Decode `steps` tokens of each of so many sequences in common steps, after `context` tokens.

    The numbers of sequences take turns, so that what slows the machine for a while slows all of them.
    """
    runs = {count: GpuRun(0, context, 0.0, sequences=count) for count in counts}
    with filled(engine, context, max(runs, default=0)) as sequences:
        for begin in range(0, steps, BURST):
            for count, run in runs.items():
                status(f"decoding {count} sequences at context {context:,}")
                some, burst = sequences[:count], min(BURST, steps - begin)
                decode_tokens(engine, some, min(WARM_UP_STEPS, burst), None)
                take_back(some, context)
                before, start = stats(placed), perf_counter()
                decode_tokens(engine, some, burst, None)
                seconds = perf_counter() - start
                runs[count] = run.plus(count * burst, seconds, _since(placed, before))
                take_back(some, context)
    return list(runs.values())


def warm_up_slots(engine: Engine, replay: ReplayedRouting, tokens: int, status: Status) -> None:
    """Give the slots to the experts that a text uses: decode the first part of the trace."""
    status(f"decoding {tokens} tokens of the trace to warm the expert cache")
    for _ in range(tokens):
        with filled(engine, 0) as sequences:
            decode_tokens(engine, sequences, 1, replay)


def warm_up_length(trace_tokens: int) -> int:
    """How many tokens of a trace warm the slots: half of it at most, so that others are left to measure."""
    return min(TRACE_WARM_UP, trace_tokens // 2)


def decode_tokens(engine: Engine, sequences: list[Sequence], steps: int, replay: ReplayedRouting | None) -> None:
    """Decode random tokens of these sequences, each step as the engine runs it: launch, wait, choose."""
    sampler, params = Sampler(GREEDY, []), [GREEDY] * len(sequences)
    for _ in range(steps):
        if replay:
            replay.advance()
        with typed_errors():
            results = engine.decode_step.launch(random_parts(sequences, engine.model.config), params)
        for result in results:
            sampler.choose(result)


def stats(placed: PlacedModel) -> ExpertStats | None:
    """The counters of offloaded experts since loading; None if all experts are resident."""
    return replace(placed.experts.stats) if isinstance(placed.experts, OffloadedExperts) else None


def _since(placed: PlacedModel, before: ExpertStats | None) -> ExpertStats | None:
    now = stats(placed)
    return now - before if now and before else None


@torch.inference_mode()
def measure_parts(engine: Engine, placed: PlacedModel, context: int) -> dict[str, float]:
    """Seconds of each part of a decoded token, summed over the layers: the part's kernels alone, captured and replayed.

    "routed" is there only if the experts are resident: else their time is not that of kernels alone.
    """
    model, seconds = engine.model, {}
    with filled(engine, context) as sequences:
        batch = model.new_batch(engine.cache, [1])
        batch.fill(random_parts(sequences, model.config))
        for name, launch in _launches(model, batch, isinstance(placed.experts, OffloadedExperts)).items():
            seconds[name] = _seconds_of_part(launch, placed.devices[-1], model)
    return seconds


def _seconds_of_part(launch: Launch, device: Device, model: Transformer) -> float:
    first = model.layers[0].device
    ops.use(first)
    launch(None)  # compiles and tunes what the steps before did not
    run: Callable[[], object] = partial(launch, None)
    if ops.capturable(first):
        ops.use(first)
        graph = PiecewiseGraph()
        graph.capture(partial(launch, graph))
        run = graph.replay
    return seconds_of(device, run, PART_REPEATS)


def _launches(model: Transformer, batch: Batch, offloaded: bool) -> dict[str, Launch]:
    """The function of each part, which runs it in all layers, on the same input."""
    config, first = model.config, model.layers[0].device
    x = torch.randn(1, config.hidden_size).to(first, model.dtype)
    rotation = batch.rotation.to(first)
    ids = torch.randperm(config.n_routed_experts)[: config.num_experts_per_tok][None].to(first)
    weights = torch.rand(ids.shape).to(first)

    def in_layers(layers: list[Block], work: Callable[[Block, tuple[Tensor, ...]], Tensor]) -> Launch:
        def launch(capture: PiecewiseGraph | None) -> Tensor:
            inputs: tuple[Tensor, ...] = (x, rotation, ids, weights)
            y = x
            for layer in layers:
                if inputs[0].device != layer.device:
                    ops.use(layer.device)
                    inputs = tuple(graphs.to_device(tensor, layer.device, capture) for tensor in inputs)
                y = work(layer, inputs)
            return y

        return launch

    def head(capture: PiecewiseGraph | None) -> Tensor:
        last = model.layers[-1].device
        ops.use(last)
        return model.head(graphs.to_device(x, last, capture))

    def shared(layer: Block, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(layer.mlp, MoE)
        assert layer.mlp.shared_experts
        return layer.mlp.shared_experts.forward(inputs[0])

    def router(layer: Block, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(layer.mlp, MoE)
        return ops.route(inputs[0], layer.mlp.gate, config)[1]

    def routed(layer: Block, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(layer.mlp, MoE)
        return layer.mlp.routed_experts.start(layer.mlp.layer, inputs[0], inputs[2], inputs[3])()

    def dense(layer: Block, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(layer.mlp, MLP)
        return layer.mlp.forward(inputs[0])

    def attention(layer: Block, inputs: tuple[Tensor, ...]) -> Tensor:
        return layer.self_attn.forward(inputs[0], inputs[1], batch)

    parts = {"attention": in_layers(model.layers, attention)}
    if plain := [layer for layer in model.layers if isinstance(layer.mlp, MLP)]:
        parts["dense"] = in_layers(plain, dense)
    if mixtures := [layer for layer in model.layers if isinstance(layer.mlp, MoE)]:
        parts["router"] = in_layers(mixtures, router)
        if config.n_shared_experts:
            parts["shared"] = in_layers(mixtures, shared)
        if not offloaded:
            parts["routed"] = in_layers(mixtures, routed)
    return {**parts, "head": head}
