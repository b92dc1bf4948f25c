"""The Python API: load a model, and generate or chat in text."""

import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as PyGenerator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.errors import CheckpointError, InputError, PlanError
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.machine import measurements
from dsv2_local.machine.resources import lockable_memory, memory_available
from dsv2_local.offload import forecast
from dsv2_local.offload.balance import Costs
from dsv2_local.offload.device import Device
from dsv2_local.offload.plan import CONTEXT_BYTES, Plan, make_plan
from dsv2_local.offload.plan_request import RATES, Machine, Mode, PlanRequest, Rates, default_context
from dsv2_local.options import one_of
from dsv2_local.progress import Progress, no_progress
from dsv2_local.quant import hub
from dsv2_local.quant.checkpoint import Checkpoint
from dsv2_local.architectures.tensors import Kind
from dsv2_local.runtime import placement, saved_cache
from dsv2_local.runtime.cache import bytes_per_token
from dsv2_local.runtime.engine import Engine, GeneratedToken, Request, Stats
from dsv2_local.runtime.sampling_params import GenerationConfig
from dsv2_local.text.chat_template import Message
from dsv2_local.text.detokenizer import Detokenizer, StopFilter
from dsv2_local.text.tokenizer import Tokenizer

CACHE_DTYPES = (CacheDtype.BF16, CacheDtype.INT8)
"""What a KV cache can be asked to store latents as; the torch reference makes FP32 of BF16."""
COMPUTE_CAPABILITY = (8, 0)  # of GPUs: the least with bf16 on tensor cores
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Chunk:
    """A piece of the answer: the text that one token made certain (often a word, sometimes nothing).

    `token_id` is None for text that was held back until the end. `logprob` is the natural logarithm of the token's
    probability before temperature and truncation; it and `top_logprobs` are there only when asked for.
    """

    text: str
    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Generation(Iterator[Chunk]):
    """An answer while it is made: iterate for its chunks. Nothing runs before the first one is asked for.

    Attributes:
        text: everything yielded so far.
        stats: the figures so far; complete after the last chunk.
    """

    def __init__(self, tokens: Callable[[Stats], Iterator[GeneratedToken]], text: "TextStream") -> None:
        self.stats = Stats()
        self.text = ""
        self._chunks = self._run(tokens, text)

    def __next__(self) -> Chunk:
        chunk = next(self._chunks)
        self.text += chunk.text
        return chunk

    def close(self) -> None:
        """Stop generating; what was yielded stays in `text`, and the cache keeps what was computed."""
        self._chunks.close()

    def _run(
        self, tokens: Callable[[Stats], Iterator[GeneratedToken]], text: "TextStream"
    ) -> PyGenerator[Chunk, None, None]:
        for made in tokens(self.stats):
            yield Chunk(text.push(made.token), made.token, made.logprob, made.top_logprobs)
            if text.stopped:
                self.stats.finish_reason = "stop"
                return
        if rest := text.flush():
            yield Chunk(rest)


