"""POST /v1/responses, OpenAI's newer API, without anything that is kept between requests."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from dsv2_local.chunk import Chunk
from dsv2_local.llm import LLM
from dsv2_local.server import openai_format, responses_format
from dsv2_local.server.body import read_json
from dsv2_local.server.errors import Problem, Problematic
from dsv2_local.server.responses_format import Output
from dsv2_local.server.service import Job, Service
from dsv2_local.server.streaming import Stream, Whole, event

router = APIRouter(tags=["OpenAI"])
PATH = "/v1/responses"


@router.post(PATH, openapi_extra=openai_format.documented(responses_format.SCHEMA))
async def responses(request: Request) -> Response:
    """Answer a conversation, as items."""
    service: Service = request.app.state.service
    body = await read_json(request)
    llm = await service.model()
    return await run_in_threadpool(_respond, service, llm, body)


@router.get(PATH + "/{id}")
@router.delete(PATH + "/{id}")
@router.get(PATH + "/{id}/input_items")
@router.post(PATH + "/{id}/cancel")
async def kept(id: str) -> None:
    """Refused: responses are not kept."""
    raise Problematic(404, "this server keeps no responses: one is found in the answer to its own request alone")


def _respond(service: Service, llm: LLM, body: dict[str, Any]) -> Response:
    responses_format.refuse_state(body)
    stream = openai_format.flag(body, "stream")
    messages, tools = responses_format.messages(body, service.arguments), responses_format.tools(body)
    generation = llm.chat(messages, **responses_format.options(body), **tools.options)
    jobs = service.submit([generation])
    if stream:
        events = _Events(service, body, llm.name, jobs[0], tools.custom)
        return Stream(service, jobs, events.pieces(), events.failed)

    def build(chunks: list[list[Chunk]]) -> dict[str, Any]:
        job, whole = jobs[0], generation.stats.finish_reason == "stop"
        items = responses_format.output(job.id, tools.custom, chunks[0], whole)
        found = responses_format.result(generation, items)
        _remember(service, job, tools.custom)
        return responses_format.response(body, job.id, job.created, llm.name, **found)

    return Whole(service, jobs, build)


def _remember(service: Service, job: Job, custom: frozenset[str]) -> None:
    """Note the calls of custom tools: they come back as text, without the JSON that the model wrote around it."""
    service.arguments.note(each for each in job.generation.tool_calls if each.name in custom)


class _Events:
    """The events of one response, numbered in their order."""

    def __init__(self, service: Service, body: dict[str, Any], model: str, job: Job, custom: frozenset[str]) -> None:
        self._service, self._body, self._model, self._job, self._custom = service, body, model, job, custom
        self._output = Output(job.id, custom)
        self._number = 0

    async def pieces(self) -> AsyncIterator[bytes]:
        """The events, from response.created to response.completed or response.incomplete."""
        for name in ("created", "in_progress"):
            yield self._event(name, {"response": self._response()})
        async for chunk in self._job:
            for name, fields in self._output.push(chunk):
                yield self._event(name, fields)
        generation = self._job.generation
        for name, fields in self._output.end(generation.stats.finish_reason == "stop"):
            yield self._event(name, fields)
        found = responses_format.result(generation, self._output.items)
        _remember(self._service, self._job, self._custom)
        yield self._event(found["status"], {"response": self._response(**found)})

    def failed(self, problem: Problem) -> bytes:
        """The last event if the answer fails."""
        error = {"code": problem.code or "server_error", "message": problem.message}
        found = self._response(status="failed", error=error, output=self._output.items)
        return self._event("failed", {"response": found})

    def _response(self, **rest: Any) -> dict[str, Any]:
        return responses_format.response(self._body, self._job.id, self._job.created, self._model, **rest)

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": f"response.{name}", "sequence_number": number, **fields}, f"response.{name}")
