"""The Python API: `load` a model, then `generate` text or `chat`."""

import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_local import inlet
from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.tensors import Kind
from dsv2_local.errors import CheckpointError, InputError, PlanError
from dsv2_local.generation import Generation, complete
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.machine import measurements
from dsv2_local.machine.resources import lockable_memory, memory_available
from dsv2_local.offload import forecast
from dsv2_local.offload.balance import Costs
from dsv2_local.offload.device import Device
from dsv2_local.offload.plan import CONTEXT_BYTES, Plan, make_plan
from dsv2_local.offload.plan_request import DEFAULT_PARALLEL, RATES, Machine, Mode, PlanRequest, Rates, default_context
from dsv2_local.options import one_of
from dsv2_local.progress import Progress, no_progress
from dsv2_local.quant import hub
from dsv2_local.quant.checkpoint import Checkpoint
from dsv2_local.runtime import placement, saved_cache
from dsv2_local.runtime.answer import Request
from dsv2_local.runtime.cache import bytes_per_token
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.engine_thread import EngineThread
from dsv2_local.runtime.sampling_params import GenerationConfig
from dsv2_local.text.chat_template import Message
from dsv2_local.text.stream import TextStream
from dsv2_local.text.tokenizer import Tokenizer
from dsv2_local.values import Number, Text, checked, shown

