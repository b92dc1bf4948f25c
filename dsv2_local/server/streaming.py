"""Responses that are computed while they are sent, and end with their client: event streams, lines, whole answers."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv2_local.chunk import Chunk
from dsv2_local.server.body import json_bytes
from dsv2_local.server.errors import Problem, places
from dsv2_local.server.service import Job, Service

log = logging.getLogger("dsv2_local.server")

PING_SECONDS = 5.0
"""How long a stream is silent at most: editors give up after tens of seconds without a byte, Node after 300."""
HELD_BYTES = 65_536
"""How much is sent at a time at most, if so much is ready."""


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event; `data` as JSON, or text as it is."""
    content = data.encode() if isinstance(data, str) else json_bytes(data)
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + content + b"\n\n"


def line(data: Any) -> bytes:
    """One line of JSON."""
    return json_bytes(data) + b"\n"


async def merged(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Chunk | None]]:
    """The chunks of several answers as they come, each with the number of its answer; None when that one is complete.

    Raises:
        Dsv2Error: an answer failed.
    """
    if len(jobs) == 1:
        async for chunk in jobs[0]:
            yield 0, chunk
        yield 0, None
        return
    waiting = {asyncio.ensure_future(_next(job)): index for index, job in enumerate(jobs)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(task)
                found = task.result()
                yield index, found
                if found is not None:
                    waiting[asyncio.ensure_future(_next(jobs[index]))] = index
    finally:
        for task in waiting:
            task.cancel()


async def _next(job: Job) -> Chunk | None:
    return await anext(job, None)


class Answer(Response):
    """A response with answers of the model. If the client goes away, they are cancelled at the next step."""

    def __init__(self, service: Service, jobs: Sequence[Job], media_type: str) -> None:
        self._service, self._jobs = service, jobs
        super().__init__(None, 200, {"Cache-Control": "no-store"}, media_type)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(scope, send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._service.end(self._jobs)
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, scope: Scope, send: Send) -> None:
        raise NotImplementedError


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def comment(jobs: Sequence[Job]) -> bytes:
    """A comment in a stream of events, which clients skip, with the tokens of the prompt that have been read."""
    reading = [job.generation.stats for job in jobs if job.first is None]
    done = min((stats.context_used for stats in reading), default=0)
    total = max((stats.prompt_tokens for stats in reading), default=0)
    return f": prefill {done}/{total}\n\n".encode() if total else b": ping\n\n"


class Stream(Answer):
    """An answer that is sent piece by piece."""

    def __init__(
        self,
        service: Service,
        jobs: Sequence[Job],
        pieces: AsyncIterator[bytes],
        failed: Callable[[Problem], bytes],
        ping: Callable[[Sequence[Job]], bytes] | None = comment,
        media_type: str = "text/event-stream",
    ) -> None:
        """A stream of `pieces`.

        Args:
            service: where the jobs are counted.
            jobs: the answers that the pieces are made of.
            pieces: the bytes to send.
            failed: what to send if an answer fails after the headers have left.
            ping: makes what is sent after `PING_SECONDS` without a piece; None: nothing is.
            media_type: of the pieces.
        """
        super().__init__(service, jobs, media_type)
        self.headers["X-Accel-Buffering"] = "no"  # nginx would hold the pieces back
        self._pieces, self._failed, self._ping = pieces, failed, ping
        self._silent_since: float | None = time.monotonic()  # None while something is being sent

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pinging = asyncio.ensure_future(self._fill_silence(send))
        try:
            await self._send_pieces(send)
        finally:
            pinging.cancel()
        self._service.end(self._jobs)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_pieces(self, send: Send) -> None:
        """Send each piece at once, or together with the next ones if these need not be waited for."""
        held = b""
        try:
            async for piece in self._pieces:
                held += piece
                full = len(held) >= HELD_BYTES
                if full or not self._more_is_ready():
                    await self._write(send, held)
                    held = b""
                    if full:
                        await asyncio.sleep(0)  # other streams have their turn
        except Exception as error:
            _log(error)
            held += self._failed(Problem.of(error))
        if held:
            await self._write(send, held)

    def _more_is_ready(self) -> bool:
        generations = [job.generation for job in self._jobs]
        return any(each.ready for each in generations) or all(each.ended for each in generations)

    async def _write(self, send: Send, body: bytes) -> None:
        self._silent_since = None
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._silent_since = time.monotonic()

    async def _fill_silence(self, send: Send) -> None:
        """Send a ping whenever nothing has been sent for `PING_SECONDS`."""
        while self._ping is not None:
            silent = time.monotonic() - self._silent_since if self._silent_since else 0
            if silent >= PING_SECONDS:
                await self._write(send, self._ping(self._jobs))
            else:
                await asyncio.sleep(PING_SECONDS - silent)


class Whole(Answer):
    """Answers that are sent when all are complete."""

    def __init__(
        self, service: Service, jobs: Sequence[Job], build: Callable[[list[list[Chunk]]], dict[str, Any]]
    ) -> None:
        """A response with the JSON that `build` makes of the chunks of each answer."""
        super().__init__(service, jobs, "application/json")
        self._build = build

    async def _send(self, scope: Scope, send: Send) -> None:
        chunks: list[list[Chunk]] = [[] for _ in self._jobs]
        try:
            async for index, chunk in merged(self._jobs):
                if chunk is not None:
                    chunks[index].append(chunk)
            # The log probabilities of a long prompt take seconds, in which other streams go on.
            body = await run_in_threadpool(lambda: json_bytes(self._build(chunks)))
        except Exception as error:
            _log(error)
            await Problem.of(error).response(scope)(scope, _nothing, send)
            return
        self._service.end(self._jobs)  # before the client has the answer, so that it finds it counted
        self.headers["content-length"] = str(len(body))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body})


async def _nothing() -> Any:
    raise NotImplementedError


def _log(error: Exception) -> None:
    """Note a fault."""
    if Problem.of(error).status == 500:
        log.error("%s at %s", type(error).__name__, places(error))
