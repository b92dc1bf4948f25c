"""POST /v1/chat/completions, OpenAI's."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from dsv2_local.chunk import Chunk
from dsv2_local.llm import LLM
from dsv2_local.server import openai_format, openai_tools
from dsv2_local.server.body import read_json
from dsv2_local.server.service import Job, Service
from dsv2_local.server.streaming import Stream, Whole, event, merged

router = APIRouter(tags=["OpenAI"])
PATH = "/v1/chat/completions"


@router.post(PATH, openapi_extra=openai_format.documented(openai_format.CHAT_SCHEMA))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read_json(request)
    llm = await service.model()
    return await run_in_threadpool(_respond, service, llm, body)


def _respond(service: Service, llm: LLM, body: dict[str, Any]) -> Response:
    """Check the body, and have its answers computed; all of this takes time with long prompts."""
    stream, count = openai_format.flag(body, "stream"), openai_format.choices(body, llm.engine.rows)
    messages = openai_format.messages(body.get("messages"))
    tools = openai_tools.chat_tools(body)
    options = openai_format.sampling(body) | openai_format.chat_logprobs(body) | tools.options
    options |= openai_tools.answer_form(body) | openai_tools.template_options(body)
    include_usage = openai_format.include_usage(body)
    generations = [llm.chat(messages, **each) for each in openai_format.seeded(options, count)]
    jobs = service.submit(generations)
    logprobs = options.get("logprobs") is not None
    if stream:
        pieces = _events(llm, jobs, logprobs, include_usage, tools.legacy)
        return Stream(service, jobs, pieces, lambda problem: event(problem.body(PATH)))

    def build(chunks: list[list[Chunk]]) -> dict[str, Any]:
        choices = [
            openai_format.chat_choice(llm, job.generation, chunks[index], index, logprobs, tools.legacy)
            for index, job in enumerate(jobs)
        ]
        used = openai_format.server_usage(generations)
        return openai_format.answer(
            llm, f"chatcmpl-{jobs[0].id}", "chat.completion", choices, used, created=jobs[0].created
        )

    return Whole(service, jobs, build)


async def _events(llm: LLM, jobs: list[Job], logprobs: bool, include_usage: bool, legacy: bool) -> AsyncIterator[bytes]:
    """The chunks of a stream: each choice's role, its pieces, its end; then the usage, if it is asked for, and [DONE].

    The order is what clients rely on: the first event of every choice has its role and an empty content, choice 0 is
    the first, and nothing follows the usage. Every piece of a call has an event of its own: clients take the first list
    of calls as it is, and would keep two pieces of one call in it as two calls.
    """

    def chunk(index: int, delta: dict[str, Any], found: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        return whole([choice])

    def whole(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        first = jobs[0]
        described = {
            "id": f"chatcmpl-{first.id}", "object": "chat.completion.chunk", "created": first.created,
            "model": llm.name, "choices": choices,
        }  # fmt: skip
        return event(described | ({"usage": usage} if include_usage else {}))

    for index in range(len(jobs)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, piece in merged(jobs):
        if piece is None:
            yield chunk(index, {}, reason=openai_format.finish_reason(jobs[index].generation, legacy))
            continue
        found = (
            {"content": [openai_format.chat_logprob(llm, piece)]} if logprobs and piece.token_id is not None else None
        )
        deltas = [openai_format.call_delta(each, legacy) for each in piece.calls if not (legacy and each.index)]
        if piece.text or (found and not deltas):
            deltas.insert(0, {"content": piece.text})
        for delta in deltas:
            yield chunk(index, delta, found)
            found = None
    if include_usage:
        yield whole([], openai_format.server_usage([job.generation for job in jobs]))
    yield event("[DONE]")
