"""How the pieces of an answer leave: together where they are ready, in order, with pings in silence alone."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dsv2_local.chunk import Chunk
from dsv2_local.server import service, streaming
from dsv2_local.server.service import Job, Service
from dsv2_local.server.streaming import Stream, event
from tests.serving import WrittenAnswer

CHUNKS = [Chunk("one"), Chunk("two"), Chunk("three")]


class ReadyAnswer(WrittenAnswer):
    """One that was computed faster than it is read: each chunk but the first, and but the one after `pause`, is ready.

    As with a real one, `ended` is set before the last chunk is read.
    """

    def __init__(self, script: list[Chunk | Exception], pause: int = 0) -> None:
        super().__init__(script)
        self._left, self._pause = len(script), pause

    async def __anext__(self) -> Chunk:
        self._left -= 1
        self.ready, self.ended = self._left > 0 and self._left != self._pause, self._left <= 0
        return await super().__anext__()


def sent(answer: ReadyAnswer) -> list[bytes]:
    """The bodies that a stream of the answer's chunks sends."""
    bodies: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])

    asyncio.run(stream(answer)._send({}, send))
    assert bodies.pop() == b""
    return bodies


def stream(answer: Any) -> Stream:
    job = Job(answer)

    async def pieces() -> AsyncIterator[bytes]:
        async for chunk in job:
            yield event(chunk.text)

    return Stream(Service(lambda: None, "any"), [job], pieces(), lambda problem: event(problem.message))


def test_pieces_that_are_ready_are_sent_together_each_as_an_event() -> None:
    assert sent(ReadyAnswer([*CHUNKS])) == [b"data: one\n\ndata: two\n\ndata: three\n\n"]


def test_a_piece_does_not_wait_for_one_that_is_not_ready() -> None:
    assert sent(ReadyAnswer([*CHUNKS], pause=1)) == [b"data: one\n\ndata: two\n\n", b"data: three\n\n"]


def test_what_is_ready_is_sent_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HELD_BYTES", 20)
    assert sent(ReadyAnswer([*CHUNKS])) == [b"data: one\n\ndata: two\n\n", b"data: three\n\n"]


def test_a_failure_follows_what_came_before_it() -> None:
    (body,) = sent(ReadyAnswer([*CHUNKS, ValueError("secret")]))
    assert body.startswith(b"data: one\n\ndata: two\n\ndata: three\n\ndata: ")
    assert body.count(b"data: ") == 4
    assert b"secret" not in body


def test_nothing_is_added_while_a_client_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.001)
    bodies: list[bytes] = []

    async def run() -> None:
        reads = asyncio.Event()

        async def send(message: Any) -> None:
            if message.get("body"):
                bodies.append(message["body"])
                await reads.wait()

        sending = asyncio.ensure_future(stream(ReadyAnswer([*CHUNKS]))._send({}, send))
        await asyncio.sleep(0.05)
        assert len(bodies) == 1
        reads.set()
        await sending

    asyncio.run(run())


def test_chunks_that_follow_fast_are_awaited_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "GATHER_SECONDS", 1e9)
    slept: list[int] = []

    async def sleep(seconds: float) -> None:
        slept.append(len(read))

    monkeypatch.setattr(service.asyncio, "sleep", sleep)
    read: list[Chunk] = []

    async def run() -> None:
        job = Job(WrittenAnswer(CHUNKS))  # none is ready when it is asked for
        async for chunk in job:
            read.append(chunk)

    asyncio.run(run())
    assert slept == [1, 2, 3]


def test_chunks_that_follow_slowly_are_awaited_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "GATHER_SECONDS", 0)
    monkeypatch.setattr(service.asyncio, "sleep", None)

    async def run() -> list[Chunk]:
        return [chunk async for chunk in Job(WrittenAnswer(CHUNKS))]

    assert asyncio.run(run()) == CHUNKS
