"""Measures decoding of several sequences in common steps: what a server or `dsv2 run --batch` gets from this machine.

A step reads the dense weights once for all its sequences, and each expert once that any of them uses. So the bytes per
step grow with the number of different experts, and the bytes per token fall.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import harmonic_mean, mean

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.commands.bench.hardware import Reader
from dsv2_local.commands.bench.timing import (
    BURST,
    WARM_UP_STEPS,
    Status,
    filled,
    random_parts,
    take_back,
    timed_steps,
    warm_up,
)
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.model import Experts, MoE, Transformer
from dsv2_local.runtime.sequence import Sequence

COUNTED_STEPS = 4  # steps in which the experts are counted


@dataclass(frozen=True)
class ParallelRun:
    """`steps` steps of `sequences` sequences after `context` tokens of each.

    Attributes:
        seconds: of all steps.
        read_gb_s: the memory bandwidth measured in between.
        experts: different experts that a layer used in a step, on average over MoE layers and steps; 0 without any.
    """

    sequences: int
    context: int
    steps: int
    seconds: float
    read_gb_s: float
    experts: float


def random_experts(config: ModelConfig, tokens: int) -> float:
    """How many different experts of a layer are expected if each token chooses K of E at random."""
    if not config.moe_layers:
        return 0.0
    E, K = config.n_routed_experts, config.num_experts_per_tok
    return E * (1 - (1 - K / E) ** tokens)


def measure_parallel(
    engine: Engine, counts: Iterable[int], context: int, steps: int, reader: Reader, status: Status
) -> list[ParallelRun]:
    """Decode random tokens of so many sequences in common steps, in bursts with measurements of the bandwidth between.

    The numbers of sequences take turns, so that what slows the machine for a while slows all of them. The tokens of a
    burst are taken back after it.
    """
    step, counts = CpuStep(engine.model, engine.cache), list(counts)
    seconds, reads = dict.fromkeys(counts, 0.0), []
    with filled(engine, context, max(counts, default=0)) as sequences:
        for begin in range(0, steps, BURST):
            reads.append(reader.gb_s())
            for count in counts:
                some = sequences[:count]
                warm_up(step, some, min(WARM_UP_STEPS, steps - begin))
                what = f"{count} sequences at context {context:,}"
                seconds[count] += timed_steps(step, some, min(BURST, steps - begin), what, status)
                take_back(some, context)
        used = {count: _used_experts(engine, sequences[:count]) for count in counts}
    return [ParallelRun(count, context, steps, seconds[count], harmonic_mean(reads), used[count]) for count in counts]


def _used_experts(engine: Engine, sequences: list[Sequence]) -> float:
    """Different experts of a layer in a step of random tokens, on average."""
    context = sequences[0].length
    with _watched(engine.model) as used:
        for _ in range(COUNTED_STEPS):
            engine.model.forward(engine.cache, random_parts(sequences, engine.model.config))
            take_back(sequences, context)
    return mean(used) if used else 0.0


class _Counting:
    """Experts that note how many different ones each call uses."""

    replayable = False

    def __init__(self, experts: Experts, used: list[int]) -> None:
        self._experts, self._used = experts, used

    def start(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, capture: PiecewiseGraph | None = None
    ) -> Callable[[], Tensor]:
        self._used.append(len(torch.unique(ids)))
        return self._experts.start(layer, x, ids, weights, capture)


@contextmanager
def _watched(model: Transformer) -> Iterator[list[int]]:
    """The number of different experts of each call within this context."""
    used: list[int] = []
    mixtures = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]
    before = [moe.routed_experts for moe in mixtures]
    try:
        for moe in mixtures:
            moe.routed_experts = _Counting(moe.routed_experts, used)
        yield used
    finally:
        for moe, experts in zip(mixtures, before, strict=True):
            moe.routed_experts = experts
