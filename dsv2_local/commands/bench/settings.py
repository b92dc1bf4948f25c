"""What to measure: checks the options against the model's limits and the memory, before anything large is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsv2_local import llm, workstation
from dsv2_local.architectures import released
from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.families import load_config
from dsv2_local.architectures.tensors import Kind
from dsv2_local.commands.bench.hardware import last_level_cache_bytes
from dsv2_local.commands.console import notice
from dsv2_local.errors import InputError
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CACHE_BLOCK, CacheDtype, blocks_for
from dsv2_local.machine.resources import choose_threads
from dsv2_local.offload.plan import CPU_CHUNK
from dsv2_local.offload.plan_request import DEFAULT_PARALLEL, Mode
from dsv2_local.quant import hub
from dsv2_local.quant.checkpoint import Manifest
from dsv2_local.quant.schema import Recipe, expert_layout
from dsv2_local.runtime import random_weights
from dsv2_local.runtime.cpu_step import CpuStep

PROMPTS, DECODE = (128, 512), 32
GPU_PROMPTS, GPU_DECODE = (512, 4_096), 64
CONTEXTS = (0, 4_096, 32_768)
PARALLEL = (1, 4, 16)
PARALLEL_TOKENS = 8_192  # of KV cache that the default numbers of sequences may take, if longer contexts need no more
MOST_PARALLEL = {"CPU": CpuStep.max_rows, "GPU": DEFAULT_PARALLEL}
DTYPE = torch.float32
WARM_UP_TOKENS = 32  # of prefill, if the weights are in memory and need not be mapped from files
WORKING_BYTES = 1 << 30  # memory for computing, besides weights and KV cache
READ_BYTES = 1 << 30  # minimum bytes of a pass that measures memory bandwidth


@dataclass(frozen=True)
class BenchOptions:
    """The options of `dsv2 bench` as they were given; None: not given."""

    model: str | None = None
    random_weights: str | None = None
    layers: int | None = None
    prompt: str | None = None
    decode: int | None = None
    context: str | None = None
    threads: int | None = None
    recipe: Recipe | None = None
    cache_dtype: CacheDtype = CacheDtype.BF16
    device: str = "auto"
    experts: Mode = Mode.AUTO
    vram: Sequence[int] | None = None
    trace: Path | None = None
    parallel: str | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: one is out of range, or two contradict each other.
        """
        if self.model is not None and self.random_weights is not None:
            raise InputError("-m measures a converted model, --random-weights a random one; drop one of them")
        if self.recipe is not None and self.random_weights is None:
            raise InputError("--recipe needs --random-weights; a converted model has its own recipe")
        if self.decode is not None and self.decode < 1:
            raise InputError(f"--decode must be at least 1, not {self.decode}")
        choose_threads(self.threads)  # raises if the number is not valid


