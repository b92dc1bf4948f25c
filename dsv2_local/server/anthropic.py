"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's."""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv2_local.chunk import Chunk
from dsv2_local.errors import ContextLengthError
from dsv2_local.generation import Generation
from dsv2_local.llm import LLM
from dsv2_local.server import anthropic_messages, openai_format
from dsv2_local.server.body import read_json
from dsv2_local.server.errors import ANTHROPIC as PATH
from dsv2_local.server.errors import Problematic
from dsv2_local.server.service import Job, Service
from dsv2_local.server.streaming import Stream, Whole, event
from dsv2_local.server.written_arguments import parsed

router = APIRouter(tags=["Anthropic"])
_PING = event({"type": "ping"}, "ping")

Event = dict[str, Any]
"""An event of a stream; its `type` is its name too."""


@router.post(PATH, openapi_extra=openai_format.documented(anthropic_messages.MESSAGES_SCHEMA))
async def messages(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read_json(request)
    llm = await service.model()
    return await run_in_threadpool(_respond, service, llm, body)


@router.post(f"{PATH}/count_tokens", openapi_extra=openai_format.documented(anthropic_messages.COUNT_SCHEMA))
async def count_tokens(request: Request) -> Response:
    """Count the tokens of a conversation with its system prompt, its tools and the chat template."""
    service: Service = request.app.state.service
    body = await read_json(request)
    llm = await service.model()
    return await run_in_threadpool(_count, service, llm, body)


def _respond(service: Service, llm: LLM, body: dict[str, Any]) -> Response:
    """Check the body, and have its answer computed."""
    stream = openai_format.flag(body, "stream")
    messages = anthropic_messages.messages(body, service.arguments.text)
    options = anthropic_messages.sampling_options(body) | anthropic_messages.conversation_options(body)
    generation = llm.chat(messages, **options)
    try:
        (job,) = jobs = service.submit([generation])
    except ContextLengthError as error:  # in the words that Claude Code knows, which shortens its conversation then
        raise Problematic(
            400, f"prompt is too long: {error.prompt_tokens} tokens > {error.context - 1} maximum"
        ) from None
    if stream:
        pieces = _pieces(service, llm, job)
        return Stream(service, jobs, pieces, lambda problem: event(problem.body(PATH), "error"), lambda _: _PING)

    def build(chunks: list[list[Chunk]]) -> dict[str, Any]:
        blocks = Blocks()
        for chunk in chunks[0]:
            for _ in blocks.events(chunk):
                pass
        for _ in blocks.end():
            pass
        service.arguments.note(generation.tool_calls)
        return _message(llm, job) | {"content": blocks.content, **_stop(generation), "usage": _usage(generation)}

    return Whole(service, jobs, build)


def _count(service: Service, llm: LLM, body: dict[str, Any]) -> Response:
    messages = anthropic_messages.messages(body, service.arguments.text)
    options = anthropic_messages.conversation_options(body)
    of_prompt = {name: options[name] for name in ("tools", "tool_choice", "continue_final") if name in options}
    return JSONResponse({"input_tokens": llm.count_tokens(messages, **of_prompt)})


async def _pieces(service: Service, llm: LLM, job: Job) -> AsyncIterator[bytes]:
    async for each in events(service, llm, job):
        yield event(each, each["type"])


async def events(service: Service, llm: LLM, job: Job) -> AsyncIterator[Event]:
    """The events of a stream: the message's start, its blocks one after the other, its end.

    How much of the prompt is reused is known only when its turn comes; the last usage replaces the first.
    """
    usage = _usage(job.generation) | {"output_tokens": 0}
    yield {"type": "message_start", "message": _message(llm, job) | {"usage": usage}}
    blocks = Blocks()
    async for chunk in job:
        for each in blocks.events(chunk):
            yield each
    for each in blocks.end():
        yield each
    service.arguments.note(job.generation.tool_calls)
    yield {"type": "message_delta", "delta": _stop(job.generation), "usage": _usage(job.generation)}
    yield {"type": "message_stop"}


class Blocks:
    """The content of an answer as blocks, one open at a time: texts and calls in the order in which they were written.

    Attributes:
        content: the blocks so far; the input of a call is there when its block ends.
    """

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._call: int | None = None  # the number of the call whose block is open
        self._open = False
        self._arguments = self._space = ""

    def events(self, chunk: Chunk) -> Iterator[Event]:
        """What a chunk adds. White space alone begins no block: the API refuses blocks of it in the next request."""
        text = self._space + chunk.text
        in_text = self._open and self._call is None
        self._space = ""
        if text and (in_text or not text.isspace()):
            if not in_text:
                yield from self.end()
                yield self._start({"type": "text", "text": ""})
            self.content[-1]["text"] += text
            yield self._delta({"type": "text_delta", "text": text})
        elif text:
            self._space = text
        for call in chunk.calls:
            if not self._open or call.index != self._call:
                yield from self.end()
                yield self._start({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
                self._call = call.index
            if call.arguments:
                self._arguments += call.arguments
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def end(self) -> Iterable[Event]:
        """End the block that is open, if there is one."""
        if not self._open:
            return ()
        if self._call is not None:
            self.content[-1]["input"] = parsed(self._arguments) or {}
        self._open, self._call, self._arguments, self._space = False, None, "", ""
        return ({"type": "content_block_stop", "index": len(self.content) - 1},)

    def _start(self, block: dict[str, Any]) -> Event:
        self.content.append(block)
        self._open, self._space = True, ""
        return {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def _message(llm: LLM, job: Job) -> dict[str, Any]:
    return {
        "id": f"msg_{job.id}", "type": "message", "role": "assistant", "model": llm.name, "content": [],
        "stop_reason": None, "stop_sequence": None,
    }  # fmt: skip


def _stop(generation: Generation) -> dict[str, Any]:
    """Why the answer ended."""
    found, reason = generation.stop_string, "end_turn"
    if generation.stats.finish_reason == "length":
        full = generation.stats.context_used >= generation.stats.context
        reason = "model_context_window_exceeded" if full else "max_tokens"
    elif found is not None:
        reason = "stop_sequence"
    elif generation.tool_calls:
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": found if reason == "stop_sequence" else None}


def _usage(generation: Generation) -> dict[str, int]:
    """Counts of tokens; those of the prompt that were reused are not among the input tokens."""
    stats = generation.stats
    return {
        "input_tokens": stats.prompt_tokens - stats.reused_tokens, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stats.reused_tokens, "output_tokens": stats.completion_tokens,
    }  # fmt: skip