class LLM:
    """A loaded model. Its cache keeps earlier texts while it has room; generations may take turns."""

    def __init__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype,
        context: int | None,
        threads: int | None,
        cache_dtype: CacheDtype = CacheDtype.BF16,
        experts: Mode = Mode.AUTO,
        devices: Sequence[Device] = (),
        vram: Sequence[int] | None = None,
        costs: Costs | None = None,
        progress: Progress = no_progress,
        preparing: Progress = no_progress,
    ) -> None:
        """See `load`; `devices` are the GPUs to use, `costs` what `placement.place_on_devices` takes."""
        checkpoint = Checkpoint(directory)
        device = devices[0].torch_device if devices else ops.RAM
        kv_b = checkpoint.recipe.format_of(Kind.KV_B)
        request = PlanRequest(
            checkpoint.config,
            checkpoint.recipe,
            _context(context, checkpoint.config),
            ops.cache_dtype(kv_b, dtype, cache_dtype, device),
            experts,
        )
        self.plan = _plan(request, devices, vram)
        self.threads = ops.set_threads(threads, checkpoint.expert_layout.format)
        self.name = "dsv2-nano" if directory == bundled_model() else directory.resolve().name
        self.directory = directory
        self.config: ModelConfig = checkpoint.config
        self.recipe = checkpoint.recipe
        generation_config = GenerationConfig.load(directory)
        self.defaults = generation_config.params
        self._tokenizer = Tokenizer(directory) if (directory / "tokenizer.json").is_file() else None
        self._end_tokens = frozenset({*self.config.eos_token_id, *generation_config.eos_token_id})
        if self._tokenizer and self._tokenizer.eos_id is not None:
            self._end_tokens |= {self._tokenizer.eos_id}
        weights = placement.ModelWeights.of(checkpoint)
        self._placed = (
            placement.place_on_devices(weights, self.plan, list(devices), dtype, costs=costs, progress=progress)
            if devices
            else placement.place_in_ram(weights, dtype)
        )
        self.experts = self._placed.experts
        self._fingerprint = weights.fingerprint or ""
        self.notes = [*filter(None, [ops.gpu_notice(device)]), *forecast.notes(self.plan), *self._placed.notes]
        """What is slower than it could be, and what to do about it."""
        self.engine = Engine(self._placed.model, request.context, request.cache_dtype, self.plan.chunk)
        self.engine.warm_up(preparing)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back devices and page-locked memory, and keep which experts were used most for the next time.

        The model is of no use after it. Without GPUs there is nothing to do.
        """
        self._placed.close()

    def save_cache(self, path: Path, conversation: str = "") -> None:
        """Write the cache to a file, so that what was read need not be read again; SavedCacheError if it cannot be.

        `conversation` is any text to keep beside it; `saved_cache.read_header` reads it.
        """
        saved_cache.save(path, self.engine.tokens, self.engine.cache, self._fingerprint, conversation)

    def load_cache(self, path: Path) -> int:
        """Take the cache from a file; the number of tokens in it. A prompt that begins like them computes what differs.

        Raises:
            SavedCacheError: the file cannot be read, is damaged, or is another model's; the cache is as it was then.
        """
        self.engine.cache_prefix()
        self.engine.adopt(saved_cache.load(path, self.engine.cache, self._fingerprint))
        return self.engine.cache.length

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.context

    @property
    def cache_nbytes(self) -> int:
        """Bytes of what the cache holds now."""
        return self.engine.cache.length * bytes_per_token(self.config, self.engine.cache.dtype)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; CheckpointError where it has none (token ids still work)."""
        if self._tokenizer is None:
            raise CheckpointError(f"{self.directory} has no tokenizer.json; copy it from the model's release")
        return self._tokenizer

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Prefill `token_ids` as generation would, from an empty cache -> fp32 logits [T, vocab_size]."""
        return self.engine.logits(list(token_ids))

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue `prompt`: text (BOS is added, special tokens are honoured) or token ids as they are.

        Options, each None for the model's own default:
            max_tokens: at most this many; else until an end token or the context is full.
            temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias,
                seed: see `SamplingParams`.
            stop: a string or several; the answer ends before the first that appears.
            logprobs: how many likeliest tokens to tell at each step (0: only the chosen one's).
            progress: called with (tokens done, tokens in all) before every chunk of the prompt.

        Raises (at the first chunk, or at once for options):
            ContextLengthError: the prompt does not fit.
            InputError: an option is out of its range.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self._generation(ids, strip=False, **options)

    def chat(self, messages: Sequence[Message], **options: Any) -> Generation:
        """Answer a conversation of messages with `role` (system, user, assistant) and `content`.

        The options are those of `generate`. White space before the answer's first word is left out: the template
        writes it itself when the answer is sent back.
        """
        return self._generation(self.tokenizer.encode_chat(messages), strip=True, **options)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt that `chat` would make of these messages."""
        return len(self.tokenizer.encode_chat(messages))

    def _generation(
        self,
        ids: list[int],
        *,
        strip: bool,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        progress: Progress = no_progress,
        **sampling: Any,
    ) -> Generation:
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, not {max_tokens}")
        if logprobs is not None and logprobs < 0:
            raise InputError(f"logprobs must be at least 0, not {logprobs}")
        request = Request(ids, self.defaults.override(**sampling), max_tokens, self._end_tokens, logprobs)
        tokens = partial(self.engine.generate, request, progress=progress)
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        return Generation(tokens, TextStream(self._tokenizer, self._end_tokens, stops, strip))


