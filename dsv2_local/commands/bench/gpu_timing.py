"""Times a model on GPUs: prefill, decoding, and the parts of a decoded token.

Decoding is the engine's own step (`runtime/gpu_step.py`), and chooses greedily; but the token that goes in is random,
so that the text does not fall into a loop, whose experts would all be cached. The KV cache is filled with random
latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from dsv2_local.commands.bench import timing
from dsv2_local.commands.bench.gpu_rates import seconds_of
from dsv2_local.commands.bench.replay import ReplayedRouting
from dsv2_local.commands.bench.timing import GREEDY, PrefillRun, Status
from dsv2_local.kernels import graphs, ops
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.offload.device import Device, typed_errors
from dsv2_local.offload.offloaded_experts import ExpertStats, OffloadedExperts
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.model import MLP, Block, MoE, Transformer
from dsv2_local.runtime.placement import PlacedModel
from dsv2_local.runtime.sampler import Sampler

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
    """

    tokens: int
    context: int
    seconds: float
    first_token_seconds: float = 0.0
    experts: ExpertStats | None = None


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
    fill(engine, context)
    decode_tokens(engine, min(WARM_UP_STEPS, steps), replay)
    engine.cache.truncate(context)
    status(f"decoding {steps} tokens at context {context:,}")
    before, start = stats(placed), perf_counter()
    decode_tokens(engine, steps, replay)
    seconds = perf_counter() - start
    return GpuRun(steps, context, seconds, experts=_since(placed, before))


def warm_up_slots(engine: Engine, replay: ReplayedRouting, tokens: int, status: Status) -> None:
    """Give the slots to the experts that a text uses: decode the first part of the trace."""
    status(f"decoding {tokens} tokens of the trace to warm the expert cache")
    for _ in range(tokens):
        fill(engine, 0)
        decode_tokens(engine, 1, replay)


def warm_up_length(trace_tokens: int) -> int:
    """How many tokens of a trace warm the slots: half of it at most, so that others are left to measure."""
    return min(TRACE_WARM_UP, trace_tokens // 2)


def decode_tokens(engine: Engine, steps: int, replay: ReplayedRouting | None) -> None:
    """Decode random tokens, each step as the engine runs it: launch, wait, choose."""
    sampler, vocab = Sampler(GREEDY, []), engine.model.config.vocab_size
    for token in torch.randint(vocab, (steps,)).tolist():
        if replay:
            replay.advance()
        with typed_errors():
            result = engine.step.launch([token], GREEDY)
        sampler.choose(result)


def fill(engine: Engine, context: int) -> None:
    """Begin a sequence of `context` random latents."""
    engine.cache.clear()
    engine.adopt([])
    with torch.inference_mode():
        timing.fill(engine.cache, context, engine.model.config)


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
    fill(engine, context)
    engine.cache.reserve(1)
    for name, launch in _launches(engine, isinstance(placed.experts, OffloadedExperts)).items():
        seconds[name] = _seconds_of_part(launch, placed.devices[-1], model)
    engine.cache.clear()
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


def _launches(engine: Engine, offloaded: bool) -> dict[str, Launch]:
    """The function of each part, which runs it in all layers, on the same input."""
    model, cache = engine.model, engine.cache
    config, first = model.config, model.layers[0].device
    x = torch.randn(1, config.hidden_size).to(first, model.dtype)
    rotation = model.rotation(cache.length, 1).to(first)
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
        return layer.self_attn.forward(inputs[0], inputs[1], cache)

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
