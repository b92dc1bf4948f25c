"""The model behind the server: loaded in the background, unloaded while nobody asks, and what it computes."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

from dsv2_local.chunk import Chunk
from dsv2_local.errors import Dsv2Error
from dsv2_local.generation import Generation
from dsv2_local.llm import LLM
from dsv2_local.server.errors import Problematic
from dsv2_local.server.written_arguments import WrittenArguments

log = logging.getLogger("dsv2_local.server")

GATHER_SECONDS = 0.005
"""Chunks that follow each other faster are read some at a time: to be woken for each would slow the engine down."""
QUEUE = 4096
"""Answers that may wait; a request of completions has at most half as many. The next ones are refused with 429."""
PAUSE_SECONDS = 5.0
"""Without a request for so long, what the prefix cache has is written to the files of `--cache-dir`."""


class State(Enum):
    """What the server is doing; `/health` says it."""

    LOADING = "loading"
    READY = "ready"
    UNLOADED = "unloaded"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass
class Totals:
    """Counts since the start, of answers that have ended."""

    requests: int = 0
    answers: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0


@dataclass(eq=False)
class Job(AsyncIterator[Chunk]):
    """One answer that the server owes to a client; iterate over it for its chunks.

    Attributes:
        generation: the answer.
        id: 24 hexadecimal digits.
        created: seconds since 1970.
        submitted: `time.monotonic()` of its submission.
        first: the same of its first token; None before.
        refused: whether it was cut off because the server ends; reading it raises that.
    """

    generation: Generation
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    submitted: float = field(default_factory=time.monotonic)
    first: float | None = None
    refused: bool = False
    _latest: float = field(default=0.0, init=False)  # time.monotonic() of the chunk before
    _fast: bool = field(default=False, init=False)

    async def __anext__(self) -> Chunk:
        if self._fast and not self.generation.ready and not self.generation.ended:
            await asyncio.sleep(GATHER_SECONDS)
        try:
            chunk = await anext(self.generation)
        except StopAsyncIteration:
            if self.refused:
                raise _ending() from None
            raise
        now = time.monotonic()
        if self.first is None:
            self.first = now
        self._fast, self._latest = now - self._latest < GATHER_SECONDS, now
        return chunk


def _ending() -> Problematic:
    return Problematic(503, "the server is shutting down", "draining")


class Service:
    """Loads the model, hands it to requests, and counts what it computes.

    Attributes:
        name: the model's name as clients see it.
        context: the most tokens of prompt and answer together; None before the model was loaded for the first time.
        jobs: the answers that have not ended, by their ids.
        totals: counts of those that have.
        finished: called with each job that has ended, for metrics.
        active: requests that are being answered.
        arguments: those of the latest tool calls, as the model wrote them.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        name: str,
        idle_unload: float | None = None,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        """Prepare a server of one model.

        Args:
            load: loads it; called in a thread.
            name: what to call it before it is loaded.
            idle_unload: seconds without a request after which the model is closed; the next one loads it again.
            failed: called if it cannot be loaded, when the server has never had it; later, the log says so.
        """
        self._load, self.name, self._idle_unload, self._failed = load, name, idle_unload, failed
        self.context: int | None = None
        self.started = time.time()
        self.jobs: dict[str, Job] = {}
        self.totals = Totals()
        self.finished: list[Callable[[Job], None]] = []
        self.active = 0
        self.arguments = WrittenArguments()
        self._llm: LLM | None = None
        self._loading: asyncio.Task[LLM | None] | None = None
        self._failure: str | None = None
        self._draining = asyncio.Event()
        self._idle: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._unloading: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        if self._draining.is_set():
            return State.DRAINING
        if self._llm:
            return State.READY
        if self._loading and not self._loading.done():
            return State.LOADING
        return State.FAILED if self._failure else State.UNLOADED

    @property
    def loaded(self) -> LLM | None:
        """The model, unless it is not loaded."""
        return self._llm

    def start(self) -> None:
        """Begin to load the model."""
        if self._loading is None and self._llm is None:
            self._loading = asyncio.create_task(self._run_load())

    async def model(self) -> LLM:
        """The model, once it is loaded.

        Raises:
            Problematic: it cannot be loaded (503), or the server ends (503).
        """
        if self._unloading and not self._draining.is_set():
            await asyncio.shield(self._unloading)
        if self._llm is None and not self._draining.is_set():
            self.start()
            assert self._loading
            draining = asyncio.ensure_future(self._draining.wait())
            try:
                await asyncio.wait({self._loading, draining}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                draining.cancel()
        if self._draining.is_set():
            raise _ending()
        if self._llm is None:
            raise Problematic(503, f"the model cannot be loaded: {self._failure}", "model_not_loaded")
        return self._llm

    def submit(self, generations: Sequence[Generation]) -> list[Job]:
        """Have answers computed; any thread may call this.

        Raises:
            ContextLengthError, InputError, QueueFullError: one of them is refused; none is computed then.
        """
        jobs = [Job(generation) for generation in generations]
        try:
            for job in jobs:
                job.generation.submit()
        except BaseException:
            for job in jobs:
                job.generation.close()
            raise
        for job in jobs:
            self.jobs[job.id] = job
        return jobs

    def end(self, jobs: Sequence[Job]) -> None:
        """Cancel what is not complete, and count it; every job that was submitted comes here once."""
        for job in jobs:
            if self.jobs.pop(job.id, None) is None:
                continue
            whole = job.generation.ended and not job.refused and job.generation.stats.finish_reason is not None
            job.generation.close()
            stats, totals = job.generation.stats, self.totals
            totals.answers += whole
            totals.failed += job.generation.error is not None
            totals.cancelled += not whole and job.generation.error is None
            totals.prompt_tokens += stats.prompt_tokens
            totals.reused_tokens += stats.reused_tokens
            totals.completion_tokens += stats.completion_tokens
            for told in self.finished:
                told(job)

    def enter(self) -> None:
        """A request begins."""
        self.active += 1
        self.totals.requests += 1
        self._stop_timers()

    def leave(self) -> None:
        """A request has been answered."""
        self.active -= 1
        self._rest()

    def drain(self) -> None:
        """Take no further request, and refuse those that wait; those that are being computed go on."""
        self._draining.set()
        self._refuse([job for job in list(self.jobs.values()) if job.generation.waits])  # threads submit meanwhile

    def cut_off(self) -> None:
        """Refuse what is still being computed."""
        self._refuse(list(self.jobs.values()))

    def _refuse(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if not job.generation.ended:
                job.refused = True
                job.generation.close()

    async def close(self) -> None:
        """Cancel what is being computed, and close the model."""
        self._draining.set()
        self._stop_timers()
        self.end(list(self.jobs.values()))
        for task in filter(None, (self._loading, self._writing, self._unloading)):
            with suppress(Exception):
                await task
        await self._close_model()

    async def _run_load(self) -> LLM | None:
        try:
            self._llm = await asyncio.to_thread(self._load)
            self._llm.engine.scheduler.queue = QUEUE
            self.name, self.context, self._failure = self._llm.name, self._llm.context, None
            self._failed = None
            log.info("%s is loaded", self.name)
        except Exception as error:
            self._failure = str(error) if isinstance(error, Dsv2Error) else type(error).__name__
            if self._failed:
                self._failed(error)
            else:
                log.error("the model cannot be loaded: %s", self._failure)
        finally:
            self._loading = None
        self._rest()  # whoever asked for it may have left
        return self._llm

    def _rest(self) -> None:
        """Count the time without a request from now on, if there is none."""
        self._stop_timers()
        if not self._llm or self.active or self._draining.is_set():
            return
        loop = asyncio.get_running_loop()
        self._pause = loop.call_later(PAUSE_SECONDS, self._set_aside)
        if self._idle_unload is not None:
            self._idle = loop.call_later(self._idle_unload, self._unload)

    def _stop_timers(self) -> None:
        for timer in filter(None, (self._idle, self._pause)):
            timer.cancel()
        self._idle = self._pause = None

    def _set_aside(self) -> None:
        self._pause = None
        if self._llm and not self.active:
            self._writing = asyncio.create_task(self._write(self._llm))

    async def _write(self, llm: LLM) -> None:
        """Have a part of the prefix cache written, and the next one in the next pause; a kill then loses little."""
        before = llm.engine.stored.stored_blocks
        with suppress(Dsv2Error):  # it was closed meanwhile
            await asyncio.to_thread(llm.engine.set_aside, wait=False)
            if llm.engine.stored.stored_blocks > before and llm is self._llm and not (self.active or self._pause):
                self._pause = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._set_aside)

    def _unload(self) -> None:
        self._idle = None
        if not self.active and self._llm:
            log.info("the model is unloaded: there was no request for %g s", self._idle_unload)
            self._unloading = asyncio.create_task(self._close_model())

    async def _close_model(self) -> None:
        llm, self._llm = self._llm, None
        try:
            if llm:
                await asyncio.to_thread(llm.close)
        finally:
            self._unloading = None
