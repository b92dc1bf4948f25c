"""`dsv2 bench`: how fast this machine runs a model, beside how fast the machine is.

Decoding a token reads every active weight once, so reading memory bounds it; prefill uses a weight for many tokens,
so arithmetic bounds it. Both bounds are measured in the same run, with the same threads. Token ids and the cache's
contents are drawn at random: speed does not depend on what a text says.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dsv2_local import llm, random_weights
from dsv2_local.cache import LatentCache
from dsv2_local.config import ModelConfig
from dsv2_local.console import notice
from dsv2_local.engine import PREFILL_CHUNK, Engine, Stats
from dsv2_local.errors import InputError
from dsv2_local.inspection import KindSummary, human, summarise
from dsv2_local.kernels import cpu, ops
from dsv2_local.kernels.layout import ROWS, Matrix, matrix_nbytes
from dsv2_local.machine import choose_threads, memory_available
from dsv2_local.model import MoE, Transformer
from dsv2_local.offload.store import MappedExperts
from dsv2_local.quant import hub
from dsv2_local.quant.checkpoint import Manifest
from dsv2_local.quant.schema import Kind, Recipe, expert_layout
from dsv2_local.sampling import SamplingParams

PROMPTS, CONTEXTS = (128, 512), (0, 4_096, 32_768)
DTYPE = llm.DTYPES["auto"]
WARM_UP_TOKENS = 32  # of prefill, where weights lie in memory
WARM_UP_STEPS = 3  # of decode: not counted
FILLED_SECONDS = 1.0  # what takes less is repeated until it took this
WORKING_BYTES = 1 << 30  # room to compute beside weights and cache
READ_BYTES = 1 << 30
MATMUL_SIZE = 2048
PARTS = ("attention", "dense", "shared", "routed", "head")
GREEDY = SamplingParams(temperature=0)
MATRIX_KERNELS = ("attention", "experts", "linear", "route", "swiglu")


@dataclass(frozen=True)
class Request:
    """The command's options as they were given; None where one was not."""

    model: str | None = None
    random_weights: str | None = None
    layers: int | None = None
    prompt: str | None = None
    decode: int = 32
    context: str | None = None
    threads: int | None = None
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        """Raises InputError for options out of range or that contradict each other."""
        if self.model is not None and self.random_weights is not None:
            raise InputError("-m measures a converted model and --random-weights makes one; drop one of them")
        if self.recipe is not None and self.random_weights is None:
            raise InputError("--recipe belongs to --random-weights; a converted model has its own")
        if self.decode < 1:
            raise InputError(f"--decode must be at least 1, not {self.decode}")
        choose_threads(self.threads)  # refuses what is no number of threads


@dataclass(frozen=True)
class Lengths:
    """Tokens of each prompt, tokens in the cache before each decode, and tokens decoded there."""

    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    decode: int

    @property
    def cache(self) -> int:
        """Tokens that the cache must hold; the engine keeps room for one after a prompt."""
        return max(max(self.contexts) + self.decode, *(length + 1 for length in (*self.prompts, 1)))


@dataclass(frozen=True)
class Plan:
    """What will be measured. `whole` is the architecture before --layers cut it; no directory means random weights."""

    request: Request
    directory: Path | None
    whole: ModelConfig
    config: ModelConfig
    recipe: Recipe
    lengths: Lengths
    read_bytes: int

    @property
    def warm_up_tokens(self) -> int:
        """A prompt that does not count: a short one wakes the threads, a chunk touches nearly all of a mapped file."""
        return min(PREFILL_CHUNK if self.directory else WARM_UP_TOKENS, self.config.max_position_embeddings - 1)