@dataclass(frozen=True)
class Lengths:
    """What to measure, in tokens.

    Attributes:
        prompts: lengths of the prompts to prefill.
        contexts: tokens in the KV cache before each measurement of decoding.
        decode: tokens to decode in each measurement.
        parallel: numbers of sequences to decode in common steps, at the first of the contexts.
    """

    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    decode: int
    parallel: tuple[int, ...] = ()

    @property
    def parallel_steps(self) -> int:
        """Steps of each number of sequences; those of many sequences take long."""
        return -(-self.decode // 2)

    @property
    def alone(self) -> int:
        """Tokens that the KV cache must hold for one sequence; the engine needs room for one more after a prompt."""
        return max(max(self.contexts) + self.decode, *(length + 1 for length in (*self.prompts, 1)))

    @property
    def cache(self) -> int:
        """Tokens that the KV cache must hold, in whole blocks if it has several sequences."""
        return max(self.alone, *(self.together(count) for count in (*self.parallel, 0)))

    def together(self, count: int) -> int:
        """Tokens that so many sequences take in the KV cache."""
        return count * blocks_for(self.contexts[0] + self.decode) * CACHE_BLOCK if count > 1 else 0


@dataclass(frozen=True)
class BenchPlan:
    """What to measure.

    Attributes:
        options: the command's options.
        directory: the converted model; None: random weights.
        whole: the architecture of the whole model.
        config: the architecture with the layers of --layers.
        recipe: formats of the weights.
        cache_dtype: how the KV cache stores latents.
        lengths: of prompts, contexts and decoding.
        read_bytes: minimum bytes of a pass that measures memory bandwidth.
    """

    options: BenchOptions
    directory: Path | None
    whole: ModelConfig
    config: ModelConfig
    recipe: Recipe
    cache_dtype: CacheDtype
    lengths: Lengths
    read_bytes: int

    @property
    def warm_up_tokens(self) -> int:
        """Length of a first prompt, which is not measured.

        A short one starts the threads; for a mapped file a whole chunk, which reads nearly all experts from disk.
        """
        return min(CPU_CHUNK if self.directory else WARM_UP_TOKENS, self.config.max_position_embeddings - 1)


def settle(options: BenchOptions) -> BenchPlan:
    """Decide what to measure.

    Raises:
        InputError: an option exceeds the model's context, or the model does not fit in memory.
    """
    workstation.this_machine([], options.vram, options.experts)  # raises if an option needs a GPU
    if options.trace is not None:
        raise InputError(
            "--trace needs offloaded experts; the CPU has all of them in its memory (--record-trace writes)"
        )
    directory, whole = architecture(options)
    config = whole if options.layers is None else random_weights.first_layers(whole, options.layers)
    recipe = Manifest.load(directory).recipe if directory else options.recipe or Recipe.NF4
    cache_dtype = ops.cache_dtype(recipe.format_of(Kind.KV_B), DTYPE, options.cache_dtype)
    lengths = settle_lengths(options, config.max_position_embeddings, PROMPTS, DECODE, MOST_PARALLEL["CPU"])
    read_at_least = read_bytes()
    if directory is None:
        experts = expert_layout(config, recipe).nbytes * config.n_routed_experts * len(config.moe_layers)
        buffer = 0 if experts >= read_at_least else read_at_least  # `hardware.Reader`'s
        other = buffer + WORKING_BYTES
        random_weights.require_memory(config, recipe, context=lengths.cache, cache_dtype=cache_dtype, other=other)
    return BenchPlan(options, directory, whole, config, recipe, cache_dtype, lengths, read_at_least)


def read_bytes() -> int:
    """Minimum bytes of a pass that measures memory bandwidth: more than the caches hold."""
    return max(READ_BYTES, 4 * last_level_cache_bytes())


def use_threads(requested: int | None, recipe: Recipe) -> int:
    """Set the number of CPU threads, and print notices about what makes the CPU slow."""
    threads = ops.set_threads(requested, recipe.format_of(Kind.ROUTED))
    for warning in (threads.warning, ops.slow_notice()):
        if warning:
            notice(warning)
    return threads.count


def architecture(options: BenchOptions) -> tuple[Path | None, ModelConfig]:
    """The directory of the requested model (None: random weights) and its architecture."""
    if options.random_weights is not None:
        return None, released.read_config(options.random_weights)
    if options.model is None:
        notice("measuring the bundled dsv2-nano; choose another model with -m or --random-weights")
    directory = llm.bundled_model() if options.model is None else hub.resolve_converted(options.model)
    return directory, load_config(directory)


def settle_lengths(
    options: BenchOptions, limit: int, prompts: tuple[int, ...], decode: int, most_parallel: int
) -> Lengths:
    """The requested lengths, or those of the defaults that fit in `limit` tokens; `prompts`, `decode` are defaults.

    Raises:
        InputError: a requested length does not fit, or more than `most_parallel` sequences are requested.
    """
    decode = decode if options.decode is None else options.decode
    if decode > limit:
        raise InputError(f"--decode {decode:,} is more than the model's context of {limit:,} tokens")
    fitting_prompts = _fitting("--prompt", options.prompt, prompts, 1, limit - 1, limit)
    contexts = _fitting("--context", options.context, CONTEXTS, 0, limit - decode, limit)
    lengths = Lengths(fitting_prompts, contexts, decode)
    if options.parallel is None:
        most = max(lengths.alone, PARALLEL_TOKENS)
        counts = tuple(count for count in PARALLEL if lengths.together(count) <= most)
        return replace(lengths, parallel=() if options.trace or counts == (1,) else counts)
    counts = tuple(dict.fromkeys(_numbers("--parallel", options.parallel)))
    if wrong := [count for count in counts if not 1 <= count <= most_parallel]:
        raise InputError(f"--parallel must be between 1 and {most_parallel} sequences, not {wrong[0]:,}")
    if options.trace is not None:
        if counts != (1,):
            raise InputError("--parallel cannot be used with --trace, which has a single text; drop one of them")
        counts = ()
    return replace(lengths, parallel=counts)


def _fitting(
    option: str, given: str | None, default: tuple[int, ...], least: int, most: int, limit: int
) -> tuple[int, ...]:
    """Lengths between `least` and `most`.

    Given lengths must all be in this range; of the default lengths, those that are not are left out.

    Raises:
        InputError: a given length is out of range.
    """
    lengths = default if given is None else _numbers(option, given)
    wrong = [length for length in lengths if not least <= length <= most]
    if not wrong:
        return lengths
    shown = ", ".join(f"{length:,}" for length in wrong)
    if given is not None:
        raise InputError(f"{option} must be between {least} and {most:,} in a context of {limit:,} tokens, not {shown}")
    notice(f"left out {option} {shown}: the model's context is {limit:,} tokens")
    return tuple(length for length in lengths if length not in wrong)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} must be whole numbers separated by commas, not {text!r}") from None
