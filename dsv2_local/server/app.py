"""The server as an ASGI application: its routes, its service, and what every request goes through."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv2_local import __version__
from dsv2_local.server import (
    anthropic,
    chat_completions,
    completions,
    errors,
    health,
    models,
    ollama,
    ollama_models,
    page,
    responses,
    status,
    tokenization,
)
from dsv2_local.server.access import Access
from dsv2_local.server.guard import Guard
from dsv2_local.server.limits import USUAL, Limits
from dsv2_local.server.metrics import Metrics
from dsv2_local.server.service import Service

PUBLIC = ("/health", *page.PATHS)
"""Paths that need no key."""


def create_app(service: Service, access: Access | None = None, limits: Limits = USUAL) -> ASGIApp:
    """The application that answers with this service, which it starts and closes.

    Args:
        service: what it answers with.
        access: who may ask; None: whoever reaches it as localhost.
        limits: how much they may send.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    # The documentation pages that FastAPI can show load their scripts from other hosts.
    api = FastAPI(title="dsv2-local", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    api.state.service, api.state.metrics, api.state.rates = service, Metrics(service), status.Rates()
    for module in (
        chat_completions, completions, responses, anthropic, ollama, ollama_models, models, tokenization, health,
        status, page,
    ):  # fmt: skip
        api.include_router(module.router)
    errors.install(api)
    return Guard(Counted(api, service), access or Access(), limits, PUBLIC)


class Counted:
    """Tells the service of every request that the model may be needed for."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._service.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.leave()