@dataclass(frozen=True)
class Subject:
    """The model that is measured, with the sums of its tensors by kind."""

    name: str
    recipe: Recipe
    model: Transformer
    kinds: dict[Kind, KindSummary]

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def weight_bytes(self) -> int:
        return sum(kind.bytes for kind in self.kinds.values())

    @property
    def active_weights(self) -> int:
        """Weights that take part in computing a token: all but the embedding and the experts not chosen."""
        c = self.config
        every = sum(kind.parameters for kind in self._every_token())
        return every + self._chosen * 3 * c.hidden_size * c.moe_intermediate_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding a token reads: those of `active_weights`, and one row of the embedding."""
        c = self.config
        row = matrix_nbytes(self.recipe.format_of(Kind.EMBEDDING), ROWS, c.hidden_size) // ROWS
        every = sum(kind.bytes for kind in self._every_token())
        return every + row + self._chosen * expert_layout(c, self.recipe).nbytes

    @property
    def _chosen(self) -> int:
        """Routed experts that a token takes, over all layers."""
        return self.config.num_experts_per_tok * len(self.config.moe_layers)

    def _every_token(self) -> list[KindSummary]:
        """The kinds of which every token reads all; an embedding that is also the head is one of them."""
        partly = (Kind.ROUTED,) if self.config.tie_word_embeddings else (Kind.ROUTED, Kind.EMBEDDING)
        return [summary for kind, summary in self.kinds.items() if kind not in partly]


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


def run(request: Request, as_json: bool) -> None:
    """Measure, and print the result on stdout.

    Raises:
        Dsv2Error: any of its kinds; InputError for what the model or this machine's memory has no room for.
    """
    with Progress() as progress:
        result = measure(plan(request), progress)
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        show(result)
    sys.stdout.flush()


def plan(request: Request) -> Plan:
    """Settle what will be measured, and refuse what cannot be, before anything large is made."""
    directory, whole = _architecture(request)
    config = whole if request.layers is None else random_weights.first_layers(whole, request.layers)
    recipe = Manifest.load(directory).recipe if directory else request.recipe or Recipe.NF4
    lengths = _lengths(request, config.max_position_embeddings)
    read_bytes = max(READ_BYTES, 4 * last_level_cache_bytes())
    if directory is None:
        dtype, other = _cache_dtype(recipe), read_bytes + WORKING_BYTES
        random_weights.require_memory(config, recipe, context=lengths.cache, dtype=dtype, other=other)
    return Plan(request, directory, whole, config, recipe, lengths, read_bytes)


def _cache_dtype(recipe: Recipe) -> torch.dtype:
    """The type that the cache of a model of this recipe will have, asked with a matrix of no size."""
    return ops.cache_dtype(Matrix(recipe.format_of(Kind.KV_B), 0, 0, torch.empty(0)), DTYPE)


def _architecture(request: Request) -> tuple[Path | None, ModelConfig]:
    """The directory of the model that was asked for (None: random weights) and its configuration."""
    if request.random_weights is not None:
        return None, random_weights.read_config(request.random_weights)
    if request.model is None:
        notice("measuring the bundled dsv2-nano; choose another model with -m or --random-weights")
    directory = llm.bundled_model() if request.model is None else hub.resolve_converted(request.model)
    return directory, ModelConfig.load(directory)


def _lengths(request: Request, limit: int) -> Lengths:
    """The lengths asked for, or those of the defaults that fit in `limit` tokens."""
    if request.decode > limit:
        raise InputError(f"--decode {request.decode:,} is more than the model's context of {limit:,} tokens")
    prompts = _fitting("--prompt", request.prompt, PROMPTS, 1, limit - 1, limit)
    contexts = _fitting("--context", request.context, CONTEXTS, 0, limit - request.decode, limit)
    return Lengths(prompts, contexts, request.decode)


def _fitting(
    option: str, given: str | None, default: tuple[int, ...], least: int, most: int, limit: int
) -> tuple[int, ...]:
    """Lengths between `least` and `most`: all that were given, or InputError; of the default those that fit."""
    lengths = default if given is None else _numbers(option, given)
    wrong = [length for length in lengths if not least <= length <= most]
    if not wrong:
        return lengths
    shown = ", ".join(f"{length:,}" for length in wrong)
    if given is not None:
        raise InputError(
            f"{option} must lie between {least} and {most:,} in a context of {limit:,} tokens, not {shown}"
        )
    notice(f"left out {option} {shown}: the model's context is {limit:,} tokens")
    return tuple(length for length in lengths if length not in wrong)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} must be whole numbers with commas between, not {text!r}") from None


def measure(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Everything that the command tells, as plain values: the object that --json prints."""
    threads = _set_threads(plan)
    progress("measuring the machine")
    read, matmul = read_bandwidth(plan.read_bytes, threads), matmul_rate(threads)
    forget_peak()
    subject = _load(plan, plan.directory) if plan.directory else _make(plan, threads, progress)
    _warn_of_caches(plan, subject)
    engine = Engine(subject.model, max(plan.lengths.cache, plan.warm_up_tokens + 1))
    _prefill(engine, plan.warm_up_tokens, progress)
    prefill = [measure_prefill(engine, tokens, progress) for tokens in plan.lengths.prompts]
    steps, contexts = plan.lengths.decode, plan.lengths.contexts
    decode = [measure_decode(engine, context, steps, progress) for context in contexts]
    watch = measure_parts(engine, contexts[0], steps, progress)
    peak = peak_bytes()
    progress("measuring the machine again")
    read = max(read, read_bandwidth(plan.read_bytes, threads))
    return {
        "machine": {"read_gb_s": read, "matmul_gflops": matmul, "threads": threads, "kernels": ops.variant()},
        "model": _model_facts(subject),
        "prefill": [_prefill_facts(run, subject) for run in prefill],
        "decode": [_decode_facts(*run, steps, subject, read) for run in zip(contexts, decode, strict=True)],
        "parts": _part_facts(watch, steps),
        "peak_rss_bytes": peak,
        "weight_bytes": subject.weight_bytes,
        **_cut_facts(plan, decode[0], watch),
    }


