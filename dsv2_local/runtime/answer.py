"""One answer that the engine generates: what is asked, how tokens are chosen, where they go, and its statistics."""

from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Protocol

from dsv2_local.errors import Dsv2Error
from dsv2_local.progress import Progress, no_progress
from dsv2_local.runtime.constraint import Constraint
from dsv2_local.runtime.prompt_logprobs import PromptLogprobs
from dsv2_local.runtime.prompt_lookup import NGRAM, Payoff, PromptLookup
from dsv2_local.runtime.sampler import Sampler
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.sequence import Sequence
from dsv2_local.runtime.stats import Stats
from dsv2_local.runtime.step import StepResult
from dsv2_local.runtime.waiting import Scheduled, State


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt: token ids.
        params: how to sample.
        max_tokens: the most tokens to generate; 0: the prompt alone is computed; None: until an end token or a
            full context.
        end_tokens: token ids that end the answer.
        logprobs: how many of the most likely tokens to return with each generated one (0: only its own log
            probability); None: no log probabilities.
        priority: requests with a higher one start first.
        timeout: seconds after which the request ends with a `DeadlineError`; None: never.
        constraint: what the answer must look like, in its first state, which it stays in; None: anything.
        prompt_logprobs: as `logprobs`, for the tokens of the prompt, all of which are computed then.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int | None = None
    end_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    priority: int = 0
    timeout: float | None = None
    constraint: Constraint | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token; `logprob` and `top_logprobs` (most likely first) only if requested."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Reader(Protocol):
    """Who receives an answer. Both methods are called by the thread that computes, and must not use the engine."""

    def receive(self, token: GeneratedToken) -> bool:
        """Take a token; returns whether the answer ends with it, e.g. because of a stop string."""
        ...

    def end(self, error: BaseException | None) -> None:
        """The answer is complete, or was cancelled, or failed with an error."""
        ...


