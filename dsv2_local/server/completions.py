"""POST /v1/completions, OpenAI's: text goes on."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from dsv2_local import inlet
from dsv2_local.chunk import Chunk
from dsv2_local.errors import InputError
from dsv2_local.llm import LLM
from dsv2_local.server import completion_format, openai_format, openai_tools
from dsv2_local.server.body import read_json
from dsv2_local.server.completion_format import Logprobs, Prompt
from dsv2_local.server.service import Job, Service
from dsv2_local.server.streaming import Stream, Whole, event, merged
from dsv2_local.values import Number, Text, checked

router = APIRouter(tags=["OpenAI"])
PATH = "/v1/completions"
MOST_ANSWERS = 2048
"""Of one request; the server waits for all of them at once."""


@router.post(PATH, openapi_extra=openai_format.documented(completion_format.SCHEMA))
async def completions(request: Request) -> Response:
    """Continue one prompt or several."""
    service: Service = request.app.state.service
    body = await read_json(request)
    llm = await service.model()
    return await run_in_threadpool(_respond, service, llm, body)


@dataclass(frozen=True)
class _Order:
    """What a request asks for.

    Attributes:
        prompts: what to continue.
        count: choices of each prompt (`n`).
        candidates: answers that are computed for each prompt, of which the best are the choices (`best_of`).
        echo: whether the choices repeat their prompts.
        logprobs: how many of the most likely tokens the choices have with each token; None: no log probabilities.
        options: those of `LLM.generate`, for each candidate.
    """

    prompts: Sequence[Prompt]
    count: int
    candidates: int
    echo: bool
    logprobs: int | None
    options: Sequence[Mapping[str, Any]]

    def echoed(self, index: int) -> Prompt | None:
        """The prompt that the choice of this number repeats."""
        return self.prompts[index // self.count] if self.echo else None


def _read(llm: LLM, body: Mapping[str, Any], stream: bool) -> _Order:
    """What a body asks for. Raises InputError if it is impossible."""
    rows = llm.engine.rows
    count, candidates = openai_format.choices(body, rows), body.get("best_of")
    candidates = (
        count if candidates is None else checked("best_of", candidates, Number(count, rows, whole=True), InputError)
    )
    if stream and candidates > count:
        raise InputError("best_of cannot be streamed: which answers are the best is known in the end")
    echo = openai_format.flag(body, "echo")
    options = openai_format.sampling(body, empty=True) | openai_tools.answer_form(body)
    options |= completion_format.completion_logprobs(body)
    options.setdefault("max_tokens", completion_format.default_tokens(echo))
    logprobs = options.get("logprobs")
    if candidates > count:
        options.setdefault("logprobs", 0)
    suffix = body.get("suffix")
    suffix = "" if suffix is None else inlet.well_formed(checked("suffix", suffix, Text(), InputError), "suffix")
    if suffix and echo:
        raise InputError("echo cannot be combined with suffix: the prompt is no beginning of the text then")
    given = completion_format.prompts_of(body.get("prompt"))
    if len(given) * candidates > MOST_ANSWERS:
        asked = f"{len(given):,} prompts with {candidates} answers each"
        raise InputError(f"{asked} are more than {MOST_ANSWERS:,} answers; send several requests")
    prompts = [_infill(llm, each, suffix) if suffix else Prompt.of(llm, each) for each in given]
    return _Order(prompts, count, candidates, echo, logprobs, openai_format.seeded(options, candidates))


def _infill(llm: LLM, given: str | list[int], suffix: str) -> Prompt:
    if not isinstance(given, str):
        raise InputError("suffix needs a prompt of text, not of token ids")
    return Prompt(llm.tokenizer.encode_infill(given, suffix), given)


def _respond(service: Service, llm: LLM, body: dict[str, Any]) -> Response:
    """Check the body, and have its answers computed; all of this takes time with long prompts."""
    stream, include_usage = openai_format.flag(body, "stream"), openai_format.include_usage(body)
    order = _read(llm, body, stream)
    # The first answer to a prompt has the prompt's log probabilities, and the others reuse what it has computed.
    scored = {"prompt_logprobs": order.logprobs} if order.echo and order.logprobs is not None else {}
    jobs = service.submit(
        [
            llm.generate(prompt.ids, **options, **({} if number else scored))
            for prompt in order.prompts
            for number, options in enumerate(order.options)
        ]
    )
    if stream:
        pieces = _events(llm, jobs, order, include_usage)
        return Stream(service, jobs, pieces, lambda problem: event(problem.body(PATH)))

    def build(chunks: list[list[Chunk]]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for start in range(0, len(jobs), order.candidates):
            group = range(start, start + order.candidates)
            for at in sorted(group, key=lambda at: -_mean_logprob(chunks[at]))[: order.count]:
                choice = completion_format.completion_choice(
                    llm, jobs[at].generation, chunks[at], len(choices), logprobs=order.logprobs is not None,
                    echo=order.echoed(len(choices)), entries=jobs[start].generation.prompt_logprobs,
                )  # fmt: skip
                choices.append(choice)
        first, used = jobs[0], _usage(jobs, order.candidates)
        return openai_format.answer(llm, f"cmpl-{first.id}", "text_completion", choices, used, created=first.created)

    return Whole(service, jobs, build)


def _mean_logprob(chunks: Sequence[Chunk]) -> float:
    """How likely an answer was, by token; 0 for all that are not compared."""
    found = [chunk.logprob for chunk in chunks if chunk.logprob is not None]
    return fmean(found) if found else 0.0


def _usage(jobs: Sequence[Job], candidates: int) -> dict[str, Any]:
    """Tokens of all prompts, each once, and of all answers."""
    generations = [job.generation for job in jobs]
    groups = [generations[start : start + candidates] for start in range(0, len(jobs), candidates)]
    return openai_format.total_usage([openai_format.server_usage(group) for group in groups])


async def _events(llm: LLM, jobs: list[Job], order: _Order, include_usage: bool) -> AsyncIterator[bytes]:
    """The chunks of a stream: of each choice its prompt, if it is repeated, its pieces and its end; then the usage."""

    def chunk(index: int, text: str, found: Any = None, reason: str | None = None) -> bytes:
        return whole([{"index": index, "text": text, "logprobs": found, "finish_reason": reason}])

    def whole(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        first = jobs[0]
        described = {
            "id": f"cmpl-{first.id}", "object": "text_completion", "created": first.created, "model": llm.name,
            "choices": choices,
        }  # fmt: skip
        return event(described | ({"usage": usage} if include_usage else {}))

    logprobs = [Logprobs(llm) for _ in jobs] if order.logprobs is not None else None
    begun = set[int]()
    pieces = merged(jobs)
    async for index, piece in _scored_first(pieces, order.count) if order.echo and logprobs else pieces:
        if index not in begun:
            begun.add(index)
            if prompt := order.echoed(index):
                entries = jobs[index // order.count * order.count].generation.prompt_logprobs
                found = await run_in_threadpool(logprobs[index].of_prompt, prompt, entries) if logprobs else None
                yield chunk(index, prompt.text, found)
        if piece is None:
            yield chunk(index, "", reason=jobs[index].generation.stats.finish_reason)
            continue
        found = logprobs[index].of_answer([piece]) if logprobs and piece.token_id is not None else None
        if piece.text or found:
            yield chunk(index, piece.text, found)
    if include_usage:
        yield whole([], _usage(jobs, order.count))
    yield event("[DONE]")


async def _scored_first(
    pieces: AsyncIterator[tuple[int, Chunk | None]], count: int
) -> AsyncIterator[tuple[int, Chunk | None]]:
    """Hold back the other choices of a prompt until its first one begins, which has the prompt's log probabilities."""
    begun, held = set[int](), dict[int, list[tuple[int, Chunk | None]]]()
    async for index, piece in pieces:
        prompt, choice = divmod(index, count)
        if choice and prompt not in begun:
            held.setdefault(prompt, []).append((index, piece))
            continue
        yield index, piece
        if prompt not in begun:
            begun.add(prompt)
            for each in held.pop(prompt, []):
                yield each
