"""An answer that is being generated, as programs see it: an iterator over pieces of text, for threads and asyncio."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from threading import RLock

from dsv2_local.chunk import CallDelta, Chunk, ToolCall
from dsv2_local.errors import Dsv2Error
from dsv2_local.progress import Progress
from dsv2_local.read_ahead import ReadAhead
from dsv2_local.runtime.answer import Answer, GeneratedToken, Request
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.engine_thread import EngineThread
from dsv2_local.runtime.interrupts import DeferredInterrupts
from dsv2_local.runtime.prompt_logprobs import TokenLogprob
from dsv2_local.runtime.stats import Stats
from dsv2_local.runtime.waiting import State
from dsv2_local.text.stream import TextStream
from dsv2_local.text.tools.calls import joined

WINDOW = 4  # answers that `complete` submits at a time, for each row of a decode step


class _Inbox:
    """The chunks of an answer that were not read yet. The engine knows it, and not the `Generation`, so that an answer
    whose `Generation` nobody has any more is cancelled."""

    def __init__(self, stream: TextStream, stats: Stats) -> None:
        self.ready, self.ended = deque[Chunk](), False
        self.error: BaseException | None = None
        self.stream, self._stats = stream, stats
        self._awaiting = deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]]()

    def receive(self, token: GeneratedToken) -> bool:
        """See `answer.Reader`."""
        if self.ended:  # it was closed while this token was computed
            return False
        text, calls = self.stream.push(token.token)
        self.ready.append(Chunk(text, token.token, token.logprob, token.top_logprobs, calls))
        self._tell()
        return self.stream.stopped

    def end(self, error: BaseException | None) -> None:
        """See `answer.Reader`."""
        if self.ended:
            return
        if error is None and self._stats.finish_reason:
            text, calls = self.stream.flush()
            if text or calls:
                self.ready.append(Chunk(text, calls=calls))
        self.error, self.ended = error, True
        self._tell()

    def close(self) -> None:
        """Forget what was not read, and receive nothing more."""
        self.ended = True
        self.ready.clear()
        self._tell()

    async def wait(self) -> None:
        """Wait until there is a chunk, or the end."""
        while not self.ready and not self.ended:
            loop = asyncio.get_running_loop()
            awaiting = loop, loop.create_future()
            self._awaiting.append(awaiting)
            try:
                if not self.ready and not self.ended:  # neither came before it could be told
                    await awaiting[1]
            finally:
                with suppress(ValueError):  # it was told
                    self._awaiting.remove(awaiting)

    def _tell(self) -> None:
        """Wake the tasks that wait."""
        with suppress(IndexError):
            while True:
                loop, future = self._awaiting.popleft()
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(_resolve, future)


class Generation(Iterator[Chunk], AsyncIterator[Chunk]):
    """An answer that is being generated: iterate over it, with `for` or `async for`, for its chunks.

    With `for` nothing is computed before the first `next`, and then at most one token more than was read, in common
    steps with other answers that are iterated over, in this thread or in others. Threads and tasks that iterate over
    the same answer get its chunks in turn, each chunk once. `submit`, which `async for` calls, has the answer computed
    in the background. One that is closed, or that no variable refers to any more, is cancelled.

    Attributes:
        text: the text yielded so far.
        stats: the statistics so far; complete after the last chunk.
        chunks: all chunks of an answer of `LLM.batch`; else empty.
    """

    def __init__(
        self, engine: Engine, thread: EngineThread, request: Request, stream: TextStream, progress: Progress
    ) -> None:
        """Prepare an answer; `thread` is the one that computes it in the background."""
        self.stats, self.text = Stats(), ""
        self.chunks: list[Chunk] = []
        self._engine, self._thread, self._request, self._progress = engine, thread, request, progress
        self._inbox, self._lock = _Inbox(stream, self.stats), RLock()
        self._answer: Answer | None = None
        self._raised = False
        self._calls = list[CallDelta]()

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls yielded so far; the last one may be incomplete."""
        return joined(self._calls)

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the answer; None if none has."""
        return self._inbox.stream.stop_string

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None]:
        """One entry for each token of the prompt, None for the first; empty unless requested.

        They are complete with the first chunk, or at the end of an answer of no tokens.
        """
        found = self._answer.prompt_logprobs if self._answer else None
        return found.entries if found else []

    @property
    def ended(self) -> bool:
        """Whether nothing more is computed: it is complete, was closed, or failed."""
        return self._inbox.ended

    @property
    def ready(self) -> bool:
        """Whether the next chunk need not be waited for."""
        return bool(self._inbox.ready)

    @property
    def waits(self) -> bool:
        """Whether it was submitted, and its prompt is not being read yet."""
        return self._answer is not None and self._answer.state is State.WAITING

    @property
    def error(self) -> BaseException | None:
        """Why the answer ended too early; None if it did not. Iterating raises it."""
        return self._inbox.error

    @property
    def state(self) -> State:
        """Whether it waits, its prompt is read, it is decoded, or it has ended."""
        if self.ended:
            return State.FINISHED
        return self._answer.state if self._answer else State.WAITING

    @property
    def prefilled(self) -> int:
        """Tokens of the prompt that are computed or reused so far."""
        return self._engine.prefilled_of(self._answer) if self._answer else 0

    def submit(self) -> "Generation":
        """Have the answer computed to its end in the background, whether it is read or not; returns the generation.

        Raises:
            ContextLengthError, InputError, QueueFullError: the request is refused.
        """
        self._begin(paced=False)
        self._thread.wake()
        return self

    def close(self) -> None:
        """Stop generating; any thread may call this. `text` keeps what was yielded, the KV cache what was computed."""
        self._engine.check_reentry()
        self._cancel()

    def __next__(self) -> Chunk:
        self._engine.check_reentry()
        with self._lock:
            while True:
                ended = self.ended
                if chunk := self._take():
                    return chunk
                if ended:
                    raise StopIteration
                try:
                    if self._answer is None:
                        self._begin(paced=True)
                    self._engine.drive(self._has_news)
                except BaseException as error:
                    self._cancel()
                    self._raised, self._inbox.error = True, error
                    raise

    async def __anext__(self) -> Chunk:
        while True:
            ended = self.ended
            if chunk := self._take():
                return chunk
            if ended:
                raise StopAsyncIteration
            self.submit()
            await self._inbox.wait()

    def __aiter__(self) -> "Generation":
        return self

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.__dict__.get("_answer"):
            self._cancel()

    def _cancel(self) -> None:
        with DeferredInterrupts():
            if self._answer:
                self._engine.cancel(self._answer)
            self._inbox.close()

    def _begin(self, *, paced: bool) -> None:
        with DeferredInterrupts(), self._lock:
            if self._answer is None and not self.ended:
                self._answer = self._engine.submit(self._request, self.stats, self._inbox, self._progress, paced=paced)
            elif self._answer and not paced:
                self._engine.hurry(self._answer)

    def _has_news(self) -> bool:
        return bool(self._inbox.ready or self._inbox.ended)

    def _take(self) -> Chunk | None:
        """The next chunk that is ready; if there is none, raises the error, once, if the answer ended with one."""
        try:
            chunk = self._inbox.ready.popleft() if self._inbox.ready else None
        except IndexError:  # another thread was faster
            chunk = None
        if chunk is None:
            if self.error and not self._raised:
                self._raised = True
                raise self.error from None
            return None
        self.text += chunk.text
        self._calls += chunk.calls
        if self._answer and not self._inbox.ready:
            self._answer.asked = True
        return chunk


def complete(engine: Engine, generations: Iterable[Generation], ordered: bool) -> Iterator[Generation]:
    """Compute many answers at once, and yield each when it has ended, with its `chunks`, its `text`, and its `error`.

    Args:
        engine: computes them, driven by the thread that iterates.
        generations: taken as they are needed, so there may be any number; in a thread of its own, so that answers are
            computed while the next one is waited for.
        ordered: yield them in their order; else as they end.
    """
    source, running = ReadAhead(generations, WINDOW * engine.rows), deque[Generation]()

    def ended() -> Generation | None:
        return next((each for each in (list(running)[:1] if ordered else running) if each.ended), None)

    try:
        while True:
            while generation := source.next(wait=not running):
                try:
                    generation._begin(paced=False)
                except Dsv2Error as error:
                    generation._inbox.end(error)
                running.append(generation)
            if not running:
                return
            engine.drive(lambda: ended() or source.has_news)
            if done := ended():
                running.remove(done)
                with suppress(Exception):  # it is in `error`
                    for chunk in done:
                        done.chunks.append(chunk)
                yield done
                source.done()
    finally:
        source.close()
        for generation in running:
            generation._cancel()


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
