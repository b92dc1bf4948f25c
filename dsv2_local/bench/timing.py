"""Seconds of prefill, of decoding and of its parts.

Token ids and the cache's contents are drawn at random: speed does not depend on what a text says.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import harmonic_mean
from time import perf_counter
from typing import Any

import torch

from dsv2_local.bench import hardware
from dsv2_local.bench.hardware import Reader
from dsv2_local.cache import LatentCache
from dsv2_local.config import ModelConfig
from dsv2_local.engine import Engine, Stats
from dsv2_local.kernels import ops
from dsv2_local.model import MoE, Transformer
from dsv2_local.sampling import SamplingParams

WARM_UP_STEPS = 2  # of a burst of decoding: not counted
BURST = 8  # steps between two looks at memory
GREEDY = SamplingParams(temperature=0)
MATRIX_KERNELS = ("attention", "experts", "linear", "route", "swiglu")


class Progress:
    """What is being done, in one line on stderr if that is a terminal, wiped at the end.

    Nothing redraws it by itself: a spinner's thread would take its time from what is measured.
    """

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self("")

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()


@dataclass(frozen=True)
class PrefillRun:
    """Seconds from a prompt of `tokens` to its last logits, and to the token chosen from them."""

    tokens: int
    seconds: float
    first_token_seconds: float


def measure_prefill(engine: Engine, tokens: int, progress: Progress) -> PrefillRun:
    """The run of median time; a short prompt runs again until `hardware.FILLED_SECONDS` have passed."""
    runs = [prefill(engine, tokens, progress)]
    while sum(run.first_token_seconds for run in runs) < hardware.FILLED_SECONDS:
        runs.append(prefill(engine, tokens, progress))
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def prefill(engine: Engine, tokens: int, progress: Progress) -> PrefillRun:
    """One prompt of random tokens through the engine, from an empty cache."""
    engine.cache.truncate(0)
    prompt = torch.randint(engine.model.config.vocab_size, (tokens,)).tolist()
    stats, start = Stats(), perf_counter()
    next(engine.generate(prompt, GREEDY, stats, max_tokens=1, progress=partial(_prefill_progress, progress)))
    return PrefillRun(tokens, stats.prefill_seconds, perf_counter() - start)


def _prefill_progress(progress: Progress, done: int, tokens: int) -> None:
    progress(f"prefill of {tokens:,} tokens: {done:,} done")


@dataclass(frozen=True)
class DecodeRun:
    """`steps` decoded tokens after `context` tokens, and what memory gave meanwhile."""

    context: int
    steps: int
    seconds: float
    read_gb_s: float


def measure_decode(engine: Engine, context: int, steps: int, reader: Reader, progress: Progress) -> DecodeRun:
    """Decode in bursts, and read memory between them: a shared machine's bandwidth changes from second to second.

    Times are sums, in which slow steps count as they are felt; the steps that find their caches cold do not count.
    """
    fill(engine.cache, context, engine.model.config)
    seconds, reads = 0.0, []
    for begin in range(0, steps, BURST):
        reads.append(reader.gb_s())
        _warm_up(engine, min(WARM_UP_STEPS, steps - begin))
        seconds += _steps(engine, min(BURST, steps - begin), f"decode at context {context:,}", progress)
    return DecodeRun(context, steps, seconds, harmonic_mean(reads))


def _warm_up(engine: Engine, steps: int) -> None:
    """Steps that leave no trace but in the caches."""
    length = engine.cache.length
    for _ in range(steps):
        _step(engine)
    engine.cache.truncate(length)


def _steps(engine: Engine, steps: int, what: str, progress: Progress) -> float:
    seconds = 0.0
    for step in range(steps):
        progress(f"{what}: {step}/{steps} tokens")
        seconds += _step(engine)
    return seconds


def _step(engine: Engine) -> float:
    """Seconds to decode a random token: the model, its logits, and the likeliest of them."""
    ids = torch.randint(engine.model.config.vocab_size, (1,))
    start = perf_counter()
    hidden = engine.model.forward(ids, engine.cache)
    int(engine.model.logits(hidden).argmax())
    return perf_counter() - start


def fill(cache: LatentCache, tokens: int, config: ModelConfig) -> None:
    """Make the cache hold this many tokens that were never computed: numbers of rms 1, the same in every layer."""
    cache.truncate(0)
    latents = torch.randn(tokens, config.latent_dim)
    for layer in range(config.num_hidden_layers):
        cache.rows(layer, tokens)[:] = latents
    cache.advance(tokens)


class Stopwatch:
    """Seconds spent in callables, by name; of calls within one another under one name only the outermost counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: set[str] = set()

    @contextmanager
    def on(self, targets: list[tuple[Any, str, str]]) -> Iterator[None]:
        """Time the callables (owner, attribute, name) meanwhile, by putting others in their places."""
        before = [(owner, attribute, vars(owner).get(attribute)) for owner, attribute, _ in targets]
        try:
            for owner, attribute, name in targets:
                setattr(owner, attribute, self._timed(getattr(owner, attribute), name))
            yield
        finally:
            for owner, attribute, own in before:
                if own is None:  # it was the class's
                    vars(owner).pop(attribute, None)
                else:
                    setattr(owner, attribute, own)

    def _timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if name in self._running:
                return call(*args, **options)
            self._running.add(name)
            start = perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds[name] += perf_counter() - start
                self._running.discard(name)

        return timed


def measure_parts(engine: Engine, context: int, steps: int, progress: Progress) -> Stopwatch:
    """Where the time of decoding goes; apart from `measure_decode`, since taking times takes time itself."""
    fill(engine.cache, context, engine.model.config)
    watch = Stopwatch()
    with watch.on(_targets(engine.model)):
        watch.seconds["steps"] = _steps(engine, steps, "decode by part", progress)
    return watch


def _targets(model: Transformer) -> list[tuple[Any, str, str]]:
    """What to time of a model, by the names of `PARTS`, its layers by kind, and all matrix kernels as one."""
    targets: list[tuple[Any, str, str]] = [(ops, name, "kernels") for name in MATRIX_KERNELS]
    targets.append((model, "logits", "head"))
    holders = {}
    for layer in model.layers:
        targets.append((layer.self_attn, "forward", "attention"))
        targets.append((layer, "forward", layer_kind(isinstance(layer.mlp, MoE))))
        if not isinstance(layer.mlp, MoE):
            targets.append((layer.mlp, "forward", "dense"))
            continue
        holders[id(layer.mlp.routed_experts)] = layer.mlp.routed_experts
        if layer.mlp.shared_experts:
            targets.append((layer.mlp.shared_experts, "forward", "shared"))
    return targets + [(holder, "experts", "routed") for holder in holders.values()]


def layer_kind(moe: bool) -> str:
    return "mixture layers" if moe else "dense layers"
