"""Measures the time of prefill, of decoding, and of the parts of a decode step.

Token ids and the contents of the KV cache are random, since the speed does not depend on them.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import harmonic_mean
from time import perf_counter
from typing import Any

import torch

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.commands.bench import hardware
from dsv2_local.commands.bench.hardware import Reader
from dsv2_local.kernels import ops
from dsv2_local.kernels.latents import write_rows
from dsv2_local.runtime.answer import Request
from dsv2_local.runtime.batch import Part
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.model import MoE, Transformer
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.sequence import Sequence
from dsv2_local.runtime.stats import Stats

WARM_UP_STEPS = 2  # at the start of each burst of decoding; not measured
BURST = 8  # decode steps between two measurements of memory bandwidth
FILLED_ROWS = 4096  # tokens of the KV cache that are filled at a time
GREEDY = SamplingParams(temperature=0)
MATRIX_KERNELS = ("attention", "experts", "linear", "route", "swiglu")


Status = Callable[[str], object]
"""Shows what is being done."""


class StatusLine:
    """A line on stderr, if that is a terminal, that shows what is being done and disappears at the end.

    It is not animated, since a spinner's thread would take time from what is measured.
    """

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *error: object) -> None:
        self("")

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()


@dataclass(frozen=True)
class PrefillRun:
    """A prefill of `tokens` tokens: seconds to the logits after the last one, and to the token chosen from them."""

    tokens: int
    seconds: float
    first_token_seconds: float


def measure_prefill(engine: Engine, tokens: int, status: Status) -> PrefillRun:
    """Measure a prefill, repeated until `hardware.FILLED_SECONDS` have passed; returns the run of median time."""
    runs = [prefill(engine, tokens, status)]
    while sum(run.first_token_seconds for run in runs) < hardware.FILLED_SECONDS:
        runs.append(prefill(engine, tokens, status))
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def prefill(engine: Engine, tokens: int, status: Status) -> PrefillRun:
    """Prefill one prompt of random tokens from an empty cache."""
    engine.clear()
    prompt = torch.randint(engine.model.config.vocab_size, (tokens,)).tolist()
    stats, start = Stats(), perf_counter()
    request = Request(prompt, GREEDY, max_tokens=1)
    next(engine.generate(request, stats, partial(_prefill_status, status)))
    return PrefillRun(tokens, stats.prefill_seconds, perf_counter() - start)


def _prefill_status(status: Status, done: int, tokens: int) -> None:
    status(f"prefill of {tokens:,} tokens: {done:,} done")


@dataclass(frozen=True)
class DecodeRun:
    """`steps` tokens decoded after `context` tokens: their seconds, and the memory bandwidth measured in between."""

    context: int
    steps: int
    seconds: float
    read_gb_s: float


def measure_decode(engine: Engine, context: int, steps: int, reader: Reader, status: Status) -> DecodeRun:
    """Decode in bursts, and measure the memory bandwidth between them, since on a shared machine it varies constantly.

    Times are summed over all steps, so that slow steps count in full; warm-up steps after each pass over memory do not.
    """
    step = CpuStep(engine.model, engine.cache)
    seconds, reads = 0.0, []
    with filled(engine, context) as sequences:
        for begin in range(0, steps, BURST):
            reads.append(reader.gb_s())
            warm_up(step, sequences, min(WARM_UP_STEPS, steps - begin))
            seconds += timed_steps(step, sequences, min(BURST, steps - begin), f"decode at context {context:,}", status)
    return DecodeRun(context, steps, seconds, harmonic_mean(reads))


def warm_up(step: CpuStep, sequences: list[Sequence], steps: int) -> None:
    """Run steps that only warm the CPU's caches, and take their tokens back; the sequences have the same length."""
    context = sequences[0].length
    for _ in range(steps):
        _timed(step, sequences)
    take_back(sequences, context)


def timed_steps(step: CpuStep, sequences: list[Sequence], steps: int, what: str, status: Status) -> float:
    """Seconds to decode `steps` random tokens of each sequence."""
    seconds = 0.0
    for done in range(steps):
        status(f"{what}: {done}/{steps} steps")
        seconds += _timed(step, sequences)
    return seconds


def _timed(step: CpuStep, sequences: list[Sequence]) -> float:
    """Seconds to decode a random token of each sequence: the model, its logits, and finding the largest."""
    parts = random_parts(sequences, step.model.config)
    start = perf_counter()
    step.run(parts).argmax(1).tolist()
    return perf_counter() - start


def random_parts(sequences: list[Sequence], config: ModelConfig) -> list[Part]:
    """A random token for each sequence."""
    tokens = torch.randint(config.vocab_size, (len(sequences),)).tolist()
    return [(sequence, [token]) for sequence, token in zip(sequences, tokens, strict=True)]