CACHE_DTYPES = (CacheDtype.BF16, CacheDtype.INT8)
"""Storage types of the KV cache that a user can choose; the torch reference stores fp32 instead of bf16."""
COMPUTE_CAPABILITY = (8, 0)  # the lowest that has bf16 tensor cores, which the GPU kernels need
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LLM:
    """A loaded model with its KV cache.

    The prefix cache keeps earlier prompts and answers while it has room, so that a prompt which begins like one of them
    computes only the rest. Several generations may be iterated in turns, by one thread or by several, awaited by tasks,
    or computed as a `batch`: whatever wants tokens at a time shares steps.

    Attributes:
        name: the model's name, to be shown.
        directory: the checkpoint's directory.
        config, recipe: its architecture, and the formats of its weights.
        defaults: the sampling parameters of its generation_config.json.
        plan: where weights, KV cache and experts are stored.
        experts: the routed experts.
        engine: runs sequences of token ids.
        threads: the CPU threads in use, with a warning if they are more than the cores.
        notes: what makes the model slower or its answers longer than they could be, and what to do about it.
    """

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
        parallel: int | None = None,
        batch_invariant: bool = False,
        progress: Progress = no_progress,
        preparing: Progress = no_progress,
    ) -> None:
        """See `load`; `devices` are the GPUs to use, and `costs` is passed on to `placement.place_on_devices`."""
        checkpoint = Checkpoint(directory)
        device = devices[0].torch_device if devices else ops.RAM
        kv_b = checkpoint.recipe.format_of(Kind.KV_B)
        request = PlanRequest(
            checkpoint.config,
            checkpoint.recipe,
            _context(context, checkpoint.config),
            ops.cache_dtype(kv_b, dtype, cache_dtype, device),
            experts,
            DEFAULT_PARALLEL if parallel is None else parallel,
        )
        self.plan = plan_for(request, this_machine(devices, vram, experts))
        self.threads = ops.set_threads(threads, checkpoint.expert_layout.format)
        self.name = "dsv2-nano" if directory == bundled_model() else directory.resolve().name
        self.directory = directory
        self.config: ModelConfig = checkpoint.config
        self.recipe = checkpoint.recipe
        generation_config = GenerationConfig.load(directory, self.config.vocab_size)
        self.defaults = generation_config.params
        self._tokenizer = Tokenizer(directory) if os.path.lexists(directory / "tokenizer.json") else None
        self._end_tokens = frozenset({*self.config.eos_token_id, *generation_config.eos_token_id})
        if self._tokenizer and (eos := self._tokenizer.eos_id) is not None:
            if eos >= self.config.vocab_size:
                raise CheckpointError(
                    f"{directory}: eos_token is token {eos:,} of the tokenizer, but vocab_size is "
                    f"{self.config.vocab_size:,}; copy the tokenizer of the model's own release"
                )
            self._end_tokens |= {eos}
        weights = placement.ModelWeights.of(checkpoint)
        self._placed = (
            placement.place_on_devices(weights, self.plan, list(devices), dtype, costs=costs, progress=progress)
            if devices
            else placement.place_in_ram(weights, dtype)
        )
        self.experts = self._placed.experts
        self._fingerprint = weights.fingerprint or ""
        self.notes = [*filter(None, [ops.gpu_notice(device)]), *forecast.notes(self.plan), *self._placed.notes]
        if generation_config.left_out:
            self.notes.append(
                f"generation_config.json: not supported, left out: {', '.join(generation_config.left_out)}"
            )
        if not self._end_tokens:
            self.notes.append(
                "no file of the model names an end token, so answers end at --max-tokens or a full context"
            )
        self.engine = Engine(
            self._placed.model,
            request.context,
            request.cache_dtype,
            self.plan.chunk,
            request.parallel,
            batch_invariant and not devices,
        )
        self._thread = EngineThread(self.engine)
        self.engine.warm_up(preparing)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free GPU memory and page-locked memory, and save which experts were used most, for the next load.

        The model cannot be used afterwards; what other threads are computing ends first.
        """
        with self.engine.turn:
            self.engine.close()
            self._placed.close()
        self._thread.join()

    def save_cache(self, path: str | Path, conversation: str = "", wanted: Callable[[int], bool] | None = None) -> bool:
        """Write the KV cache of the current sequence to a file, so that a later process need not prefill it again.

        `conversation` is any text to store with it; `saved_cache.read_header` reads it back. `wanted` is called with
        the tokens in the file as it is when no other process saves to it; False leaves it so.

        Returns:
            Whether the file was written.

        Raises:
            SavedCacheError: the file cannot be written.
        """
        path = _path(path)
        with self.engine.opened():
            return saved_cache.save(
                path, self.engine.sequence, self.engine.cache, self._fingerprint, conversation, wanted
            )

    def load_cache(self, path: str | Path) -> int:
        """Fill the KV cache from a file; returns the number of tokens loaded. Prompts with this prefix reuse it.

        Raises:
            SavedCacheError: the file cannot be read, is damaged, or belongs to another model; the cache is unchanged.
        """
        path = _path(path)
        self.engine.check_usable()
        with saved_cache.opened(path, self.engine.cache, self._fingerprint) as saved:
            with self.engine.new_sequence(saved.tokens) as sequence:
                saved.load(sequence)
            return sequence.length

    @property
    def context(self) -> int:
        """Maximum tokens of prompt and answer together."""
        return self.engine.context

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the current sequence in the KV cache."""
        return self.engine.sequence.length * bytes_per_token(self.config, self.engine.cache.dtype)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: the checkpoint has no tokenizer; prompts of token ids work without one.
        """
        if self._tokenizer is None:
            raise CheckpointError(f"{self.directory} has no tokenizer.json; copy it from the model's release")
        return self._tokenizer

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Prefill `token_ids` from an empty sequence, as generation would -> fp32 logits [T, vocab_size]."""
        return self.engine.logits(_token_ids(token_ids))

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue `prompt`: text (BOS is prepended, special tokens in it are parsed) or token ids, used unchanged.

        Options; None means the model's default:
            max_tokens: maximum tokens to generate; default, or -1: until an end token or a full context.
            temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias,
                seed: see `SamplingParams`.
            stop: a string, or several; the answer ends before the first one that appears.
            logprobs: how many of the most likely tokens to return with each token (0: only its own log probability).
            priority: answers with a higher one are computed first (default 0).
            timeout: seconds after which the answer ends with a `DeadlineError`, waiting included; default: never.
            progress: called with (tokens done, tokens of the prompt) before every chunk of the prefill.

        Raises:
            InputError: an option is out of range or text is not Unicode (raised by this call), or a token id is out of
                range (by the first `next`).
            ContextLengthError: the prompt does not fit in the context (raised by the first `next`).
        """
        ids = self.tokenizer.encode(inlet.text(prompt, "the prompt")) if isinstance(prompt, str) else _token_ids(prompt)
        return self._generation(ids, strip=False, **options)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        **options: Any,
    ) -> Generation:
        """Answer a conversation: messages with `role` (system, user or assistant) and `content`.

        `tools` and `documents` are for chat templates that know them, as in transformers' `apply_chat_template`.
        Options and errors are those of `generate`. White space before the first word of the answer is removed: the
        chat template inserts its own when the answer becomes part of the next prompt.
        """
        if isinstance(messages, Sequence) and not messages:
            raise InputError("there is no message to answer")
        ids = self.tokenizer.encode_chat(messages, tools=tools, documents=documents)
        return self._generation(ids, strip=True, **options)

    def batch(
        self, prompts: Iterable[Generation | str | Sequence[Any]], *, ordered: bool = True, **options: Any
    ) -> Iterator[Generation]:
        """Answer many prompts at once, which takes a fraction of the time of one after the other.

        Args:
            prompts: texts or token ids, as for `generate`; conversations, as for `chat`; or generations with options of
                their own. They are taken as they are needed, so there may be any number.
            ordered: yield the answers in the order of the prompts; else as they end.
            options: of `generate` and `chat`.

        Returns:
            An iterator over the answers, each of which is complete: `text`, `chunks`, `stats`. An error of one does not
            end the others; it is in `error`. The answers are computed while the iterator is waited for; closing it
            cancels the rest.

        Raises:
            InputError: a prompt or an option is of the wrong type (raised when it is taken).
        """
        return complete(self.engine, (self._of(prompt, options) for prompt in prompts), ordered)

    def _of(self, prompt: Any, options: dict[str, Any]) -> Generation:
        if isinstance(prompt, Generation):
            return prompt
        if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
            return self.chat(prompt, **options)
        return self.generate(prompt, **options)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Number of tokens of the prompt that `chat` makes of `messages`."""
        return len(self.tokenizer.encode_chat(messages))

    def _generation(
        self,
        ids: list[int],
        *,
        strip: bool,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        priority: int = 0,
        timeout: float | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Generation:
        if max_tokens is not None:
            limit = checked("max_tokens", max_tokens, Number(whole=True), InputError)
            # Other programs write "no limit" as -1.
            max_tokens = None if limit == -1 else checked("max_tokens", limit, Number(1, whole=True), InputError)
        if logprobs is not None:
            logprobs = checked("logprobs", logprobs, Number(0, whole=True), InputError)
        if not (progress is None or callable(progress)):
            raise InputError(f"progress must be a function, not {shown(progress)}")
        priority = checked("priority", priority, Number(whole=True), InputError)
        if timeout is not None:
            timeout = checked("timeout", timeout, Number(0), InputError)
        request = Request(
            ids, self.defaults.override(**sampling), max_tokens, self._end_tokens, logprobs, priority, timeout
        )
        stops = [inlet.well_formed(checked("stop", each, Text(), InputError), "stop") for each in _listed("stop", stop)]
        stream = TextStream(self._tokenizer, self._end_tokens, stops, strip)
        return Generation(self.engine, self._thread, request, stream, progress or no_progress)


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
    parallel: int | None = None,
    batch_invariant: bool = False,
    progress: Progress = no_progress,
    preparing: Progress = no_progress,
    verifying: Progress = no_progress,
) -> LLM:
    """Load a converted checkpoint.

    Args:
        model: a directory, a hub repository that holds a converted checkpoint, or None for the bundled dsv2-nano.
        device: "cpu", "cuda" (all GPUs), some GPUs such as "cuda:0,cuda:1", or "auto": all GPUs if they can run the
            kernels and the model fits, else the CPU (`LLM.notes` has the reason).
        experts: where to compute routed experts: "gpu", "hybrid", "stream", "cpu" or "auto" (see
            `offload.plan_request.Mode`).
        vram: maximum bytes to use on each GPU; None: all free memory.
        dtype: type of the activations, "float32" or "bfloat16"; "auto": float32 on the CPU, bfloat16 on GPUs.
        context: maximum tokens of prompt and answer together; None: 8,192, or the model's limit if that is less.
        cache_dtype: how the KV cache stores latents: "bf16", or "int8" in 57 % of the bytes. If the torch reference
            computes in float32, "bf16" stores float32.
        threads: CPU threads; None: one per physical core that this process may use.
        parallel: maximum sequences that are computed in one step; None: 16. They share the KV cache of `context`
            tokens.
        batch_invariant: give an answer the same bits whatever is reused of its prompt and whatever else is computed, on
            the CPU. It costs nothing for prompts of 500 tokens, 5 % at 2,000 and 60 % at 8,000 (V2-Lite's shape).
        progress: called with (bytes done, total bytes) while experts are copied to page-locked RAM.
        preparing: called with (steps done, total steps) while GPU kernels are compiled and tuned, which takes half a
            minute the first time on a machine.
        verifying: called with (bytes done, total bytes) while downloaded files are compared with their checksums, which
            happens once.

    Raises:
        CheckpointError: not a converted checkpoint, or a damaged one.
        InputError: an option that is invalid, or impossible for this model or machine.
        PlanError: dense weights and KV cache do not fit in memory. (Experts that do not fit are read from disk;
            `LLM.notes` has the number.)
        DeviceMemoryError: another program took GPU memory after the plan was made.
        HubError: the repository cannot be fetched.
    """
    if checked("dtype", dtype, Text(), InputError) not in ("auto", *DTYPES):
        raise InputError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)} (float16 overflows in DeepSeek-V2)")
    mode, latents = one_of("experts", experts, Mode), one_of("cache type", cache_dtype, CACHE_DTYPES)
    devices = find_devices(checked("device", device, Text(), InputError))
    if vram is not None:
        vram = [checked("vram", size, Number(0, whole=True), InputError) for size in _listed("vram", vram)]
    if parallel is not None:
        parallel = checked("parallel", parallel, Number(1, whole=True), InputError)
    directory = bundled_model() if model is None else hub.resolve_converted(str(model), verifying)

    def load_on(devices: list[Device]) -> LLM:
        activations = DTYPES.get(dtype, torch.bfloat16 if devices else torch.float32)
        return LLM(
            directory, dtype=activations, context=context, threads=threads, cache_dtype=latents, experts=mode,
            devices=devices, vram=vram, parallel=parallel, batch_invariant=batch_invariant, progress=progress,
            preparing=preparing,
        )  # fmt: skip

    reason = _passed_over() if device == "auto" else None
    try:
        loaded = load_on(devices)
    except PlanError as error:
        if not devices or device != "auto" or vram is not None or mode is not Mode.AUTO:
            raise
        loaded, reason = load_on([]), str(error)
    if reason:
        loaded.notes.append(f"the GPU is not used: {reason}")
    return loaded