def _set_threads(plan: Plan) -> int:
    threads = ops.set_threads(plan.request.threads, plan.recipe.format_of(Kind.ROUTED))
    for warning in (threads.warning, ops.slow_notice()):
        if warning:
            notice(warning)
    return threads.count


def _make(plan: Plan, threads: int, progress: Progress) -> Subject:
    """A model of random weights, named after what it is a copy of."""
    config, recipe, name = plan.config, plan.recipe, plan.request.random_weights or ""

    def report(done: int, parts: int) -> None:
        progress(f"making random weights: {done}/{parts} parts")

    made = random_weights.build(config, recipe, threads=threads, report=report)
    model = Transformer(config, made.weights, MappedExperts(made.layout, made.records), DTYPE)
    if name not in random_weights.RELEASED:
        path = Path(name).resolve()
        name = path.name if path.is_dir() else path.parent.name
    return Subject(f"random {name}", recipe, model, summarise(config, recipe))


def _load(plan: Plan, directory: Path) -> Subject:
    """A converted model, of which --layers leaves out the last layers."""
    loaded = llm.load(directory, context=2, threads=plan.request.threads)  # its own cache stays unused
    model = loaded.engine.model
    model.config, model.layers = plan.config, model.layers[: plan.config.num_hidden_layers]
    subject = Subject(loaded.name, loaded.recipe, model, summarise(plan.config, loaded.recipe))
    if subject.weight_bytes > (available := memory_available()):
        notice(
            f"the weights take {human(subject.weight_bytes)} and {human(available)} of memory are available: "
            "much of what follows is the disk's speed; try fewer --layers"
        )
    return subject


def _warn_of_caches(plan: Plan, subject: Subject) -> None:
    """A model that --layers cut small may lie in the processor's caches, where the whole never would."""
    if plan.config != plan.whole and subject.bytes_per_token < 2 * last_level_cache_bytes():
        notice(
            f"these layers read {human(subject.bytes_per_token)} a token, some of which stays in the processor's "
            "caches: the whole model is slower than they suggest; try more --layers"
        )


@dataclass(frozen=True)
class PrefillRun:
    """Seconds from a prompt of `tokens` to its last logits, and to the token chosen from them."""

    tokens: int
    seconds: float
    first_token_seconds: float


def measure_prefill(engine: Engine, tokens: int, progress: Progress) -> PrefillRun:
    """The run of median time; a short prompt runs again until `FILLED_SECONDS` have passed."""
    runs = [_prefill(engine, tokens, progress)]
    while sum(run.first_token_seconds for run in runs) < FILLED_SECONDS:
        runs.append(_prefill(engine, tokens, progress))
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def _prefill(engine: Engine, tokens: int, progress: Progress) -> PrefillRun:
    """One prompt of random tokens through the engine, from an empty cache."""
    engine.cache.truncate(0)
    prompt = torch.randint(engine.model.config.vocab_size, (tokens,)).tolist()
    stats, start = Stats(), perf_counter()
    next(engine.generate(prompt, GREEDY, stats, max_tokens=1, progress=partial(_prefill_progress, progress)))
    return PrefillRun(tokens, stats.prefill_seconds, perf_counter() - start)