class Answer(Scheduled):
    """An answer, from its request to its end.

    Attributes:
        request: what is asked.
        stats: updated with every step.
        progress: called with (tokens done, tokens of the prompt) before every chunk of the prefill.
        reader: receives the tokens.
        paced: whether it is computed no further than it is asked for (`asked`).
        asked: whether its reader has read all tokens.
        prompt_logprobs: those of the prompt; None if they are not asked for.
        result: the logits of its latest step; None if it needs another step.
        drawn: whether the newest token was drawn from the result; the next one of a draft may still be in it.
        error: why it ended, if that was an error.
    """

    def __init__(
        self,
        request: Request,
        sequence: Sequence,
        stats: Stats,
        reader: Reader,
        progress: Progress = no_progress,
        *,
        paced: bool = False,
    ) -> None:
        """An answer that is not computed yet, to `request` and for a sequence of its prompt."""
        most = sequence.context if request.max_tokens is None else sequence.prompt + request.max_tokens
        deadline = None if request.timeout is None else monotonic() + request.timeout
        super().__init__(
            sequence, min(most, sequence.context), priority=request.priority, deadline=deadline,
            prompt_only=request.max_tokens == 0,
        )  # fmt: skip
        self.request, self.stats, self.reader, self.progress = request, stats, reader, progress
        self.paced, self.asked = paced, True
        self.prompt_logprobs: PromptLogprobs | None = None
        if request.prompt_logprobs is not None:
            self.prompt_logprobs = PromptLogprobs(request.prompt, request.prompt_logprobs)
            sequence.needed = 0
        self.result: StepResult | None = None
        self.drawn = False
        self.error: BaseException | None = None
        self._constraint = request.constraint.copy() if request.constraint else None
        self._sampler = Sampler(request.params, request.prompt, self._constraint)
        self._lookup = PromptLookup(request.prompt)
        self._forced, self._payoff = False, Payoff()  # whether the draft is what the constraint forces; if that pays
        self._began = 0.0
        stats.prompt_tokens, stats.context = sequence.prompt, sequence.context

    @property
    def wants(self) -> bool:
        """Whether a token is asked for, or as many as there will be; see `Scheduled`."""
        return self.asked or not self.paced

    @property
    def needs_step(self) -> bool:
        """Whether there are no logits to draw its next token from; see `Scheduled`."""
        return self.result is None

    @property
    def needs_draw(self) -> bool:
        """Whether its next token can be drawn, at the latest when the step ends."""
        return self.result is not None and not self.drawn

    @property
    def candidate_params(self) -> SamplingParams:
        """See `Sampler`."""
        return self._sampler.candidate_params

    @property
    def is_next(self) -> bool:
        """Whether it takes part in the next decode step, if there is room."""
        return self.state is State.DECODING and self.needs_step and self.wants

    def preempted(self) -> None:
        """Drop what its latest step has verified beyond the next token, since the latents are gone; see `Scheduled`."""
        if self.result:
            self.result.drop_draft()
            if self.drawn:
                self.result = None

    @property
    def ended(self) -> bool:
        """Whether it was finished, was cancelled, or failed (`error`)."""
        return self.state is State.FINISHED

    def end(self, error: BaseException | None) -> None:
        """Note why it ended, and tell its reader."""
        self.result, self.error = None, error
        self.reader.end(error)

    def propose(self, most: int) -> None:
        """Find a draft of at most `most` tokens for the next step: what the constraint forces, or a lookup's."""
        room, forced = min(most, self.most_tokens - self.sequence.length - 1), []
        self.draft, self._forced = [], False
        if room < NGRAM:
            return
        if self._constraint:
            forced = self._constraint.forced()[:room]
            if len(forced) >= NGRAM:
                if self._payoff.expected(len(forced)):
                    self.draft, self._forced = forced, True
                return
        draft = self._lookup.propose(room)
        if self._constraint and draft:
            draft = draft[: self._constraint.accepts(draft)]
        if len(draft) >= NGRAM and draft[: len(forced)] == forced:
            self.draft = draft

    def look_ahead(self) -> None:
        """Compute which tokens the constraint allows next, while the step runs that computes their logits."""
        if self._constraint and self.needs_draw:
            with suppress(Dsv2Error):  # raised again when the token is drawn
                if not self._constraint.forced():
                    self._constraint.mask()

    def begin_prefill(self) -> None:
        """Note that its first chunk begins."""
        if not self._began:
            self._began = perf_counter()
            self.stats.reused_tokens = self.stats.context_used = self.sequence.length
            self.stats.restored_tokens = self.sequence.restored

    def take_prompt_logprobs(self) -> None:
        """Keep the log probabilities that a pass has computed; the hidden states before are not needed any more."""
        if found := self.prompt_logprobs:
            found.take()
            self.sequence.needed = None if found.complete else found.read

    @property
    def finite(self) -> bool:
        """Whether the logits of the prompt from which no token is drawn had no NaN and no infinity."""
        if self.prompt_logprobs and not self.prompt_logprobs.finite:
            return False
        return not (self.prompt_only and self.result) or bool(self.result.logits().isfinite().all())

    def end_prefill(self, result: StepResult) -> None:
        """Take the logits after the prompt."""
        self.result, self.drawn = result, False
        self.stats.prefill_seconds = perf_counter() - self._began
        if self.prompt_only:
            self.stats.finish_reason = "length"

    def take(self, result: StepResult) -> None:
        """Take the logits of a step of its newest token and its draft."""
        self.result, self.drawn, self.draft = result, False, []
        if result.draft:
            # Draft tokens count only once they are accepted.
            self.sequence.truncate(self.sequence.length - len(result.draft))

    def draw(self) -> GeneratedToken:
        """Draw the next token, and append it.

        Raises:
            NonFiniteError: a logit is NaN or infinite.
            InputError: the logit bias names a token outside the vocabulary, or the constraint cannot go on.
            DeviceError: the step failed on the GPU.
        """
        result, stats, start = self.result, self.stats, perf_counter()
        assert result is not None
        token = self._sampler.choose(result)
        if stats.completion_tokens:  # the first token's time is part of the prefill
            stats.decode_seconds += perf_counter() - start
            if not result.accepted:
                stats.decode_seconds += result.seconds
        stats.completion_tokens += 1
        stats.finish_reason = self._finish_reason(token)
        stats.context_used = self.sequence.length
        generated = _with_logprobs(token, result, self.request.logprobs)
        self.sequence.tokens.append(token)
        self._lookup.append(token)
        self.drawn = True
        return generated

    def follow_draft(self) -> None:
        """After a token was drawn: use the logits after it if it is the next draft token; else it needs a step."""
        result = self.result
        assert result is not None
        if result.accept(self.sequence.tokens[-1]):
            self.sequence.advance(1)  # verifying the draft has written its latents already
            self.drawn = False
            return
        if self.stats.completion_tokens > 1 or result.draft:
            drafted, accepted = len(result.draft), result.accepted
            if not self._forced or not drafted:
                self._lookup.observe(result.seconds, drafted, accepted)
            if self._forced or not drafted:
                self._payoff.observe(result.seconds, drafted, accepted)
            self.stats.draft_tokens += drafted
            self.stats.accepted_tokens += accepted
        self.result = None

    def _finish_reason(self, token: int) -> str | None:
        if token in self.request.end_tokens or (self._constraint and self._constraint.ended):
            return "stop"
        full, most = self.sequence.length >= self.sequence.context, self.request.max_tokens
        return "length" if full or (most is not None and self.stats.completion_tokens >= most) else None


def _with_logprobs(token: int, result: StepResult, logprobs: int | None) -> GeneratedToken:
    if logprobs is None:
        return GeneratedToken(token)
    logits = result.logits()
    all_logprobs = logits.log_softmax(0)
    values, ids = all_logprobs.topk(min(logprobs, len(logits)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return GeneratedToken(token, float(all_logprobs[token]), top)
