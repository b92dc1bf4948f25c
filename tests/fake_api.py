"""The page with an API that answers what a test chooses, so that pieces, errors and statuses come when it says so."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from dsv2_local.server import page

CONTEXT = 2048


@dataclass
class FakeApi:
    """What the API answers, and what it was asked.

    Attributes:
        pieces: the pieces of the next answers.
        released: how many pieces may be sent; None: all.
        fail: (status, error) for the next requests; None: they are answered.
        broken: an error that ends a stream after its pieces; None: it ends well.
        finish: the finish reason.
        prompt_tokens: of the usage.
        key: the key that is asked for; None: none is.
        status: the answer of /dsv2/status.
        bodies: the requests.
        polls: how often the status was asked for.
        left: how many streams their clients have closed.
    """

    pieces: list[str] = field(default_factory=lambda: ["A violin ", "is a bowed ", "instrument."])
    released: int | None = None
    fail: tuple[int, dict[str, Any]] | None = None
    broken: dict[str, Any] | None = None
    finish: str = "stop"
    prompt_tokens: int = 42
    key: str | None = None
    status: dict[str, Any] = field(default_factory=lambda: status())
    bodies: list[dict[str, Any]] = field(default_factory=list)
    polls: int = 0
    left: int = 0

    def app(self) -> FastAPI:
        """The application."""
        app = FastAPI()
        app.include_router(page.router)
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        app.add_api_route("/dsv2/status", self._status, methods=["GET"])
        return app

    def _refused(self, request: Request) -> Response | None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "a key is needed", "type": "authentication_error"}}, 401)
        return None

    async def _status(self, request: Request) -> Response:
        self.polls += 1
        return self._refused(request) or JSONResponse(self.status)

    async def _chat(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        self.bodies.append(await request.json())
        if self.fail:
            return JSONResponse({"error": self.fail[1]}, self.fail[0])
        return StreamingResponse(self._events(list(self.pieces)), media_type="text/event-stream")

    async def _events(self, pieces: list[str]) -> AsyncIterator[str]:
        complete = False
        try:
            yield _choice({"role": "assistant", "content": ""})
            for number, piece in enumerate(pieces):
                while self.released is not None and number >= self.released:
                    yield ": ping\n\n"
                    await asyncio.sleep(0.01)
                yield _choice({"content": piece})
            if self.broken:
                yield _event({"error": self.broken})
            else:
                yield _choice({}, self.finish)
                usage = {
                    "prompt_tokens": self.prompt_tokens, "completion_tokens": len(pieces),
                    "total_tokens": self.prompt_tokens + len(pieces), "prompt_tokens_details": {"cached_tokens": 30},
                }  # fmt: skip
                yield _event({"choices": [], "usage": usage})
                yield "data: [DONE]\n\n"
            complete = True
        finally:
            self.left += not complete


def _choice(delta: dict[str, str], reason: str | None = None) -> str:
    return _event({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps({'id': 'chatcmpl-1', 'object': 'chat.completion.chunk', **data})}\n\n"


def status(*, experts: bool = False, step: int = 0) -> dict[str, Any]:
    """A status as the server gives it; `experts`: of a model with experts off the GPU, `step` seconds later."""
    answers = [
        {"id": "chatcmpl-1", "phase": "prefill", "prompt_tokens": 8192,
         "prefilled_tokens": min(7936, 3072 + 256 * step), "completion_tokens": 0, "seconds": 1.4 + step},
        {"id": "chatcmpl-2", "phase": "decode", "prompt_tokens": 812, "prefilled_tokens": 812,
         "completion_tokens": 143 + 20 * step, "seconds": 8.2 + step},
        {"id": "chatcmpl-3", "phase": "waiting", "prompt_tokens": 90, "prefilled_tokens": 0, "completion_tokens": 0,
         "seconds": 0.3 + step},
    ]  # fmt: skip
    layers = [_layer(number, step) for number in range(1, 60)]
    return {
        "state": "ready", "model": "example" if experts else "dsv2-nano", "version": "0.1.0",
        "uptime_s": 8123.4, "context": CONTEXT, "parallel": 16, "device": "Example GPU" if experts else "CPU",
        "answers": answers if experts else [], "waiting": 1 if experts else 0,
        "rates": {"prefill_tok_s": 1900 + 220 * math.sin(step / 2), "decode_tok_s": 21 + 4 * math.sin(step)},
        "totals": {"requests": 128, "prompt_tokens": 91823, "reused_tokens": 60117, "completion_tokens": 20417},
        "blocks": {"size": 64, "total": 512, "held": 141, "cached": 213, "free": 158},
        "memory": {
            "rss_bytes": 104 * 2**30, "ram_bytes": 125 * 2**30,
            "gpu": [{"name": "Example GPU", "used_bytes": 71 * 2**30, "total_bytes": 79 * 2**30}]
            if experts else [],
        },
        "experts": {"layers": layers} if experts else None,
    }  # fmt: skip


def _layer(number: int, step: int) -> dict[str, Any]:
    """One layer's counters; deeper layers have fewer residents."""
    share = 0.62 - number / 150 + 0.08 * math.sin(number * 2.3)
    resident = [expert for expert in range(160) if hash((expert, number)) % 1000 < 1000 * share]
    hit = 6 * len(resident) / 160
    return {
        "layer": number, "experts": 160, "resident": resident, "hits": round(100 * hit + step * 20 * hit),
        "fetched": round((600 - 100 * hit) * 0.6 + step * 20 * (6 - hit) * (0.3 + number % 9 / 15)),
        "cpu": round((600 - 100 * hit) * 0.4 + step * 20 * (6 - hit) * (0.7 - number % 9 / 15)),
    }  # fmt: skip