def find_devices(names: str) -> list[Device]:
    """The GPUs that `names` asks for; for "auto" all GPUs if they are suitable, else none.

    Raises:
        InputError: `names` is not a valid choice, or names a GPU that this machine lacks.
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
        raise InputError(
            f"there is no cuda:{missing[0]} on this machine: torch {torch.__version__} {found}; use --device cpu"
        )
    from dsv2_local.offload.cuda_device import CudaDevice

    return [CudaDevice(index) for index in indices]


def _passed_over() -> str | None:
    """Why `--device auto` does not use the GPUs of this machine; None if it uses them, or there are none."""
    if not torch.cuda.is_available():
        return None
    least = min(torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count()))
    if least < COMPUTE_CAPABILITY:
        return f"its compute capability is {least[0]}.{least[1]}, and the kernels need 8.0 or later"
    return None if ops.capturable(torch.device("cuda")) else "Triton is not installed"


def bundled_model() -> Path:
    """Directory of dsv2-nano, the small model that ships with the package."""
    return Path(__file__).parent / "nano"


def this_machine(devices: Sequence[Device], vram: Sequence[int] | None, experts: Mode = Mode.AUTO) -> Machine:
    """What this machine has free for a model on these GPUs; `vram` limits the memory to use on each.

    Raises:
        InputError: an option needs a GPU and there is none, or `vram` is not one size per GPU.
    """
    if not devices and experts not in (Mode.AUTO, Mode.CPU):
        raise InputError(f"--experts {experts} needs a GPU (--device cuda); on the CPU leave it out")
    if not devices and vram is not None:
        raise InputError("--vram needs a GPU (--device cuda)")
    limits = list(vram) if vram is not None else [device.free + CONTEXT_BYTES for device in devices]
    if len(limits) != len(devices):
        raise InputError(f"--vram has {len(limits)} sizes for {len(devices)} GPUs; give one size per GPU")
    # The CUDA contexts exist already, so that their memory is no longer free; the plan counts it again.
    free = tuple(min(limit, device.free + CONTEXT_BYTES) for limit, device in zip(limits, devices, strict=True))
    rates = replace(Rates(), **measurements.load(RATES))
    return Machine(free, memory_available(), lockable_memory(), available=True, rates=rates)


def plan_for(request: PlanRequest, machine: Machine) -> Plan:
    """Plan the memory of this machine for a model that exists as it is.

    Raises:
        PlanError: the model does not fit; only with remedies that apply to it.
    """
    try:
        return make_plan(request, machine)
    except PlanError as error:
        options = ("--cache-type", "--context", "--experts", "--parallel")
        remedies = tuple(remedy for remedy in error.remedies if remedy.startswith(options))
        raise PlanError(error.where, error.shortfall, remedies) from None


def _context(requested: int | None, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if requested is None:
        return default_context(config)
    context: int = checked("context", requested, Number(whole=True), InputError)
    if not 2 <= context <= limit:
        raise InputError(f"context must be between 2 and the model's {limit:,} tokens, not {shown(context)}")
    return context


def _listed(name: str, given: Any) -> list[Any]:
    """What a caller gave as nothing, as one value or as several.

    Raises:
        InputError: it is none of these.
    """
    if given is None:
        return []
    if isinstance(given, str | int | float):
        return [given]
    try:
        return list(given)
    except TypeError:
        raise InputError(f"{name} must be a value or a list of them, not {shown(given)}") from None


def _path(given: Any) -> Path:
    """A file that a caller names. Raises InputError if it is no name."""
    if not isinstance(given, str | os.PathLike) or "\0" in str(given):
        raise InputError(f"a file's name must be text or a path, not {shown(given)}")
    return Path(given)


def _token_ids(prompt: Any) -> list[int]:
    """Token ids in any type of integers and of sequences.

    Raises:
        InputError: the prompt is neither text nor token ids.
    """
    try:
        if not isinstance(prompt, bytes | bytearray | memoryview | Mapping | Set):
            return list(map(operator.index, prompt))
    except Exception:  # whatever a foreign object raises
        pass
    raise InputError(f"the prompt must be text or a sequence of token ids, not {shown(prompt)}")