def take_back(sequences: Iterable[Sequence], context: int) -> None:
    """Take back all tokens but the first `context`."""
    for sequence in sequences:
        sequence.truncate(context)


@contextmanager
def filled(engine: Engine, context: int, count: int = 1) -> Iterator[list[Sequence]]:
    """Sequences of `context` random latents of rms 1, the same in every layer; their blocks are given back at the end.

    The prefix cache is emptied.
    """
    engine.clear()
    sequences = [engine.cache.new_sequence() for _ in range(count)]
    try:
        for sequence in sequences:
            _fill(engine.cache, sequence, context, engine.model.config)
        yield sequences
    finally:
        for sequence in sequences:
            sequence.release()


@torch.inference_mode()
def _fill(cache: LatentCache, sequence: Sequence, tokens: int, config: ModelConfig) -> None:
    sequence.reserve(tokens)
    for start in range(0, tokens, FILLED_ROWS):
        latents = torch.randn(min(FILLED_ROWS, tokens - start), config.latent_dim)
        table = torch.from_numpy(sequence.block_table)
        devices = {layer.device for layer in cache.layers}
        on = {device: (table.to(device), latents.to(device)) for device in devices}
        for layer in cache.layers:
            write_rows(layer, *on[layer.device], config.kv_lora_rank)
        sequence.advance(len(latents))


class Stopwatch:
    """Reads a clock before and after calls of watched functions.

    Attributes:
        spans: (name, start, end) of every call. Of nested calls with the same name only the outermost counts.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.spans: list[tuple[str, float, float]] = []
        self._clock = clock
        self._running: set[str] = set()

    @contextmanager
    def on(self, targets: list[tuple[Any, str, str]]) -> Iterator[None]:
        """Watch functions, each given as (owner, attribute, name), by replacing them within this context."""
        before = [(owner, attribute, vars(owner).get(attribute)) for owner, attribute, _ in targets]
        try:
            for owner, attribute, name in targets:
                setattr(owner, attribute, self._watched(getattr(owner, attribute), name))
            yield
        finally:
            for owner, attribute, own in before:
                if own is None:  # the attribute is inherited from the class
                    vars(owner).pop(attribute, None)
                else:
                    setattr(owner, attribute, own)

    def _watched(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            if name in self._running:
                return call(*args, **options)
            self._running.add(name)
            start = self._clock()
            try:
                return call(*args, **options)
            finally:
                self.spans.append((name, start, self._clock()))
                self._running.discard(name)

        return watched


def measure_parts(engine: Engine, context: int, steps: int, status: Status) -> dict[str, float]:
    """Decode `steps` tokens; returns the seconds of each part, and of everything as "steps".

    A replayed step calls no Python functions that could be watched. Instead its recording is watched, with a clock that
    counts recorded kernel calls; then the replays measure the time of each call.
    """
    step = CpuStep(engine.model, engine.cache)
    watch = Stopwatch(lambda: len(step.recording.names) if step.recording else perf_counter())
    with filled(engine, context) as sequences:
        with watch.on(_targets(engine.model)):
            warm_up(step, sequences, 1)  # records the step, if it can be replayed
            if not step.recording:
                watch.spans.clear()
                whole = timed_steps(step, sequences, steps, "decode by part", status)
        if step.recording:
            taken = step.recording.take_times()
            whole = timed_steps(step, sequences, steps, "decode by part", status)
    spans = watch.spans
    if step.recording:
        clock = [0.0, *accumulate(taken)]
        spans = [(name, clock[int(start)], clock[int(end)]) for name, start, end in spans]
    seconds = defaultdict(float, steps=whole)
    for name, start, end in spans:
        seconds[name] += end - start
    return seconds


def _targets(model: Transformer) -> list[tuple[Any, str, str]]:
    """The functions to watch: the parts of `report.PARTS`, whole layers by kind, and all matrix kernels together."""
    targets: list[tuple[Any, str, str]] = [(ops, name, "kernels") for name in MATRIX_KERNELS]
    targets.append((model, "logits", "head"))
    experts = {}  # by identity, since layers may share one object
    for layer in model.layers:
        targets.append((layer.self_attn, "forward", "attention"))
        kind = layer_kind(isinstance(layer.mlp, MoE))
        targets += [(layer, half, kind) for half in ("attend", "feed_forward")]
        if not isinstance(layer.mlp, MoE):
            targets.append((layer.mlp, "forward", "dense"))
            continue
        experts[id(layer.mlp.routed_experts)] = layer.mlp.routed_experts
        if layer.mlp.shared_experts:
            targets.append((layer.mlp.shared_experts, "forward", "shared"))
    return targets + [(owner, "experts", "routed") for owner in experts.values()]


def layer_kind(moe: bool) -> str:
    return "mixture layers" if moe else "dense layers"
