"""The core of the engine: decode steps of many sequences, and prefill passes beside them.

Each call of `EngineCore.step` is one piece of work: a decode step of all sequences that want a token, then a piece of a
prefill pass. One thread at a time may use it; `engine.py` sees to that.
"""

from collections import deque

import torch
from torch import Tensor

from dsv2_local.errors import CacheFullError, NonFiniteError
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.offload.device import typed, typed_errors
from dsv2_local.offload.plan import CPU_CHUNK
from dsv2_local.offload.plan_request import DEFAULT_PARALLEL
from dsv2_local.progress import Progress, no_progress
from dsv2_local.runtime.answer import Answer, GeneratedToken
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.gpu_step import GpuStep
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.prefill import PrefillPass
from dsv2_local.runtime.scheduler import Scheduler
from dsv2_local.runtime.sequence import Sequence
from dsv2_local.runtime.step import Step, StepResult

PREFILL_SECONDS = 0.2  # how long decoding waits for a piece of a prefill pass, unless half a layer takes longer
QUEUE = 100_000  # answers that may wait


class EngineCore:
    """A model with its KV cache, and the answers that it computes.

    Attributes:
        model: the transformer.
        cache: the KV cache.
        decode_step: computes the next tokens of sequences.
        scheduler: the answers that have not ended.
        generated: tokens that were generated since loading.
    """

    def __init__(
        self,
        model: Transformer,
        context: int,
        cache_dtype: CacheDtype,
        chunk: int = CPU_CHUNK,
        rows: int = DEFAULT_PARALLEL,
        batch_invariant: bool = False,
    ) -> None:
        """Allocate a KV cache.

        Args:
            model: the transformer.
            context: the most tokens of a sequence, and of all sequences together.
            cache_dtype: how latents are stored.
            chunk: tokens per prefill pass.
            rows: the most sequences in a decode step.
            batch_invariant: compute attention in absorbed form alone. With the native CPU kernels an answer then has
                the same bits whatever was reused of its prompt, and whatever else is computed. Otherwise only if the
                same prefix is reused.
        """
        self.model, self._batch_invariant = model, batch_invariant
        self.cache = model.new_cache(context, cache_dtype)
        self.decode_step = new_decode_step(model, self.cache)
        self.scheduler = Scheduler[Answer](self.cache.pool, min(rows, self.decode_step.max_rows), chunk, QUEUE)
        self._open: list[Answer] = []  # the answers with the result of a step
        self._drawn = deque[tuple[Answer, GeneratedToken]]()  # tokens that are not delivered yet
        self._pass: PrefillPass | None = None
        self.generated = self._prefilled = 0
        self._latest, self._held = self.cache.new_sequence(), True  # whether no answer holds its blocks

    @property
    def chunk(self) -> int:
        """The most tokens in a prefill pass, and in a chunk of a prompt."""
        return self.scheduler.chunk

    @chunk.setter
    def chunk(self, tokens: int) -> None:
        self.scheduler.chunk = tokens

    @property
    def rows(self) -> int:
        """The most sequences in a decode step."""
        return self.scheduler.rows

    def warm_up(self, progress: Progress = no_progress) -> None:
        """Compile the GPU kernels, which the first prompt would otherwise wait for; nothing to do on the CPU."""
        with typed_errors():
            self.decode_step.warm_up(progress)

    @property
    def context(self) -> int:
        return self.cache.context

    @property
    def sequence(self) -> Sequence:
        """The sequence of the latest answer, as far as the KV cache has it, until the next one begins."""
        if self._held and not self._latest.length:
            self._latest.match_prefix()
        return self._latest

    @property
    def tokens(self) -> list[int]:
        """The tokens of `sequence` that are in the KV cache."""
        return self.sequence.tokens[: self.sequence.length]

    @property
    def prefilled(self) -> int:
        """Tokens of prompts that were computed since loading, those of the pass in flight in part.

        Any thread may ask, while another computes.
        """
        part, chosen = self._pass, self.scheduler.pass_in_flight
        return self._prefilled + (int(part.done * sum(tokens for _, tokens in chosen)) if part else 0)

    def prefilled_of(self, answer: Answer) -> int:
        """How many tokens of an answer's prompt are computed or reused, those of the pass in flight in part.

        Any thread may ask, while another computes.
        """
        if answer.stats.completion_tokens:
            return answer.sequence.prompt
        part, chosen = self._pass, self.scheduler.pass_in_flight
        computing = sum(tokens for item, tokens in chosen if item is answer)
        return min(answer.sequence.prompt, answer.sequence.length + (int(part.done * computing) if part else 0))

    def step(self) -> bool:
        """Compute one piece of work; returns whether there was any.

        An error of one answer ends that answer alone (`Answer.error`).
        """
        self._deliver_all()  # what an interrupt has left
        if self._held and self._latest.length:
            self._latest.release()  # it stays in the prefix cache
        for answer in self._open:
            if answer.result and answer.drawn and answer.wants:
                answer.follow_draft()
        self._open = [answer for answer in self._open if answer.result]
        ready = [answer for answer in self._open if not answer.drawn and answer.wants]
        launched = [] if ready else self._launch()
        self._draw(ready or launched)
        drawn = bool(self._drawn)
        if self.decode_step.asynchronous and drawn:
            # On a GPU the next step runs while the tokens are delivered.
            for answer, _ in self._drawn:
                if not answer.stats.finish_reason:
                    answer.follow_draft()
            self._open = [answer for answer in self._open if answer.result]
            if all(answer.drawn or not answer.wants for answer in self._open):
                self._launch()
        self._deliver_all()
        if self.decode_step.asynchronous:
            for answer in self._open:
                answer.look_ahead()
        # Decode steps and pieces of prefill take turns; tokens that need no step do not count.
        return drawn if ready else self._prefill() or bool(launched)

    def _follow(self, sequence: Sequence, *, held: bool) -> None:
        """Let this be the latest sequence; `held` says whether it is the engine's and not an answer's."""
        if self._held:
            self._latest.release()
        self._latest, self._held = sequence, held

    def _launch(self) -> list[Answer]:
        """Start the decode step of all answers that want one; returns those."""
        most = self.decode_step.max_draft
        wanting = [answer for answer in self.scheduler.running if answer.is_next]
        if not wanting:
            return []
        if most and (len(wanting) == 1 or self.decode_step.drafts_together):
            for answer in wanting:
                answer.propose(most)
        answers = self.scheduler.decode()
        for answer in self._open:
            if answer.result:
                answer.result.detach()  # the next step may overwrite its logits
        if not answers:
            return []
        parts = [(answer.sequence, [answer.sequence.tokens[-1], *answer.draft]) for answer in answers]
        try:
            results = self.decode_step.launch(parts, [answer.candidate_params for answer in answers])
        except Exception as error:
            self._fail(answers, typed(error))
            return []
        for answer, result in zip(answers, results, strict=True):
            answer.take(result)
        self._open += answers
        return answers

    def _draw(self, answers: list[Answer]) -> None:
        """Draw a token of each of these answers, whose results are ready. An interrupt ends the one that it strikes."""
        for answer in answers:
            try:
                self._drawn.append((answer, answer.draw()))
                self.generated += 1
            except NonFiniteError as error:
                self._end_non_finite(answer, error)
            except BaseException as error:
                self._end(answer, error)
                if not isinstance(error, Exception):
                    raise

    def _deliver_all(self) -> None:
        """Give the tokens that were drawn to their readers. An interrupt ends the answer that it strikes."""
        while self._drawn:
            answer, token = self._drawn.popleft()
            answer.asked = False
            try:
                if answer.reader.receive(token):
                    answer.stats.finish_reason = "stop"
            except BaseException as error:
                self._end(answer, error)
                if not isinstance(error, Exception):
                    raise
            if answer.stats.finish_reason:
                self._end(answer)

    def _prefill(self) -> bool:
        """Compute a piece of the prefill pass in flight, or begin the next one; returns whether there is one."""
        if self.scheduler.pass_is_useless:
            self._drop_pass()
        if not self._pass:
            chosen = self.scheduler.prefill()
            if not chosen or not self._begin_pass():
                return False
        assert self._pass
        answers = [answer for answer, _ in self.scheduler.pass_in_flight]
        try:
            with typed_errors():
                hidden = self._pass.advance(PREFILL_SECONDS)
                if hidden is not None:
                    self._end_pass(hidden)
        except Exception as error:
            self._fail(answers, error)
            self._drop_pass()
        except BaseException:
            self._drop_pass()
            raise
        return True

    def _begin_pass(self) -> bool:
        """Prepare the pass that the scheduler has chosen; returns whether there is one."""
        parts, sizes, current = [], [], None
        try:
            for current, tokens in self.scheduler.pass_in_flight:
                sequence = current.sequence
                current.begin_prefill()
                sizes.append(1 if self._batch_invariant else sequence.next_chunk(self.chunk)[1])
                parts.append((sequence, sequence.tokens[sequence.length : sequence.length + tokens]))
                current.progress(sequence.length, sequence.prompt)
            with torch.inference_mode(), typed_errors():
                self._pass = PrefillPass(self.model, self.cache, parts, sizes)
                for (answer, _), rows in zip(self.scheduler.pass_in_flight, self._pass.rows, strict=True):
                    if answer.prompt_logprobs:
                        self._pass.add(answer.prompt_logprobs.pieces(self.model.head, answer.sequence.length, rows))
        except BaseException as error:
            self._drop_pass()
            if current is None or not isinstance(error, Exception):
                raise
            self._end(current, error)
            return False
        return True

    def _end_pass(self, hidden: Tensor) -> None:
        """Count the tokens of the pass, whose output is `hidden` [T, D]; prompts that are complete get their logits."""
        assert self._pass
        answers = [answer for answer, _ in self.scheduler.pass_in_flight]
        self._prefilled += sum(tokens for _, tokens in self.scheduler.pass_in_flight)
        # Those that were preempted go on with the token that they have.
        last = {
            answer: rows.stop - 1
            for (answer, tokens), rows in zip(self.scheduler.pass_in_flight, self._pass.rows, strict=True)
            if tokens == answer.missing and not answer.ended and not answer.stats.completion_tokens
        }
        # First of all: an interrupt must not leave tokens that count without their logits.
        logits = self.model.logits(hidden[[*last.values()]]) if last else hidden[:0]
        for answer in answers:
            answer.take_prompt_logprobs()
        self._pass = None
        self.scheduler.prefilled()
        for answer in answers:
            answer.stats.context_used = answer.sequence.length
        for answer, row in zip(last, logits.tensor_split(len(last) or 1), strict=False):
            answer.end_prefill(StepResult(row))
            self._open.append(answer)
        for answer in last:
            try:
                answer.progress(answer.sequence.prompt, answer.sequence.prompt)
            except Exception as error:
                self._end(answer, error)
        for answer in answers:
            if not answer.ended and not answer.finite:
                self._end_non_finite(answer, NonFiniteError("the logits"))
        for answer in last:
            if answer.prompt_only:
                self._end(answer)

    def _drop_pass(self) -> None:
        self._pass = None
        self.scheduler.abandon()

    def _fail(self, answers: list[Answer], error: Exception) -> None:
        for answer in answers:
            self._end(answer, error)

    def _end(self, answer: Answer, error: BaseException | None = None) -> None:
        """End an answer, unless it has ended."""
        if not answer.ended:
            self._release(answer, reusable=True)
            answer.end(error)

    def _end_non_finite(self, answer: Answer, error: NonFiniteError) -> None:
        """End an answer for which NaN or infinity was computed, with an error that names the part of the model."""
        ids = answer.sequence.tokens[: answer.sequence.length]
        self._release(answer, reusable=False)
        try:
            error = self._located(error, ids)
        finally:
            answer.end(error)

    def _release(self, answer: Answer, *, reusable: bool) -> None:
        """The one way in which an answer leaves; `reusable`: what is computed of it stays in the prefix cache."""
        if answer.sequence is self._latest:
            tokens = answer.sequence.tokens[: answer.sequence.length] if reusable else []
            self._follow(self.cache.new_sequence(tokens), held=True)
        self.scheduler.finish(answer, reusable=reusable)
        if answer in self._open:
            self._open.remove(answer)

    def _located(self, error: NonFiniteError, ids: list[int]) -> NonFiniteError:
        """Find the part of the model that computed NaN or infinity, and empty the prefix cache, which has them too."""
        self.cache.pool.clear()
        sequence = self.cache.new_sequence(ids)
        try:
            with typed_errors():
                for start in range(0, len(ids), self.chunk):
                    if where := self.model.find_non_finite(self.cache, (sequence, ids[start : start + self.chunk])):
                        return NonFiniteError(where)
        except CacheFullError:  # other answers hold the blocks
            pass
        finally:
            sequence.release()
        return error


def new_decode_step(model: Transformer, cache: LatentCache) -> Step:
    """The decode step for this model: `GpuStep` if all layers are on GPUs with Triton's kernels, else `CpuStep`."""
    on_gpus = all(ops.capturable(layer.device) for layer in model.layers)
    return GpuStep(model, cache) if on_gpus else CpuStep(model, cache)