class TextStream:
    """Tokens to the text that is shown: detokenised, cut at stop strings, without end tokens."""

    def __init__(self, tokenizer: Tokenizer | None, end: frozenset[int], stops: list[str], strip: bool) -> None:
        if stops and tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this checkpoint has none")
        self._detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._filter = StopFilter(stops)
        self._end = end
        self._at_start = strip

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def push(self, token: int) -> str:
        """The text that became certain with this token; always empty without a tokenizer."""
        if self._detokenizer is None or token in self._end:
            return ""
        return self._strip(self._filter.push(self._detokenizer.push(token)))

    def flush(self) -> str:
        """What was held back when the tokens ended."""
        if self._detokenizer is None:
            return ""
        return self._strip(self._filter.push(self._detokenizer.flush()) + self._filter.flush())

    def _strip(self, text: str) -> str:
        """Leave out white space until the first visible character."""
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        return text


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    experts: str = "auto",
    vram: Sequence[int] | None = None,
    dtype: str = "auto",
    context: int | None = None,
    cache_dtype: str = CacheDtype.BF16,
    threads: int | None = None,
    progress: Progress = no_progress,
    preparing: Progress = no_progress,
) -> LLM:
    """Load a converted checkpoint.

    Args:
        model: a directory, a hub repository that holds a converted checkpoint, or None for the bundled dsv2-nano.
        device: "cpu", "cuda" (all GPUs), or some of them: "cuda:0,cuda:1"; "auto": all GPUs where they can run the
            kernels and what must lie there fits, else the CPU (`LLM.notes` tells).
        experts: who computes routed experts: "gpu", "cpu", "stream", "hybrid" or "auto" (`offload.plan_request.Mode`).
        vram: bytes of each GPU that may be used at most; None: all that are free.
        dtype: activations, "float32" or "bfloat16"; "auto" is float32 on the CPU, bfloat16 on GPUs.
        context: tokens that prompt and answer may have together; None: 8,192, or the model's own limit if that is less.
        cache_dtype: how the KV cache stores latents: "bf16" (without the native kernels: as the activations) or "int8",
            in 57 % of the bytes.
        threads: of the CPU kernels; None: one for each physical core that this process may use.
        progress: called with the bytes of experts that were brought to page-locked RAM, and of those that will be.
        preparing: called with the steps done and all steps of compiling for GPUs, half a minute the first time.

    Raises:
        CheckpointError: not a converted checkpoint, or a damaged one.
        InputError: an option that this model or machine cannot meet.
        PlanError: weights and cache do not fit in memory; experts may lie on disk (`LLM.notes` tells).
        DeviceMemoryError: something else took GPU memory meanwhile.
        HubError: the repository cannot be fetched.
    """
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)} (float16 overflows in DeepSeek-V2)")
    mode, kept = one_of("experts", experts, Mode), one_of("cache type", cache_dtype, CACHE_DTYPES)
    devices = _devices(device)
    directory = bundled_model() if model is None else hub.resolve_converted(str(model))

    def loaded(devices: list[Device]) -> LLM:
        chosen = DTYPES.get(dtype, torch.bfloat16 if devices else torch.float32)
        return LLM(
            directory, dtype=chosen, context=context, threads=threads, cache_dtype=kept, experts=mode, devices=devices,
            vram=vram, progress=progress, preparing=preparing,
        )  # fmt: skip

    reason = _passed_over() if device == "auto" else None
    try:
        made = loaded(devices)
    except PlanError as error:
        if not devices or device != "auto" or vram is not None or mode is not Mode.AUTO:
            raise
        made, reason = loaded([]), str(error)
    if reason:
        made.notes.append(f"the GPU is not used: {reason}")
    return made


def _devices(names: str) -> list[Device]:
    """The GPUs that were asked for, or those that are there and able.

    Raises:
        InputError: a name that is none, or a GPU that is not there.
    """
    if names == "cpu" or (names == "auto" and (not torch.cuda.is_available() or _passed_over())):
        return []
    count = torch.cuda.device_count()
    every = names in ("auto", "cuda")
    wanted = [f"cuda:{index}" for index in range(max(1, count))] if every else names.split(",")
    numbers = [re.fullmatch(r"cuda:(\d+)", name.strip()) for name in wanted]
    if not all(numbers) or len(set(wanted)) < len(wanted):
        raise InputError(f"device {names!r} is not cpu, cuda, or some of cuda:0,cuda:1")
    indices = [int(number[1]) for number in numbers if number]
    if missing := [index for index in indices if index >= count]:
        found = "finds no GPU" if count == 0 else f"finds {count}"
        raise InputError(f"there is no cuda:{missing[0]} here: torch {torch.__version__} {found}; use --device cpu")
    from dsv2_local.offload.cuda_device import CudaDevice

    return [CudaDevice(index) for index in indices]


def _passed_over() -> str | None:
    """Why GPUs that are there are not used unasked; None where they are used, or there are none."""
    if not torch.cuda.is_available():
        return None
    least = min(torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count()))
    if least < COMPUTE_CAPABILITY:
        return f"its compute capability is {least[0]}.{least[1]}, and the kernels are made for 8.0 and later"
    return None if ops.capturable(torch.device("cuda")) else "Triton is not installed"


def bundled_model() -> Path:
    """The directory of dsv2-nano, the small model that ships with the package."""
    return Path(__file__).parent / "nano"


def _plan(request: PlanRequest, devices: Sequence[Device], vram: Sequence[int] | None) -> Plan:
    """Where it will lie; refused where memory is short, with what a loaded model can be asked for instead."""
    if not devices and request.experts not in (Mode.AUTO, Mode.CPU):
        raise InputError(f"--experts {request.experts} needs a GPU (--device cuda); without one the CPU computes them")
    if not devices and vram is not None:
        raise InputError("--vram needs a GPU (--device cuda)")
    limits = list(vram) if vram is not None else [device.free + CONTEXT_BYTES for device in devices]
    if len(limits) != len(devices):
        raise InputError(f"--vram names {len(limits)} GPUs and {len(devices)} are used; give one size for each")
    # What a context takes of a GPU is taken already.
    free = tuple(min(limit, device.free + CONTEXT_BYTES) for limit, device in zip(limits, devices, strict=True))
    rates = replace(Rates(), **measurements.load(RATES))
    machine = Machine(free, memory_available(), lockable_memory(), available=True, rates=rates)
    try:
        return make_plan(request, machine)
    except PlanError as error:
        options = ("--cache-type", "--context", "--experts")
        remedies = tuple(remedy for remedy in error.remedies if remedy.startswith(options))
        raise PlanError(error.where, error.shortfall, remedies) from None


def _context(requested: int | None, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if requested is None:
        return default_context(config)
    if not 2 <= requested <= limit:
        raise InputError(f"context must lie between 2 and the model's {limit:,} tokens, not {requested:,}")
    return requested
