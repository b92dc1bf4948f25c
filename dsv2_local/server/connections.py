"""Connections that cannot be held for nothing: uvicorn's, with a deadline for headers and for clients that do not read.

uvicorn waits without end for the rest of a request's headers, and for a client that takes no more of its answer.
"""

import asyncio
import json
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv2_local.server.errors import Problem
from dsv2_local.server.limits import USUAL, Limits


class Connection(H11Protocol):
    """One connection; `limits` are set by a subclass, since uvicorn makes the instances."""

    limits = USUAL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.write(_whole(503, "too many connections", "busy"))
            transport.close()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._answering and self.conn.their_state is h11.ERROR:
            return  # what follows a request that was the last one
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self._answering:
            if self._head_timer:
                self._head_timer.cancel()
                self._head_timer = None
            # Further requests wait in h11's buffer, where they are small; while nothing is read, nobody would
            # notice that the client leaves.
            if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < self.limits.head_bytes:
                self.flow.resume_reading()
        else:
            self._expect_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self._answering:  # the rest of a body that nobody wanted
            self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.limits.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; or, if a request is being answered that it came with, end or ignore it."""
        if self._answering and not self.cycle.more_body:
            return
        if self._answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        self.transport.write(_whole(400, "the request is not valid HTTP", "invalid_http"))
        self.transport.close()

    def _expect_head(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._late)

    def _late(self) -> None:
        self._head_timer = None
        if not self._answering:
            self.transport.close()

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer:
                timer.cancel()
        self._head_timer = self._stall_timer = None


def _whole(status: int, message: str, code: str) -> bytes:
    """A response as bytes, for requests whose path is not known."""
    phrase = {400: "Bad Request", 503: "Service Unavailable"}[status]
    body = json.dumps(Problem(status, message, code).body("")).encode()
    retry = "retry-after: 2\r\n" if status == 503 else ""
    head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n{retry}content-length: {len(body)}"
    return f"{head}\r\nconnection: close\r\n\r\n".encode() + body


def uvicorn_config(app: ASGIApp, limits: Limits = USUAL) -> uvicorn.Config:
    """uvicorn's settings: connections with `limits`, no websockets, no logs of requests, no trust in a proxy's headers.

    Args:
        app: the application.
        limits: of each connection.
    """
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=type("LimitedConnection", (Connection,), {"limits": limits}),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=limits.head_bytes,
        timeout_keep_alive=int(limits.keep_alive_seconds),
    )