def _prefill_progress(progress: Progress, done: int, tokens: int) -> None:
    progress(f"prefill of {tokens:,} tokens: {done:,} done")


def measure_decode(engine: Engine, context: int, steps: int, progress: Progress) -> float:
    """Seconds of `steps` decoded tokens after `context` tokens: the sum, in which slow steps count as they are felt."""
    fill(engine.cache, context, engine.model.config)
    for _ in range(min(WARM_UP_STEPS, steps)):
        _step(engine)
    engine.cache.truncate(context)
    return _steps(engine, steps, f"decode at context {context:,}", progress)


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
        targets.append((layer, "forward", _layer_kind(isinstance(layer.mlp, MoE))))
        if not isinstance(layer.mlp, MoE):
            targets.append((layer.mlp, "forward", "dense"))
            continue
        holders[id(layer.mlp.routed_experts)] = layer.mlp.routed_experts
        if layer.mlp.shared_experts:
            targets.append((layer.mlp.shared_experts, "forward", "shared"))
    return targets + [(holder, "experts", "routed") for holder in holders.values()]


def _layer_kind(moe: bool) -> str:
    return "mixture layers" if moe else "dense layers"


def _model_facts(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "layers": subject.config.num_hidden_layers,
        "recipe": str(subject.recipe),
        "parameters": sum(kind.parameters for kind in subject.kinds.values()),
        "active_weights_per_token": subject.active_weights,
        "weight_bytes": subject.weight_bytes,
    }


def _prefill_facts(run: PrefillRun, subject: Subject) -> dict[str, Any]:
    """GFLOP/s: a multiplication and an addition for each active weight and token; attention's own are left out."""
    tok_s = run.tokens / run.seconds
    return {**asdict(run), "tok_s": tok_s, "gflops": 2 * subject.active_weights * tok_s / 1e9}


def _decode_facts(context: int, seconds: float, steps: int, subject: Subject, read_gb_s: float) -> dict[str, Any]:
    tok_s = steps / seconds
    gb_s = subject.bytes_per_token * tok_s / 1e9
    return {
        "context": context,
        "tok_s": tok_s,
        "bytes_per_token": subject.bytes_per_token,
        "gb_s": gb_s,
        "read_fraction": gb_s / read_gb_s,
    }


def _part_facts(watch: Stopwatch, steps: int) -> dict[str, float]:
    """Seconds per step of each part; the rest is router, norms, embedding, rotation and choosing the token."""
    parts = {name: watch.seconds[name] / steps for name in PARTS}
    whole = watch.seconds["steps"]
    return {
        **parts,
        "rest": whole / steps - sum(parts.values()),
        "outside_kernels": 1 - watch.seconds["kernels"] / whole,
    }


def _cut_facts(plan: Plan, seconds: float, watch: Stopwatch) -> dict[str, Any]:
    """What a model cut by --layers would do as a whole: each missing layer takes the mean time of its kind."""
    if plan.config == plan.whole:
        return {}
    steps = plan.lengths.decode
    step = seconds / steps
    for moe in (False, True):
        here, everywhere = (_layers_of_kind(config, moe) for config in (plan.config, plan.whole))
        if here:
            step += (everywhere - here) * watch.seconds[_layer_kind(moe)] / (here * steps)
    return {
        "layers": plan.config.num_hidden_layers,
        "total_layers": plan.whole.num_hidden_layers,
        "extrapolated": {"decode_tok_s": 1 / step},
    }


def _layers_of_kind(config: ModelConfig, moe: bool) -> int:
    return sum(config.is_moe(layer) == moe for layer in range(config.num_hidden_layers))


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of all caches of the highest level together; 0 where the system does not tell."""
    found: dict[int, dict[str, int]] = defaultdict(dict)  # level -> the CPUs that share a cache -> its bytes
    for index in root.glob("cpu[0-9]*/cache/index*"):
        with suppress(OSError, ValueError):
            size = int((index / "size").read_text().strip().removesuffix("K")) << 10
            found[int((index / "level").read_text())][(index / "shared_cpu_list").read_text()] = size
    return sum(found[max(found)].values()) if found else 0


def read_bandwidth(nbytes: int, threads: int) -> float:
    """GB/s of reading a buffer of this size from memory, the best of several passes."""
    buffer, native = random_weights.empty(nbytes), cpu.kernels()
    # Written by as many threads as read it, as weights are: on two NUMA nodes one would put all of it on its own.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: piece.fill_(1), buffer.chunk(threads)))
    read = buffer.view(torch.int64).sum if native is None else partial(native.read, buffer)
    return nbytes / 1e9 / _best_seconds(read)


def matmul_rate(threads: int) -> float:
    """GFLOP/s of torch's product of square fp32 matrices, the best of several."""
    a, b = torch.rand(2, MATMUL_SIZE, MATMUL_SIZE)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return 2 * MATMUL_SIZE**3 / 1e9 / _best_seconds(lambda: torch.mm(a, b))
    finally:
        torch.set_num_threads(before)


