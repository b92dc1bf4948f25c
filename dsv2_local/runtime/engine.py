"""The engine: chunked prefill, decode with speculative drafts, prefix reuse, and statistics of each generation.

The engine handles token ids, not text. It computes one sequence at a time. Generations may take turns, token by token,
in one thread or in several: the engine then switches between their sequences through the prefix cache. (There is no
scheduler yet that batches several sequences into one step.)
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2_local.errors import ContextLengthError, InputError, NonFiniteError
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.offload.device import typed_errors
from dsv2_local.offload.plan import CPU_CHUNK
from dsv2_local.progress import Progress, no_progress
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.gpu_step import GpuStep
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.prompt_lookup import NGRAM, PromptLookup
from dsv2_local.runtime.sampler import Sampler
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.step import Step, StepResult


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt: token ids.
        params: how to sample.
        max_tokens: the most tokens to generate; None: until an end token or a full context.
        end_tokens: token ids that end the answer.
        logprobs: how many of the most likely tokens to return with each generated one (0: only its own log
            probability); None: no log probabilities.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int | None = None
    end_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None


@dataclass
class Stats:
    """Statistics of one generation, updated while it runs.

    Attributes:
        prompt_tokens: tokens of the prompt.
        reused_tokens: tokens of the prompt that were found in the prefix cache.
        prefill_seconds: time from the start to the logits after the prompt.
        completion_tokens: generated tokens.
        decode_seconds: time of the model and the sampler for all generated tokens but the first.
        draft_tokens: draft tokens that were verified (speculative decoding).
        accepted_tokens: draft tokens that the sampler chose.
        context_used: tokens in the KV cache.
        context: maximum tokens of a sequence.
        finish_reason: "stop" (end token or stop string) or "length" (max_tokens or a full context); None while the
            generation runs, or if it was interrupted.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    completion_tokens: int = 0
    decode_seconds: float = 0.0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    context_used: int = 0
    context: int = 0
    finish_reason: str | None = None

    @property
    def prefill_tok_s(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second after the first token, whose time is part of the prefill."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token; `logprob` and `top_logprobs` (most likely first) only if requested."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Engine:
    """A model with its KV cache.

    Attributes:
        model: the transformer.
        chunk: tokens per prefill step.
        cache: the KV cache, with the sequence that is being computed.
        step: the decode step.
        turn: held by the thread that computes; whoever reads or changes the cache takes it (`opened`).
    """

    def __init__(self, model: Transformer, context: int, cache_dtype: CacheDtype, chunk: int = CPU_CHUNK) -> None:
        """Allocate a KV cache for `context` tokens; `chunk` is the number of tokens per prefill step."""
        self.model, self.chunk = model, chunk
        self.turn, self._computing, self._closed = threading.RLock(), False, False
        self.cache = model.new_cache(context, cache_dtype)
        self.step = decode_step(model, self.cache)
        self._tokens: list[int] = []  # the tokens in the cache; after a failed step, with that step's tokens after them
        self._active: object = None  # the generation whose sequence is in the cache
        self._result: StepResult | None = None  # the active generation's latest step
        self._early = False  # whether that step was launched before its token was yielded, and is not used yet

    def warm_up(self, progress: Progress = no_progress) -> None:
        """Compile the GPU kernels, which the first prompt would otherwise wait for; nothing to do on the CPU."""
        with typed_errors():
            self.step.warm_up(progress)

    @property
    def context(self) -> int:
        return self.cache.context

    @property
    def tokens(self) -> list[int]:
        """The tokens of the sequence in the cache."""
        return self._tokens[: self.cache.length]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Have the engine for this thread alone, one step or one access to the cache long.

        Raises:
            InputError: the engine is closed, or this thread has it already: a callback must not use the model.
        """
        with self.turn:
            if self._closed:
                raise InputError("the model is closed and cannot be used again; load it once more")
            if self._computing:
                raise InputError(
                    "the model is computing and cannot be used from its own callback; raise an error there to stop it"
                )
            try:
                self._computing = True
                yield
            finally:
                self._computing = False

    def close(self) -> None:
        """Refuse all further use, also by generations that have begun. Raises what `opened` does."""
        if not self._closed:
            with self.opened():
                self._closed = True

    def adopt(self, tokens: list[int]) -> None:
        """Declare that the cache now holds a sequence of these tokens, as after loading one from a file."""
        self._active, self._tokens = None, tokens

    def cache_prefix(self) -> None:
        """Put the current sequence into the prefix cache, for prompts that begin like it."""
        self.cache.insert_prefix(self.tokens)

    def logits(self, ids: list[int]) -> Tensor:
        """Prefill `ids` in chunks from an empty sequence -> fp32 logits [T, vocab_size] after every token."""
        self._check(ids)
        if len(ids) > self.context:
            raise ContextLengthError(len(ids), self.context)
        with self.opened():
            self._switch_to(None, [])
            logits = torch.cat([self.model.logits(hidden) for hidden in self._prefill(ids, no_progress)])
            if not logits.isfinite().all():
                raise self._located(NonFiniteError("the logits"))
            return logits

    def generate(self, request: Request, stats: Stats, progress: Progress = no_progress) -> Iterator[GeneratedToken]:
        """Prefill the prompt, and yield tokens until an end token (yielded too), max_tokens or a full context.

        Each token is computed under the lock; between two tokens other threads may compute.

        Args:
            request: the prompt, and how to generate.
            stats: updated with every token.
            progress: called with (tokens done, tokens of the prompt) before every chunk of the prefill.

        Raises:
            ContextLengthError: the prompt and one more token do not fit in the context.
            InputError: the prompt is empty, a token id is outside the vocabulary, or the engine is closed.
            NonFiniteError: the model computed NaN or infinity; nothing of it stays in the cache.
        """
        tokens = self._generate(request, stats, progress)
        while True:
            with self.opened():
                generated = next(tokens, None)
            if generated is None:
                return
            yield generated

    def _generate(self, request: Request, stats: Stats, progress: Progress) -> Iterator[GeneratedToken]:
        """See `generate`; the caller has the lock while this runs."""
        prompt = request.prompt
        self._check(prompt)
        if len(prompt) >= self.context:
            raise ContextLengthError(len(prompt), self.context)
        generation, text = object(), [*prompt]  # the identity of this generation; its tokens in the cache
        sampler, lookup = Sampler(request.params, prompt), PromptLookup(prompt)
        stats.context = self.context
        result = self._start(generation, prompt, stats, progress)
        while True:
            start = time.perf_counter()
            try:
                token = sampler.choose(result)
            except NonFiniteError as error:
                raise self._located(error) from None
            if stats.completion_tokens:  # the first token's time is part of the prefill
                stats.decode_seconds += time.perf_counter() - start
            stats.completion_tokens += 1
            stats.finish_reason = self._finish_reason(request, token, stats.completion_tokens)
            generated = _with_logprobs(token, result, request.logprobs)
            lookup.append(token)
            # On a GPU the next step runs while the caller detokenises and prints this token.
            self._early = self.step.asynchronous and not stats.finish_reason
            launched = self._next(token, request.params, stats, lookup) if self._early else None
            yield generated
            if stats.finish_reason:
                return
            if generation is not self._active:
                self._return_to(generation, [*text, token] if launched else text, stats)
            result = launched or self._next(token, request.params, stats, lookup)
            self._early = False
            if not result.accepted:  # a new step; the logits after an accepted draft token are already there
                result.wait()
                stats.decode_seconds += result.seconds
            stats.context_used = self.cache.length
            text.append(token)

    def _located(self, error: NonFiniteError) -> NonFiniteError:
        """Find the part of the model that computed NaN or infinity, and empty the cache, which has them too."""
        ids, self._result, self._early = self.tokens, None, False
        self.adopt([])
        self.cache.clear()
        with typed_errors():
            for start in range(0, len(ids), self.chunk):
                if where := self.model.find_non_finite(torch.tensor(ids[start : start + self.chunk]), self.cache):
                    error = NonFiniteError(where)
                    break
        self.cache.clear()
        return error

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise InputError("the prompt is empty")
        vocab = self.model.config.vocab_size
        if wrong := [id for id in ids if not 0 <= id < vocab]:
            raise InputError(f"token id {wrong[0]} is outside the vocabulary of {vocab:,}")

    def _start(self, generation: object, prompt: list[int], stats: Stats, progress: Progress) -> StepResult:
        """Prefill the part of the prompt that is not in the prefix cache; returns the logits after its last token."""
        start = time.perf_counter()
        self._switch_to(generation, prompt[:-1])  # the last token must run in any case, to get its logits
        stats.prompt_tokens, stats.reused_tokens = len(prompt), self.cache.length
        stats.context_used = self.cache.length
        for hidden in self._prefill(prompt, progress):
            last = hidden[-1:]
            stats.context_used = self.cache.length
        logits = self.model.logits(last)
        stats.prefill_seconds = time.perf_counter() - start
        return StepResult(logits)

    def _switch_to(self, generation: object, tokens: list[int]) -> None:
        """Put the current sequence into the prefix cache, and begin one with the longest cached prefix of `tokens`."""
        if self._early and self._result:
            self._result.detach()  # the generation that launched this step will use its logits later
        self.cache_prefix()
        self._active, self._result, self._early = generation, None, False
        self._tokens = tokens[: self.cache.match_prefix(tokens)]

    def _return_to(self, generation: object, text: list[int], stats: Stats) -> None:
        """Continue a sequence after another generation's turn; recompute what was evicted of it meanwhile."""
        start = time.perf_counter()
        self._switch_to(generation, text)
        for _ in self._prefill(text, no_progress):
            pass
        stats.decode_seconds += time.perf_counter() - start

    def _prefill(self, ids: list[int], progress: Progress) -> Iterator[Tensor]:
        """Run the tokens after the cached ones chunk by chunk; yields each chunk's hidden states [t, D]."""
        while (done := self.cache.length) < len(ids):
            progress(done, len(ids))
            yield self._run(ids[done : done + self.chunk])
        progress(len(ids), len(ids))

    def _next(self, token: int, params: SamplingParams, stats: Stats, lookup: PromptLookup) -> StepResult:
        """Start the step for `token` plus draft tokens, unless a verified draft already holds its logits."""
        result = self._result
        if result and result.accept(token):
            self._record([token])
            self.cache.advance(1)  # verifying the draft has written its latents already
            return result
        if result:
            lookup.observe(result.seconds, len(result.draft), result.accepted)
            stats.draft_tokens, stats.accepted_tokens = lookup.drafted, lookup.accepted
        length = self.cache.length
        tokens = [token, *self._draft(lookup, self.context - length - 1)]
        self._record(tokens)
        with typed_errors():
            self._result = result = self.step.launch(tokens, params)
        if result.draft:
            self.cache.truncate(length + 1)  # draft tokens count only once they are accepted
        return result

    def _draft(self, lookup: PromptLookup, room: int) -> list[int]:
        """Propose draft tokens: at most as many as a step verifies and the context has room for."""
        most = min(self.step.max_draft, room)
        return lookup.propose(most) if most >= NGRAM else []

    def _run(self, ids: list[int]) -> Tensor:
        self._record(ids)
        with typed_errors():
            return self.model.forward(torch.tensor(ids), self.cache)

    def _record(self, ids: list[int]) -> None:
        """Note the tokens of a step before it runs, so that an interrupt never leaves unknown tokens in the cache."""
        self._tokens[self.cache.length :] = ids

    def _finish_reason(self, request: Request, token: int, count: int) -> str | None:
        if token in request.end_tokens:
            return "stop"
        full = self.cache.length >= self.context
        return "length" if full or (request.max_tokens is not None and count >= request.max_tokens) else None


def decode_step(model: Transformer, cache: LatentCache) -> Step:
    """The decode step for this model: `GpuStep` if all layers are on GPUs with Triton's kernels, else `CpuStep`."""
    on_gpus = all(ops.capturable(layer.device) for layer in model.layers)
    return GpuStep(model, cache) if on_gpus else CpuStep(model, cache)


def _with_logprobs(token: int, result: StepResult, logprobs: int | None) -> GeneratedToken:
    if logprobs is None:
        return GeneratedToken(token)
    logits = result.logits()
    all_logprobs = logits.log_softmax(0)
    values, ids = all_logprobs.topk(min(logprobs, len(logits)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return GeneratedToken(token, float(all_logprobs[token]), top)
