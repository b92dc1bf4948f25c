"""Ollama's API: /api/chat and /api/generate. Streams are lines of JSON, each of which its clients parse."""

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv2_local.chunk import Chunk
from dsv2_local.errors import InputError
from dsv2_local.generation import Generation
from dsv2_local.llm import LLM
from dsv2_local.server import ollama_messages, openai_format
from dsv2_local.server.body import read_json
from dsv2_local.server.ollama_models import tagged
from dsv2_local.server.service import Job, Service
from dsv2_local.server.streaming import Stream, Whole, line
from dsv2_local.server.written_arguments import parsed

router = APIRouter(tags=["Ollama"])
CHAT, GENERATE = "/api/chat", "/api/generate"


@router.post(CHAT, openapi_extra=openai_format.documented(ollama_messages.CHAT_SCHEMA))
async def chat(request: Request) -> Response:
    """Answer a conversation; one without messages has the model loaded."""
    return await _answer(request, _chat, _ChatLines)


@router.post(GENERATE, openapi_extra=openai_format.documented(ollama_messages.GENERATE_SCHEMA))
async def generate(request: Request) -> Response:
    """Answer a prompt; an empty one has the model loaded."""
    return await _answer(request, _generate, _GenerateLines)


async def _answer(
    request: Request, prepare: Callable[[Service, LLM, dict[str, Any]], Generation | None], kind: type["_Lines"]
) -> Response:
    service: Service = request.app.state.service
    body = await read_json(request)
    arrived = monotonic()
    llm = await service.model()
    loading = monotonic() - arrived

    def respond() -> Response:
        stream = ollama_messages.streamed(body)
        generation = prepare(service, llm, body)
        if generation is None:
            loaded = kind(llm, False).line() | {"done_reason": "load", "done": True}
            return Response(line(loaded), media_type="application/x-ndjson") if stream else JSONResponse(loaded)
        (job,) = jobs = service.submit([generation])
        lines = kind(llm, openai_format.flag(body, "logprobs"))
        if stream:
            pieces = _pieces(service, job, lines, loading)
            path = request.url.path
            return Stream(
                service, jobs, pieces, lambda problem: line(problem.body(path)), lambda _: line(lines.line()),
                "application/x-ndjson",
            )  # fmt: skip

        def build(chunks: list[list[Chunk]]) -> dict[str, Any]:
            service.arguments.note(generation.tool_calls)
            return lines.whole(generation, chunks[0]) | _end(job, loading)

        return Whole(service, jobs, build)

    return await run_in_threadpool(respond)


def _chat(service: Service, llm: LLM, body: dict[str, Any]) -> Generation | None:
    messages = ollama_messages.messages(body, service.arguments.text)
    options = ollama_messages.chat_options(body, messages)
    return llm.chat(messages, **options) if messages else None


def _generate(service: Service, llm: LLM, body: dict[str, Any]) -> Generation | None:
    options = ollama_messages.options(body)
    prompt, system, suffix = (ollama_messages.text_of(body, name) for name in ("prompt", "system", "suffix"))
    ollama_messages.refuse_images(body)
    if body.get("context"):
        raise InputError("context is not supported; /api/chat answers conversations")
    if not prompt:
        return None
    if suffix:
        return llm.generate(llm.tokenizer.encode_infill(prompt, suffix), **options)
    if openai_format.flag(body, "raw"):
        return llm.generate(prompt, **options)
    before = [{"role": "system", "content": system}] if system else []
    return llm.chat([*before, {"role": "user", "content": prompt}], **options)


async def _pieces(service: Service, job: Job, lines: "_Lines", loading: float) -> AsyncIterator[bytes]:
    async for chunk in job:
        for each in lines.of(chunk):
            yield line(each)
    for each in lines.rest():
        yield line(each)
    service.arguments.note(job.generation.tool_calls)
    yield line(lines.line() | _end(job, loading))


class _Lines:
    """The lines of an answer's stream."""

    def __init__(self, llm: LLM, logprobs: bool) -> None:
        self._llm, self._logprobs = llm, logprobs

    def line(self, text: str = "") -> dict[str, Any]:
        """A line with this text."""
        raise NotImplementedError

    def of(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """The lines of a chunk."""
        logprobs = self._found([chunk])
        if chunk.text or logprobs:
            yield self.line(chunk.text) | logprobs

    def rest(self) -> Iterator[dict[str, Any]]:
        """The lines before the last one."""
        return iter(())

    def whole(self, generation: Generation, chunks: list[Chunk]) -> dict[str, Any]:
        """The whole answer in one line."""
        return self.line(generation.text) | self._found(chunks)

    def _found(self, chunks: list[Chunk]) -> dict[str, Any]:
        """The log probabilities of chunks, if they are asked for."""
        tokens = [chunk for chunk in chunks if chunk.token_id is not None]
        if not self._logprobs or not tokens:
            return {}
        return {"logprobs": [openai_format.chat_logprob(self._llm, chunk) for chunk in tokens]}

    def _described(self) -> dict[str, Any]:
        return {"model": tagged(self._llm.name), "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


class _GenerateLines(_Lines):
    """Those of /api/generate."""

    def line(self, text: str = "") -> dict[str, Any]:
        """See `_Lines`."""
        return self._described() | {"response": text, "done": False}


class _ChatLines(_Lines):
    """Those of /api/chat. A call is a line of its own, sent when it is whole, as its arguments are an object.

    Calls that the answer's end has cut off are left out.
    """

    def __init__(self, llm: LLM, logprobs: bool) -> None:
        super().__init__(llm, logprobs)
        self._call: dict[str, Any] = {}
        self._arguments = ""

    def line(self, text: str = "") -> dict[str, Any]:
        """See `_Lines`."""
        return self._described() | {"message": {"role": "assistant", "content": text}, "done": False}

    def of(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """See `_Lines`."""
        if chunk.text:
            yield from self.rest()
        yield from super().of(chunk)
        for delta in chunk.calls:
            if delta.index != self._call.get("index"):
                yield from self.rest()
                self._call = {"index": delta.index, "id": delta.id, "name": delta.name}
            self._arguments += delta.arguments

    def rest(self) -> Iterator[dict[str, Any]]:
        """See `_Lines`."""
        call, arguments = self._call, parsed(self._arguments)
        self._call, self._arguments = {}, ""
        if call and arguments is not None:
            found = self.line()
            found["message"]["tool_calls"] = [_call(call["index"], call["id"], call["name"], arguments)]
            yield found

    def whole(self, generation: Generation, chunks: list[Chunk]) -> dict[str, Any]:
        """See `_Lines`."""
        found = super().whole(generation, chunks)
        calls = [
            _call(index, call.id, call.name, arguments)
            for index, call in enumerate(generation.tool_calls)
            if (arguments := parsed(call.arguments)) is not None
        ]
        if calls:
            found["message"]["tool_calls"] = calls
        return found


def _call(index: int, id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": id, "function": {"index": index, "name": name, "arguments": arguments}}


def _end(job: Job, loading: float) -> dict[str, Any]:
    """What the last line of an answer tells: why it ended, and counts and times (in nanoseconds)."""
    stats = job.generation.stats
    return {
        "done": True, "done_reason": stats.finish_reason,
        "total_duration": _nanoseconds(monotonic() - job.submitted + loading), "load_duration": _nanoseconds(loading),
        "prompt_eval_count": stats.prompt_tokens, "prompt_eval_duration": _nanoseconds(stats.prefill_seconds),
        "eval_count": stats.completion_tokens, "eval_duration": _nanoseconds(stats.decode_seconds),
    }  # fmt: skip


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
