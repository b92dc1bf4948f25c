"""The Python API: `load` a model, then `generate` text or `chat`."""

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_local import inlet, workstation
from dsv2_local.answer_forms import AnswerForms
from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.tensors import Kind
from dsv2_local.errors import CheckpointError, InputError, PlanError
from dsv2_local.generation import Generation, complete
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CACHE_BLOCK, CacheDtype
from dsv2_local.machine import homes
from dsv2_local.machine.resources import memory_available
from dsv2_local.offload import forecast
from dsv2_local.offload.balance import Costs
from dsv2_local.offload.device import Device
from dsv2_local.offload.plan_request import DEFAULT_PARALLEL, Mode, PlanRequest, default_context
from dsv2_local.options import one_of
from dsv2_local.progress import Progress, no_progress
from dsv2_local.quant import hub
from dsv2_local.quant.checkpoint import Checkpoint
from dsv2_local.runtime import placement, saved_cache
from dsv2_local.runtime.answer import Request
from dsv2_local.runtime.block_files import BlockFiles
from dsv2_local.runtime.cache import block_bytes, bytes_per_token, key_of
from dsv2_local.runtime.constraint import Constraint
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.engine_thread import EngineThread
from dsv2_local.runtime.sampling_params import GenerationConfig
from dsv2_local.text.answer_ids import Writing
from dsv2_local.text.chat import Chats
from dsv2_local.text.chat_template import Message
from dsv2_local.text.grammar import Grammars
from dsv2_local.text.stream import TextStream
from dsv2_local.text.tokenizer import Tokenizer
from dsv2_local.text.tools.calls import AnswerParser
from dsv2_local.values import Flag, Number, Text, checked, shown

