"""A server in a thread of the test's own process, on a free port; a model whose answers are written beforehand."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from dsv2_local import llm
from dsv2_local.chunk import CallDelta, Chunk, ToolCall
from dsv2_local.llm import LLM
from dsv2_local.runtime.stats import Stats
from dsv2_local.server.app import create_app
from dsv2_local.server.connections import uvicorn_config
from dsv2_local.server.service import Service
from dsv2_local.text.tools.calls import joined


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an application; yields its address, as http://127.0.0.1:PORT."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn_config(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def nano(**options: object) -> LLM:
    """dsv2-nano, with one thread."""
    return llm.load(threads=1, device="cpu", **options)  # type: ignore[arg-type]


@contextmanager
def serving_nano(**options: object) -> Iterator[tuple[str, Service]]:
    """Serve dsv2-nano; yields the address and the service."""
    service = Service(lambda: nano(**options), "dsv2-nano")
    with serving(create_app(service)) as url:
        yield url, service


def call(index: int, name: str, *pieces: str) -> list[Chunk]:
    """The chunks of a call whose arguments come in pieces."""
    deltas = [CallDelta(index, f"call_{index}", name), *(CallDelta(index, arguments=piece) for piece in pieces)]
    return [Chunk("", index, calls=(delta,)) for delta in deltas]


class WrittenAnswer(AsyncIterator[Chunk]):
    """Stands for a `Generation` of the given chunks; an error among them is raised in its place.

    Attributes:
        held: if given, the answer waits for it before each chunk.
    """

    def __init__(self, script: Sequence[Chunk | Exception], held: threading.Event | None = None, **stats: Any) -> None:
        found = {"prompt_tokens": 10, "reused_tokens": 4, "context_used": 20, "context": 100, "finish_reason": "stop"}
        self.stop_string = stats.pop("stop_string", None)
        self.stats = Stats(**(found | {"completion_tokens": len(script)} | stats))
        self.text, self.held = "", held
        self.ended, self.error, self.ready = False, None, False
        self._script, self._calls = iter(script), list[CallDelta]()

    @property
    def tool_calls(self) -> list[ToolCall]:
        return joined(self._calls)

    def submit(self) -> "WrittenAnswer":
        return self

    def close(self) -> None:
        self.ended = True

    async def __anext__(self) -> Chunk:
        if self.held:
            await asyncio.to_thread(self.held.wait)
        chunk = next(self._script, None)
        if chunk is None:
            self.ended = True
            raise StopAsyncIteration
        if isinstance(chunk, Exception):
            raise chunk
        self.text += chunk.text
        self._calls += chunk.calls
        return chunk


class WrittenLLM:
    """Stands for an `LLM` that gives written answers, one after the other.

    Attributes:
        asked: the messages (or the prompt) and the options of each request.
    """

    name, context = "written", 100
    engine = SimpleNamespace(rows=16)

    def __init__(self, *answers: WrittenAnswer) -> None:
        self._answers = iter(answers)
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def chat(self, messages: Any, **options: Any) -> WrittenAnswer:
        self.asked.append((messages, options))
        return next(self._answers)

    generate = chat

    def count_tokens(self, messages: Any, **options: Any) -> int:
        self.asked.append((messages, options))
        return len(messages)

    def close(self) -> None:
        pass


@contextmanager
def serving_written(*answers: WrittenAnswer) -> Iterator[tuple[str, WrittenLLM]]:
    """Serve written answers; yields the address and what stands for the model."""
    written = WrittenLLM(*answers)
    with serving(create_app(Service(lambda: written, written.name))) as url:  # type: ignore[arg-type, return-value]
        yield url, written