def _best_seconds(work: Callable[[], object]) -> float:
    """The shortest time of three runs or more, until they have filled `FILLED_SECONDS`; the first does not count."""
    work()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < FILLED_SECONDS:
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return min(seconds)


def forget_peak() -> None:
    """Make `peak_bytes` begin anew, so that the buffer of `read_bandwidth` is not in it; an old kernel may refuse."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that this process held (VmHWM; ru_maxrss would begin with the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def show(result: dict[str, Any]) -> None:
    """Print the result for people to read."""
    console = Console(highlight=False)
    console.print(*_heading(result), sep="\n", markup=False, soft_wrap=True)
    for table in (_prefill_table(result), _decode_table(result), _parts_table(result)):
        console.print(table)
    console.print(*_closing(result), sep="\n", markup=False, soft_wrap=True)


def _heading(result: dict[str, Any]) -> tuple[str, str]:
    model, machine = result["model"], result["machine"]
    layers = f"{model['layers']} of {result['total_layers']}" if "total_layers" in result else f"{model['layers']}"
    return (
        f"{model['name']}, {model['recipe']}: {layers} layers, {_millions(model['parameters'])} weights in "
        f"{human(model['weight_bytes'])}; {_millions(model['active_weights_per_token'])} compute a token",
        f"machine: {machine['threads']} threads, {machine['kernels']} kernels, reads {machine['read_gb_s']:,.1f} GB/s, "
        f"fp32 matrix product {machine['matmul_gflops']:,.0f} GFLOP/s",
    )


def _millions(count: int) -> str:
    return f"{count / 1e9:,.2f} billion" if count >= 1e9 else f"{count / 1e6:,.1f} million"


def _closing(result: dict[str, Any]) -> list[str]:
    lines = [f"peak memory {human(result['peak_rss_bytes'])}"]
    if "extrapolated" in result:
        lines.append(
            f"whole model of {result['total_layers']} layers: {result['extrapolated']['decode_tok_s']:,.2f} tok/s at "
            f"context {result['decode'][0]['context']:,}, EXTRAPOLATED from {result['layers']} layers, not measured"
        )
    return lines


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _prefill_table(result: dict[str, Any]) -> Table:
    table = _table("Prefill", "tokens", "tok/s", "seconds", "first token", "GFLOP/s")
    for run in result["prefill"]:
        first = f"{run['first_token_seconds']:,.3f} s"
        table.add_row(
            f"{run['tokens']:,}", f"{run['tok_s']:,.2f}", f"{run['seconds']:,.3f}", first, f"{run['gflops']:,.1f}"
        )
    return table


def _decode_table(result: dict[str, Any]) -> Table:
    table = _table("Decode", "context", "tok/s", "read per token", "GB/s", "of read bandwidth")
    for run in result["decode"]:
        table.add_row(
            f"{run['context']:,}",
            f"{run['tok_s']:,.2f}",
            human(run["bytes_per_token"]),
            f"{run['gb_s']:,.2f}",
            f"{run['read_fraction']:.0%}",
        )
    return table


def _parts_table(result: dict[str, Any]) -> Table:
    parts, context = dict(result["parts"]), result["decode"][0]["context"]
    outside, step = parts.pop("outside_kernels"), sum(parts.values())
    table = _table(f"One decoded token at context {context:,}", "part", "ms", "share")
    table.columns[0].justify = "left"
    for name, seconds in parts.items():
        table.add_row(name, f"{seconds * 1e3:,.2f}", f"{seconds / step:.0%}")
    table.add_section()
    table.add_row("outside matrix kernels", f"{outside * step * 1e3:,.2f}", f"{outside:.0%}")
    return table
