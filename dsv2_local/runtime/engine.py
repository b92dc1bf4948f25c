"""The engine: computes the answers that it is given, for any number of threads.

The engine handles token ids, not text. Any thread may have it compute, one at a time; whoever waits for a token does
(`Engine.drive`), so a program that reads one answer after the other needs no other thread.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv2_local.errors import (
    ContextLengthError,
    DeadlineError,
    Dsv2Error,
    InputError,
    NonFiniteError,
    QueueFullError,
)
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.offload.device import typed_errors
from dsv2_local.offload.plan import CPU_CHUNK
from dsv2_local.offload.plan_request import DEFAULT_PARALLEL
from dsv2_local.progress import Progress, no_progress
from dsv2_local.runtime.answer import Answer, GeneratedToken, Reader, Request
from dsv2_local.runtime.block_store import StoreCounts
from dsv2_local.runtime.engine_core import EngineCore
from dsv2_local.runtime.interrupts import DeferredInterrupts
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.sampler import check_bias
from dsv2_local.runtime.sequence import Sequence
from dsv2_local.runtime.stats import Stats

STALLED_SECONDS = 10
IDLE_SECONDS = 0.001  # between two looks of a thread that waits for what another one does


class Engine(EngineCore):
    """An `EngineCore` that threads share.

    Attributes:
        turn: held by the thread that computes; whoever reads or changes the cache takes it (`opened`).
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
        """See `EngineCore`."""
        super().__init__(model, context, cache_dtype, chunk, rows, batch_invariant)
        self.turn, self._closed = threading.RLock(), False
        self._computing: int | None = None  # the thread that has opened the engine
        self._submitted, self._cancelled = deque[Answer](), deque[Answer]()  # by any thread, until the next step
        self._pressing, self._pressed = set[Answer](), threading.RLock()  # those that are not paced, once admitted
        self._stepped, self._waiters = threading.Condition(), 0

    @property
    def sequence(self) -> Sequence:
        """See `EngineCore`. If another thread computes, this waits for its step."""
        with self.turn:
            return super().sequence

    @property
    def tokens(self) -> list[int]:
        """See `EngineCore`."""
        with self.turn:
            return super().tokens

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Have the engine for this thread alone, one step or one access to the cache long.

        Raises:
            InputError: the engine is closed, or this thread has it already: a callback must not use the model.
        """
        with self.turn:
            self.check_usable()
            with self._alone():
                self._admit()
                yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the engine for this thread alone. What a garbage collection cancels meanwhile waits until the end."""
        with self.turn:
            before, self._computing = self._computing, threading.get_ident()
            try:
                yield
            finally:
                self._computing = before

    def check_usable(self) -> None:
        """Raises what `opened` does. Any thread may call this."""
        if self._closed:
            raise InputError("the model is closed and cannot be used again; load it once more")
        self.check_reentry()

    def check_reentry(self) -> None:
        """Raise InputError if this thread has opened the engine, so that it must be a callback that asks."""
        if self._computing == threading.get_ident():
            raise InputError(
                "the model is computing and cannot be used from its own callback; raise an error there to stop it"
            )

    def close(self) -> None:
        """End all answers, write what the prefix cache has to its files if there are any, and refuse all further use.

        Raises what `opened` does.
        """
        if not self._closed:
            with self.opened():
                self._closed = True
                self.end_all(InputError("the model is closed and cannot be used again; load it once more"))
                if (store := self.cache.pool.store) is not None:
                    try:
                        with typed_errors():
                            self.cache.pool.set_aside()
                    finally:
                        store.close()

    def set_aside(self, *, wait: bool = True) -> None:
        """Write what the prefix cache has to its files, if there are any.

        Closing does it too. In between it is for pauses, so that a process that is killed loses little. What the files
        have already costs next to nothing.

        Args:
            wait: wait until all is written; else at most 256 MiB is queued, and the rest left for another call.
        """
        with self.opened(), typed_errors():
            self.cache.pool.set_aside(wait=wait)
        if wait and (store := self.cache.pool.store) is not None:
            store.flush()

    @property
    def stored(self) -> StoreCounts:
        """What left the block pool and is in RAM or in files; zeros without a block store. Any thread may ask."""
        store = self.cache.pool.store
        return StoreCounts() if store is None else store.counts

    def end_all(self, error: BaseException) -> None:
        """End all answers with an error."""
        with self._alone():
            self._drop_pass()
            while self._submitted:
                self._end(self._submitted.popleft(), error)
            for answer in self.scheduler.everything:
                self._end(answer, error)

    @property
    def pressing(self) -> bool:
        """Whether there are answers to compute that are not paced. Any thread may ask."""
        return bool(self._submitted or self._pressing)

    def hurry(self, answer: Answer) -> None:
        """Pace an answer no longer: compute it to its end, whether it is read or not. Any thread may call this."""
        with self._pressed:
            if not answer.ended:
                answer.paced = False
                self._pressing.add(answer)

    def clear(self) -> None:
        """Forget the latest sequence and the prefix cache, what of it is in the block store included."""
        with self.opened():
            self._follow(self.cache.new_sequence(), held=True)
            self.cache.pool.clear()

    @contextmanager
    def new_sequence(self, tokens: list[int]) -> Iterator[Sequence]:
        """Compute a sequence apart from all answers; if that succeeds, it is the latest one.

        Answers are preempted if their blocks are needed.
        """
        with self.opened():
            self._follow(self.cache.new_sequence(), held=True)
            sequence = self.cache.new_sequence(tokens)
            needed = sequence.lacking(len(tokens))
            if not self.scheduler.make_room(needed):
                self._drop_pass()  # those in the pass begin their chunks again
                self.scheduler.make_room(needed)
            try:
                yield sequence
            except BaseException:
                sequence.release()
                raise
            sequence.insert_prefix()
            self._follow(sequence, held=True)

    def logits(self, ids: list[int]) -> Tensor:
        """Prefill `ids` in chunks from an empty sequence -> fp32 logits [T, vocab_size] after every token."""
        self._check(ids)
        if len(ids) > self.context:
            raise ContextLengthError(len(ids), self.context)
        with self.new_sequence(ids) as sequence, typed_errors():
            parts = [ids[start : start + self.chunk] for start in range(0, len(ids), self.chunk)]
            logits = torch.cat([self.model.logits(self.model.forward(self.cache, [(sequence, p)])) for p in parts])
            if not logits.isfinite().all():
                sequence.release()
                raise self._located(NonFiniteError("the logits"), ids)
            return logits

    def submit(
        self,
        request: Request,
        stats: Stats,
        reader: Reader,
        progress: Progress = no_progress,
        *,
        paced: bool = False,
    ) -> Answer:
        """Let an answer be computed, by whoever drives the engine. Any thread may call this.

        Args:
            request: the prompt, and how to generate.
            stats: updated with every step.
            reader: receives the tokens.
            progress: called with (tokens done, tokens of the prompt) before every chunk of the prefill.
            paced: compute a token only when `Answer.asked` is set, which each token clears.

        Raises:
            ContextLengthError: the prompt and one more token, if any is asked for, do not fit in the context.
            InputError: the prompt is empty, a token id in it or in the logit bias is outside the vocabulary, or the
                engine is closed.
            QueueFullError: as many answers wait as may wait.
        """
        self._check(request.prompt)
        check_bias(request.params, self.model.config.vocab_size)
        if len(request.prompt) + (request.max_tokens != 0) > self.context:
            raise ContextLengthError(len(request.prompt), self.context)
        self.check_usable()
        if (waiting := self.scheduler.waiting + len(self._submitted)) >= self.scheduler.queue:
            raise QueueFullError(waiting)
        answer = Answer(request, self.cache.new_sequence(request.prompt), stats, reader, progress, paced=paced)
        self._submitted.append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """End an answer, if it has not ended; at the latest before the next step. Any thread may call this."""
        if not answer.ended:
            self._cancelled.append(answer)
            self._admit_if_idle()

    def drive(self, until: Callable[[], object]) -> None:
        """Compute, or wait while other threads do, until `until()` is true. Raises what `opened` and `step` do."""
        idle = 0
        while not until():
            with DeferredInterrupts():
                worked = self._step_if_free()
            if worked is not None:
                idle = 0 if worked else idle + 1
                if idle * IDLE_SECONDS > STALLED_SECONDS:
                    raise RuntimeError(
                        "the engine finds nothing to compute for an answer; this is a fault of dsv2-local"
                    )
                if idle and not until():
                    time.sleep(IDLE_SECONDS)
            else:
                with self._stepped:
                    self._waiters += 1
                    try:
                        self._stepped.wait(IDLE_SECONDS * 10)
                    finally:
                        self._waiters -= 1

    def generate(self, request: Request, stats: Stats, progress: Progress = no_progress) -> Iterator[GeneratedToken]:
        """Prefill the prompt, and yield tokens until an end token (yielded too), max_tokens or a full context.

        At most one token more is computed than was read, in common steps with other answers.

        Raises:
            ContextLengthError, InputError: see `submit`.
            NonFiniteError: the model computed NaN or infinity; nothing of it stays in the cache.
        """
        reader = _Queue()
        answer, tokens = self.submit(request, stats, reader, progress, paced=True), reader.tokens
        try:
            while not answer.ended or tokens:
                self.drive(lambda: tokens or answer.ended)
                if tokens:
                    token = tokens.popleft()
                    answer.asked = not tokens
                    yield token
            if answer.error:
                raise answer.error
        finally:
            self.cancel(answer)

    def _step_if_free(self) -> bool | None:
        """`opened` and `step`, unless another thread computes (None), and tell those who wait."""
        if not self.turn.acquire(blocking=False):
            return None
        try:
            self.check_usable()
            try:  # a context manager would take a part of the time of a small model's step
                self._computing = threading.get_ident()
                self._admit()
                return self.step()
            finally:
                self._computing = None
        finally:
            self.turn.release()
            self._admit_if_idle()
            if self._waiters:
                with self._stepped:
                    self._stepped.notify_all()

    def _admit_if_idle(self) -> None:
        """Take what was submitted and cancelled, unless a thread computes, which does it then."""
        while (self._submitted or self._cancelled) and self.turn.acquire(blocking=False):
            try:
                if self._computing:  # in this thread, which was interrupted for a garbage collection
                    return
                with self._alone():
                    self._admit()
            finally:
                self.turn.release()

    def _admit(self) -> None:
        """Take what other threads have submitted and cancelled, and end what is overdue."""
        while self._submitted:
            answer = self._submitted[0]
            if not answer.paced:
                self._pressing.add(answer)
            self._submitted.popleft()  # only now: it presses all the while
            self._follow(answer.sequence, held=False)
            try:
                self.scheduler.submit(answer)
            except Dsv2Error as error:
                self._end(answer, error)
        while self._cancelled:
            self._end(self._cancelled.popleft())
        while overdue := self.scheduler.overdue(time.monotonic()):
            self._end(overdue, DeadlineError(overdue.request.timeout or 0.0))
        if self.scheduler.pass_is_useless:  # it holds blocks, and there may be no further step
            self._drop_pass()

    def _release(self, answer: Answer, *, reusable: bool) -> None:
        with self._pressed:
            super()._release(answer, reusable=reusable)
            self._pressing.discard(answer)

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise InputError("the prompt is empty")
        vocab = self.model.config.vocab_size
        if wrong := [id for id in ids if not 0 <= id < vocab]:
            raise InputError(f"token id {wrong[0]} is outside the vocabulary of {vocab:,}")


class _Queue:
    """A reader that keeps the tokens."""

    def __init__(self) -> None:
        self.tokens = deque[GeneratedToken]()

    def receive(self, token: GeneratedToken) -> bool:
        self.tokens.append(token)
        return False

    def end(self, error: BaseException | None) -> None:
        """The answer knows why."""
