"""Sequences through the model, one at a time: chunked prefill, decode, and the figures of both.

The engine knows token ids and nothing of text. The cache keeps what earlier prompts and answers left there while it has
room, so that a prompt that begins like one of them computes only what differs.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dsv2_local.errors import ContextLengthError, InputError
from dsv2_local.graph_step import GraphStep, decode_step
from dsv2_local.kernels.format import Cache
from dsv2_local.lookup import GRAM, Lookup
from dsv2_local.model import Transformer
from dsv2_local.offload.device import typed_errors
from dsv2_local.offload.plan import CPU_CHUNK
from dsv2_local.sampling import Outcome, Sampler, SamplingParams

Progress = Callable[[int, int], None]


@dataclass
class Stats:
    """The figures of one generation, kept current while it runs. Seconds are the model's and the sampler's."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    completion_tokens: int = 0
    decode_seconds: float = 0.0
    guessed_tokens: int = 0
    right_guesses: int = 0
    """Of tokens that `lookup.Lookup` guessed."""
    context_used: int = 0
    context: int = 0
    finish_reason: str | None = None
    """"stop" (end token or stop string), "length" (max_tokens or context), None while running or interrupted."""

    @property
    def prefill_tok_s(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second after the first, which is prefill's."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Step:
    """One generated token; `logprob` and `top_logprobs` (most likely first) only when asked for."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class _Guess:
    """Tokens that may come, what comes after each of them and before, and how many came so far."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.right = tokens, 0
        self.outcomes: list[Outcome] = []
        self.seconds = 0.0


class _Pending:
    """What comes after a token, perhaps not yet computed."""

    def __init__(self, wait: Callable[[], Outcome]) -> None:
        self.outcome = wait

    def keep(self) -> None:
        """Have all that may be asked of it before another step begins."""
        outcome = self.outcome()
        logits = outcome.logits().clone()
        self.outcome = lambda: replace(outcome, logits=lambda: logits)


class Engine:
    """A model with its cache. Generations may take turns; each goes on where it was."""

    def __init__(self, model: Transformer, context: int, chunk: int = CPU_CHUNK, cache: Cache = Cache.BF16) -> None:
        """Allocate a cache of `context` tokens, as `Transformer.new_cache` makes it; prefill in steps of `chunk`."""
        self.model = model
        self.chunk = chunk
        self.cache = model.new_cache(context, cache)
        self._step = decode_step(model, self.cache)
        self._tokens: list[int] = []  # those in the cache, and perhaps some after them of a step that failed
        self._turn: object = None  # whose sequence is in the cache
        self._guess: _Guess | None = None
        self._early: _Pending | None = None  # of the present turn, begun before its token was told

    def warm_up(self, progress: Progress = lambda done, of: None) -> None:
        """Do before the first prompt what would make it wait: compile kernels for GPUs."""
        if isinstance(self._step, GraphStep):
            with typed_errors():
                self._step.warm_up(progress)

    @property
    def context(self) -> int:
        return self.cache.context

    @property
    def tokens(self) -> list[int]:
        """Those in the cache."""
        return self._tokens[: self.cache.length]

    def resume(self, tokens: list[int]) -> None:
        """Take the cache's sequence for one of these tokens; a prompt that begins alike computes only what differs."""
        self._turn, self._tokens = None, tokens

    def set_aside(self) -> None:
        """Keep what the cache holds of the present sequence, for prompts that begin like it."""
        self.cache.keep(self.tokens)

    def logits(self, ids: list[int]) -> Tensor:
        """fp32 logits [T, vocab_size] after every token, by the same chunked prefill, from an empty cache."""
        self._check(ids)
        if len(ids) > self.context:
            raise ContextLengthError(len(ids), self.context)
        self._begin([], None)
        return torch.cat([self.model.logits(hidden) for hidden in self._prefill(ids, None)])

    def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        stats: Stats,
        *,
        max_tokens: int | None = None,
        end_tokens: frozenset[int] = frozenset(),
        logprobs: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Step]:
        """Prefill `prompt` and yield tokens until an end token (yielded too), max_tokens or a full context.

        Raises:
            ContextLengthError: the prompt and one token more do not fit.
            InputError: an id is outside the vocabulary.
        """
        self._check(prompt)
        if len(prompt) >= self.context:
            raise ContextLengthError(len(prompt), self.context)
        turn, text = object(), [*prompt]
        sampler, lookup = Sampler(params, prompt), Lookup(prompt)
        stats.context = self.context
        outcome = Outcome.known(self._start(prompt, turn, stats, progress))
        while True:
            start = time.perf_counter()
            token = sampler.choose(outcome)
            if stats.completion_tokens:  # the first is prefill's
                stats.decode_seconds += time.perf_counter() - start
            stats.completion_tokens += 1
            stats.finish_reason = self._finish_reason(token, stats.completion_tokens, max_tokens, end_tokens)
            step = _step(token, outcome, logprobs)
            lookup.push(token)
            early = self._step.ahead and not stats.finish_reason
            pending = self._early = self._next(token, params, stats, lookup) if early else None
            yield step
            if stats.finish_reason:
                return
            if turn is not self._turn:
                self._return([*text, token] if pending else text, turn, stats)
            outcome = (pending or self._next(token, params, stats, lookup)).outcome()
            self._early = None
            stats.context_used = self.cache.length
            text.append(token)

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise InputError("the prompt is empty")
        vocab = self.model.config.vocab_size
        if wrong := [id for id in ids if not 0 <= id < vocab]:
            raise InputError(f"token id {wrong[0]} is outside the vocabulary of {vocab:,}")

    def _start(self, prompt: list[int], turn: object, stats: Stats, progress: Progress | None) -> Tensor:
        """Prefill what the cache lacks of the prompt; the logits after its last token, [vocab]."""
        start = time.perf_counter()
        self._begin(prompt[:-1], turn)  # one token at least must run, to have logits
        stats.prompt_tokens, stats.reused_tokens = len(prompt), self.cache.length
        stats.context_used = self.cache.length
        for hidden in self._prefill(prompt, progress):
            last = hidden[-1:]
            stats.context_used = self.cache.length
        logits = self.model.logits(last)[0]
        stats.prefill_seconds = time.perf_counter() - start
        return logits

    def _begin(self, tokens: list[int], turn: object) -> None:
        """Set the sequence aside for another, which has what is kept of `tokens`."""
        if self._early:
            self._early.keep()
        self.set_aside()
        self._turn, self._guess, self._early = turn, None, None
        self._tokens = tokens[: self.cache.begin(tokens)]

    def _return(self, text: list[int], turn: object, stats: Stats) -> None:
        """Go on with a sequence after another's turn; what the cache had no room for is read again."""
        start = time.perf_counter()
        self._begin(text, turn)
        for _ in self._prefill(text, None):
            pass
        stats.decode_seconds += time.perf_counter() - start

    def _prefill(self, ids: list[int], progress: Progress | None) -> Iterator[Tensor]:
        """Run what follows the cached tokens chunk by chunk; yields each chunk's hidden states [t, D]."""
        while (done := self.cache.length) < len(ids):
            if progress:
                progress(done, len(ids))
            yield self._run(ids[done : done + self.chunk])
        if progress:
            progress(len(ids), len(ids))

    def _next(self, token: int, params: SamplingParams, stats: Stats, lookup: Lookup) -> _Pending:
        """Begin what tells what comes after `token`, if it is not known, and after those that can be guessed."""
        guess = self._guess
        if guess and token in guess.tokens[guess.right : guess.right + 1]:
            self._note([token])
            self.cache.advance(1)  # its latents are there already
            guess.right += 1
            return _Pending(partial(guess.outcomes.__getitem__, guess.right))
        if guess:
            lookup.took(guess.seconds, len(guess.tokens), guess.right)
            stats.guessed_tokens, stats.right_guesses = lookup.guessed, lookup.right
        length = self.cache.length
        tokens = self._guessed(lookup, self.context - length - 1)
        self._note([token, *tokens])
        with typed_errors():
            wait = self._step.begin([token, *tokens], params)
        if tokens:
            self.cache.truncate(length + 1)
        self._guess = guess = _Guess(tokens)

        def outcome() -> Outcome:
            with typed_errors():
                guess.outcomes, guess.seconds = wait()
            stats.decode_seconds += guess.seconds
            return guess.outcomes[0]

        return _Pending(outcome)

    def _guessed(self, lookup: Lookup, room: int) -> list[int]:
        """Tokens that may come next, as many as a step takes beside its own."""
        most = min(self._step.guesses, room)
        return lookup.guess(most) if most >= GRAM else []

    def _run(self, ids: list[int]) -> Tensor:
        self._note(ids)
        with typed_errors():
            return self.model.forward(torch.tensor(ids), self.cache)

    def _note(self, ids: list[int]) -> None:
        """Remember what a step will add before it runs, so that an interrupt leaves no unknown tokens in the cache."""
        self._tokens[self.cache.length :] = ids

    def _finish_reason(self, token: int, count: int, max_tokens: int | None, end: frozenset[int]) -> str | None:
        if token in end:
            return "stop"
        full = self.cache.length >= self.context
        return "length" if full or (max_tokens is not None and count >= max_tokens) else None


def _step(token: int, outcome: Outcome, logprobs: int | None) -> Step:
    if logprobs is None:
        return Step(token)
    logits = outcome.logits()
    all_logprobs = logits.log_softmax(0)
    values, ids = all_logprobs.topk(min(logprobs, len(logits)))
    return Step(token, float(all_logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