CACHE_DTYPES = (CacheDtype.BF16, CacheDtype.INT8)
"""Storage types of the KV cache that a user can choose; the torch reference stores fp32 instead of bf16."""
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
        devices: the GPUs in use.
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
        cache_ram: int | None = 0,
        cache_dir: Path | None = None,
        cache_disk: int | None = None,
        cache_notice: Callable[[str], object] | None = None,
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
        self.devices = tuple(devices)
        self.plan = workstation.plan_for(request, workstation.this_machine(devices, vram, experts))
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
        self._remembers_answers = not batch_invariant
        batch_invariant = batch_invariant and not devices
        key = key_of(self.config, request.cache_dtype, weights.fingerprint or "", batch_invariant=batch_invariant)
        block = block_bytes(self.config, request.cache_dtype)
        tell = cache_notice or (lambda text: self.notes.append(text))
        files = BlockFiles(cache_dir, key.hex(), CACHE_BLOCK, block, cache_disk, tell) if cache_dir else None
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
            batch_invariant,
        )
        ram = _cache_ram(cache_ram, block * self.engine.cache.pool.count, files)
        if ram or files:
            self.engine.cache.add_store(key, ram, files)
        if files and not files.writable:
            self.notes.append(
                f"another process writes to {files.folder}: what it held when this one started is read, but nothing is "
                "added"
            )
        self._forms = AnswerForms(lambda: self.grammars)
        self._thread = EngineThread(self.engine)
        self.engine.warm_up(preparing)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free GPU memory and page-locked memory, and save which experts were used most, for the next load.

        With `load(cache_dir=)`, what the prefix cache has is written too, which waits for the disk.

        The model cannot be used afterwards; what other threads are computing ends first.
        """
        with self.engine.turn:
            try:
                self.engine.close()
            finally:
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
            if self._tokenizer and self._remembers_answers:
                self._tokenizer.answers.note(saved.tokens)
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

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles grammars for the model's tokens. Raises what `tokenizer` does."""
        return Grammars(self.tokenizer, self.config.vocab_size, self._end_tokens)

    @cached_property
    def chats(self) -> Chats:
        """Writes conversations, with the tools that they may use. Raises what `tokenizer` does."""
        return Chats(self.tokenizer)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Prefill `token_ids` from an empty sequence, as generation would -> fp32 logits [T, vocab_size]."""
        return self.engine.logits(_token_ids(token_ids))

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue `prompt`: text (BOS is prepended, special tokens in it are parsed) or token ids, used unchanged.

        Options; None means the model's default:
            max_tokens: maximum tokens to generate; default, or -1: until an end token or a full context; 0: none, only
                the prompt is computed.
            temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias,
                seed: see `SamplingParams`.
            stop: a string, or several; the answer ends before the first one that appears.
            logprobs: how many of the most likely tokens to return with each token (0: only its own log probability).
            prompt_logprobs: the same for the tokens of the prompt (`Generation.prompt_logprobs`), all of which are
                computed then, also those that the prefix cache has.
            priority: answers with a higher one are computed first (default 0).
            timeout: seconds after which the answer ends with a `DeadlineError`, waiting included; default: never.
            schema, grammar, regex: what the answer must look like, one of these (llguidance must be installed): a JSON
                schema, e.g. {"type": "object"}; a grammar in llguidance's dialect of Lark; or a regular expression that
                matches the whole answer. The answer ends where nothing more may follow.
            strict: refuse keywords of the schema that a grammar cannot express; default: they are ignored.
            progress: called with (tokens done, tokens of the prompt) before every chunk of the prefill.

        Raises:
            InputError: an option is out of range, text is not Unicode, or a schema or grammar is not supported (raised
                by this call), or a token id is out of range (by the first `next`).
            ContextLengthError: the prompt does not fit in the context (raised by the first `next`, or by this call if
                the prompt is longer than any text of so many tokens).
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(inlet.text(prompt, "the prompt"), context=self.context)
        else:
            ids = _token_ids(prompt)
        return self._generation(ids, strip=False, **options)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: str | None = None,
        parallel_tool_calls: bool | None = None,
        documents: Sequence[Any] | None = None,
        continue_final: bool = False,
        **options: Any,
    ) -> Generation:
        """Answer a conversation: messages with `role` and `content`, as in OpenAI's API.

        Roles are system (or developer), user, assistant and tool. System messages at the beginning are joined; a later
        one becomes the user's. White space before the first word of the answer is removed: the chat template inserts
        its own when the answer becomes part of the next prompt. Answers in `messages` that this model wrote have the
        tokens in which it wrote them, which the prefix cache knows (not with `batch_invariant`).

        Args:
            messages: the assistant's may have `tool_calls` (`[{"id", "type": "function", "function": {"name",
                "arguments": JSON text}}]`), and a tool's has a `tool_call_id`.
            tools: functions that the model may call: `[{"type": "function", "function": {"name", "description",
                "parameters": JSON schema}}]`. Calls are in `Chunk.calls` and `Generation.tool_calls`. If llguidance is
                installed, their arguments follow the schemas.
            tool_choice: "auto" (default), "none", "required" (the answer is a call), or the name of the function to
                call.
            parallel_tool_calls: whether the answer may have several calls (default) or ends after the first.
            documents: for chat templates that know them, as in transformers' `apply_chat_template`.
            continue_final: go on with the last message, the assistant's, instead of a new one. If it has no text, the
                answer begins as usual.
            options: those of `generate`, with its errors. With tools, a schema is that of answers without a call;
                a grammar or regex excludes tools.
        """
        if isinstance(messages, Sequence) and not messages:
            raise InputError("there is no message to answer")
        prompt = self.chats.prompt(
            messages, tools=tools, tool_choice=tool_choice, parallel_tool_calls=parallel_tool_calls,
            documents=documents, continue_final=continue_final, context=self.context,
        )  # fmt: skip
        if prompt.functions:
            options["constraint"] = self._forms.of_calls(self.chats, prompt, options)
        options["writing"] = self.tokenizer.answers.begin(prompt.ids) if self._remembers_answers else None
        options["lead"] = prompt.lead or ""
        return self._generation(prompt.ids, strip=prompt.strip, parser=self.chats.parser(prompt), **options)

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

    def count_tokens(self, messages: Sequence[Message], **options: Any) -> int:
        """Number of tokens of the prompt that `chat` makes of `messages`, with its options that change the prompt:
        tools, tool_choice, documents, continue_final."""
        return len(self.chats.prompt(messages, **options).ids)

    def _generation(
        self,
        ids: list[int],
        *,
        strip: bool,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        priority: int = 0,
        timeout: float | None = None,
        schema: Any = None,
        grammar: str | None = None,
        regex: str | None = None,
        strict: bool = False,
        progress: Progress | None = None,
        parser: AnswerParser | None = None,
        constraint: Constraint | None = None,
        writing: Writing | None = None,
        lead: str = "",
        **sampling: Any,
    ) -> Generation:
        if max_tokens is not None:
            limit = checked("max_tokens", max_tokens, Number(whole=True), InputError)
            # Other programs write "no limit" as -1.
            max_tokens = None if limit == -1 else checked("max_tokens", limit, Number(0, whole=True), InputError)
        if logprobs is not None:
            logprobs = checked("logprobs", logprobs, Number(0, whole=True), InputError)
        if prompt_logprobs is not None:
            prompt_logprobs = checked("prompt_logprobs", prompt_logprobs, Number(0, whole=True), InputError)
        if not (progress is None or callable(progress)):
            raise InputError(f"progress must be a function, not {shown(progress)}")
        priority = checked("priority", priority, Number(whole=True), InputError)
        if timeout is not None:
            timeout = checked("timeout", timeout, Number(0), InputError)
        params = self.defaults.override(**sampling)
        strict = checked("strict", strict, Flag(), InputError)
        if constraint is None:
            constraint = self._forms.of_answer(schema, grammar, regex, strict, lead)
        request = Request(
            ids, params, max_tokens, self._end_tokens, logprobs, priority, timeout, constraint, prompt_logprobs
        )
        stops = [inlet.well_formed(checked("stop", each, Text(), InputError), "stop") for each in _listed("stop", stop)]
        stream = TextStream(self._tokenizer, self._end_tokens, stops, strip, parser, writing)
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
    cache_ram: int | None = 0,
    cache_dir: str | Path | None = None,
    cache_disk: int | None = None,
    cache_notice: Callable[[str], object] | None = None,
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
            the CPU, and conversations the tokenizer's own ids. It costs nothing for prompts of 500 tokens, 5 % at
            2,000 and 60 % at 8,000 (V2-Lite's shape).
        cache_ram: bytes of RAM for what the prefix cache has no room for; None: four times the KV cache, but at most an
            eighth of the RAM that is free then, and nothing if there is a `cache_dir`, whose files the system keeps in
            free RAM anyway. They are used as they are needed.
        cache_dir: a directory for it: what was read is not read again, after a restart either. What is evicted is
            written in the background, everything else when the model is closed (`LLM.close`). Only the user can read
            the files; they hold the text of conversations. Further processes with the same model read them.
        cache_disk: the most bytes in `cache_dir`; the least recently used are deleted. None: 16 GiB, or half of what
            the disk has room for if that is less.
        cache_notice: called with a line of text if the files can no longer be written, or one is damaged; by any
            thread. None: it is added to `LLM.notes`.
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
        SavedCacheError: `cache_dir` cannot be used.
        HubError: the repository cannot be fetched.
    """
    if checked("dtype", dtype, Text(), InputError) not in ("auto", *DTYPES):
        raise InputError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)} (float16 overflows in DeepSeek-V2)")
    mode, latents = one_of("experts", experts, Mode), one_of("cache type", cache_dtype, CACHE_DTYPES)
    devices = workstation.find_devices(checked("device", device, Text(), InputError))
    if vram is not None:
        vram = [checked("vram", size, Number(0, whole=True), InputError) for size in _listed("vram", vram)]
    if parallel is not None:
        parallel = checked("parallel", parallel, Number(1, whole=True), InputError)
    if cache_ram is not None:
        cache_ram = checked("cache_ram", cache_ram, Number(0, whole=True), InputError)
    if cache_disk is not None:
        cache_disk = checked("cache_disk", cache_disk, Number(0, whole=True), InputError)
        if cache_dir is None:
            raise InputError("cache_disk limits the files in cache_dir; name that directory too")
    kept_in = None if cache_dir is None else homes.expanded(_path(cache_dir))
    directory = bundled_model() if model is None else hub.resolve_converted(str(model), verifying)

    def load_on(devices: list[Device]) -> LLM:
        activations = DTYPES.get(dtype, torch.bfloat16 if devices else torch.float32)
        return LLM(
            directory, dtype=activations, context=context, threads=threads, cache_dtype=latents, experts=mode,
            devices=devices, vram=vram, parallel=parallel, batch_invariant=batch_invariant,
            cache_ram=cache_ram, cache_dir=kept_in, cache_disk=cache_disk, cache_notice=cache_notice,
            progress=progress, preparing=preparing,
        )  # fmt: skip

    reason = workstation.passed_over() if device == "auto" else None
    try:
        loaded = load_on(devices)
    except PlanError as error:
        if not devices or device != "auto" or vram is not None or mode is not Mode.AUTO:
            raise
        loaded, reason = load_on([]), str(error)
    if reason:
        loaded.notes.append(f"the GPU is not used: {reason}")
    return loaded


def bundled_model() -> Path:
    """Directory of dsv2-nano, the small model that ships with the package."""
    return Path(__file__).parent / "nano"


def _context(requested: int | None, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if requested is None:
        return default_context(config)
    context: int = checked("context", requested, Number(whole=True), InputError)
    if not 2 <= context <= limit:
        raise InputError(f"context must be between 2 and the model's {limit:,} tokens, not {shown(context)}")
    return context


def _cache_ram(requested: int | None, cache: int, files: BlockFiles | None) -> int:
    """Bytes of RAM for the block store of a KV cache of `cache` bytes, when the model is loaded.

    Raises:
        InputError: there is less.
    """
    free = memory_available()
    if requested is None:
        return 0 if files else min(4 * cache, free // 8)
    if requested > free:
        raise InputError(
            f"cache_ram asks for {requested / 2**30:,.2f} GiB, and {free / 2**30:,.2f} GiB are free when the model is "
            "loaded; ask for less"
        )
    return requested


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
