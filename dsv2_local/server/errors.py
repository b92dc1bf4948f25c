"""Errors as each API gives them: the status, the headers and the shape of the body."""

import http
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from dsv2_local.errors import (
    CacheFullError,
    ContextLengthError,
    DeadlineError,
    Dsv2Error,
    InputError,
    QueueFullError,
    TemplateError,
)
from dsv2_local.server.body import json_bytes

RETRY_SECONDS = 2
"""What `Retry-After` says: an answer ends every few seconds on a server that is busy."""
ANTHROPIC = "/v1/messages"
OLLAMA = "/api/"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
_OPENAI_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    503: "service_unavailable",
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What is wrong with a request, or with its answer.

    Attributes:
        status: of HTTP; OpenAI's meaning, which `response` translates for Anthropic's API (503 is 529 there).
        message: one line.
        code: OpenAI's code, if there is one for it.
        param: the field that is wrong, if it is known.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> "Problem":
        """The problem that an error is; one that nobody foresaw says nothing of its text, which may hold a prompt."""
        if isinstance(error, Problematic):
            return error.problem
        if isinstance(error, ContextLengthError):
            return cls(400, str(error), "context_length_exceeded")
        if isinstance(error, QueueFullError):
            return cls(429, str(error), "queue_full")
        if isinstance(error, DeadlineError):
            return cls(504, str(error), "timeout")
        if isinstance(error, CacheFullError):
            return cls(503, str(error), "cache_full")
        if isinstance(error, InputError | TemplateError):
            return cls(400, str(error))
        if isinstance(error, Dsv2Error):
            return cls(500, str(error))
        return cls(500, f"the server has a fault ({type(error).__name__}); its log has the place")

    def body(self, path: str, *, anthropic: bool = False) -> dict[str, Any]:
        """The body in the shape of the API that the path belongs to."""
        if anthropic or path.startswith(ANTHROPIC):
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        if path.startswith(OLLAMA):
            return {"error": self.message}
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, scope: Scope) -> Response:
        """The response to the request of this scope."""
        path = scope.get("path", "")
        anthropic = path.startswith(ANTHROPIC) or any(name == b"anthropic-version" for name, _ in scope["headers"])
        status = 529 if anthropic and self.status == 503 else self.status
        headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503, 529) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(json_bytes(self.body(path, anthropic=anthropic)), status, headers, "application/json")


class Problematic(Exception):  # noqa: N818 (it carries a problem, and is raised by routes alone)
    """Raised by a route to answer with a problem."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        self.problem = Problem(status, message, code, param)
        super().__init__(message)


def places(error: BaseException) -> str:
    """Where an error was raised, the innermost place first: for the log, without its text, which may hold a prompt."""
    found, trace = [], error.__traceback__
    while trace:
        found.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " < ".join(reversed(found[-5:]))


def install(app: FastAPI) -> None:
    """Let an app answer with errors of the right shape, whatever a route raises."""

    async def answer(request: Request, error: Exception) -> Response:
        return Problem.of(error).response(request.scope)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = http.HTTPStatus(error.status_code).phrase.lower()
        what = f"{phrase}: {request.method} {request.url.path}"
        response = Problem(error.status_code, what, phrase.replace(" ", "_")).response(request.scope)
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(Dsv2Error, answer)
    app.add_exception_handler(Problematic, answer)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, answer)  # a fault; it is raised again behind the answer, for the log
