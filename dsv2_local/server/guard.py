"""What every request passes before the application sees it: the host, the page, the key, and a body of bounded size.

The application gets complete bodies alone, so that nothing behind the guard waits for a client that does not send.
"""

import asyncio
import logging
import re
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv2_local.server.access import Access, Host, same_origin
from dsv2_local.server.errors import Problem, Problematic, places
from dsv2_local.server.limits import USUAL, Limits

log = logging.getLogger("dsv2_local.server")

PAGE = "/"
"""The one address that other sites may link to."""
PREFLIGHT_SECONDS = 600
_EXPOSED = b"retry-after"
_METHODS = b"GET, HEAD, POST, DELETE"
_TOKENS = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z, -]*")
_LENGTH = re.compile(rb"[0-9]+")
_BROWSER = frozenset({b"origin", b"referer", b"sec-fetch-site"})  # Node sends sec-fetch-mode, too


class _GoneError(Exception):
    """The client has left."""


class _Request:
    """The headers of a request, by their names.

    Attributes:
        scope: what ASGI tells of it.
        host: that it names.
        origin: of the page that sends it; None if none does.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self._headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            self._headers.setdefault(name, []).append(value)
        self.host = Host("")
        origin = self.one(b"origin")
        self.origin = None if origin is None else origin.decode("latin-1")

    def one(self, name: bytes) -> bytes | None:
        """The value of a header that may stand once; None if it is absent."""
        values = self._headers.get(name, [])
        if len(values) > 1:
            raise Problematic(400, f"the header {name.decode()} is given {len(values)} times")
        return values[0].strip() if values else None

    @property
    def from_browser(self) -> bool:
        """Whether a page may be behind it: browsers add headers of which other clients know nothing."""
        return not _BROWSER.isdisjoint(self._headers)


class Guard:
    """Lets through to an application what `Access` and `Limits` allow, and answers the rest itself."""

    def __init__(
        self, app: ASGIApp, access: Access, limits: Limits = USUAL, public: Collection[str] = ("/health",)
    ) -> None:
        """Stand before `app`.

        Args:
            app: the application.
            access: who may ask.
            limits: how much they may send.
            public: paths that need no key.
        """
        self._app, self._access, self._limits, self._public = app, access, limits, frozenset(public)
        self._held = 0  # bytes of bodies that arrive, or that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = _Answer(send)
        try:
            await self._handle(scope, receive, answer)
        except _GoneError:
            pass
        except Exception as error:  # as an error of Python it would be logged with its text, which may be a prompt's
            if not isinstance(error, Problematic):
                log.error("%s at %s", type(error).__name__, places(error))
            if not answer.started:
                await Problem.of(error).response(scope)(scope, receive, answer)

    async def _handle(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._limits.head_bytes:
            raise Problematic(431, f"the headers have more than {self._limits.head_bytes:,} bytes")
        request = _Request(scope)
        self._check_host(request)
        if self._check_origin(request):
            answer.add(_cors(request))
            asked = request.one(b"access-control-request-method")
            if request.method == "OPTIONS" and asked is not None:
                await _preflight(request, answer)
                return
        self._check_key(request)
        if request.method not in ("POST", "PUT", "PATCH", "DELETE"):
            await self._app(scope, receive, answer)
            return
        _check_type(request)
        body = await self._body(request, receive)
        try:
            await self._app(scope, _replayed(body, receive), answer)
        finally:
            self._held -= len(body)

    def _check_host(self, request: _Request) -> None:
        values = [value for name, value in request.scope["headers"] if name == b"host"]
        host = Host.parse(values[0].strip().decode("latin-1")) if len(values) == 1 else None
        if not request.path.startswith("/") or host is None:
            raise Problematic(403, "a request must name one host and a path", "host_not_allowed")
        server = request.scope.get("server")
        if not self._access.answers_to(host, server[0] if server else None):
            what = f"the server does not answer to the host {host.name}; start it with --allowed-host {host.name}"
            raise Problematic(403, what, "host_not_allowed")
        request.host = host

    def _check_origin(self, request: _Request) -> bool:
        """Whether a page of another server sends it, one that may."""
        site = request.one(b"sec-fetch-site")
        if request.origin is None:
            if site in (None, b"same-origin", b"none"):
                return False
            navigates = request.one(b"sec-fetch-mode") == b"navigate" and request.one(b"sec-fetch-dest") == b"document"
            if navigates and request.path == PAGE and request.method in ("GET", "HEAD"):
                return False
            raise Problematic(403, "a page of another site asks; it may only link to /", "origin_not_allowed")
        if request.origin.lower() in self._access.origins:
            return True
        own = same_origin(request.origin, request.host, request.scope["scheme"], site == b"same-origin")
        if own and site in (None, b"same-origin"):
            return False
        what = f"pages of {request.origin[:100]} may not use the server; start it with --cors-origin to let them"
        raise Problematic(403, what, "origin_not_allowed")

    def _check_key(self, request: _Request) -> None:
        if not self._access.keys or request.path in self._public:
            return
        scheme, _, bearer = (request.one(b"authorization") or b"").partition(b" ")
        given = [bearer.strip()] if scheme.lower() == b"bearer" else []
        if (key := request.one(b"x-api-key")) is not None:
            given.append(key)
        if not any(map(self._access.knows, given)):
            what = "the key is wrong" if given else "a key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
            raise Problematic(401, what, "invalid_api_key")

    async def _body(self, request: _Request, receive: Receive) -> bytes:
        """The whole body, which counts as held from then on.

        Raises:
            Problematic: it is too long, or takes too long; or too much is held.
            _GoneError: the client has left.
        """
        limits, most = self._limits, self._limits.body_bytes
        too_long = Problematic(413, f"a body may have at most {most:,} bytes", "request_too_large")
        length = request.one(b"content-length")
        if length is not None and (not _LENGTH.fullmatch(length) or len(length) > 20 or int(length) > most):
            raise too_long
        pieces: list[bytes] = []
        size = 0
        end = asyncio.get_running_loop().time() + limits.body_seconds
        try:
            while True:
                pause = asyncio.get_running_loop().time() + limits.body_pause_seconds
                async with asyncio.timeout_at(min(end, pause)):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    raise _GoneError
                piece = message.get("body", b"")
                size += len(piece)
                self._held += len(piece)
                if size > most:
                    raise too_long
                if self._held > limits.bodies_bytes:
                    raise Problematic(503, "the requests that are being answered are too long together", "busy")
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
        except BaseException as error:
            self._held -= size
            if isinstance(error, TimeoutError):
                raise Problematic(408, "the body did not arrive in time", "timeout") from None
            raise


class _Answer:
    """`send`, which adds headers to the response and knows whether it has begun."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        self._added: list[tuple[bytes, bytes]] = []

    def add(self, headers: list[tuple[bytes, bytes]]) -> None:
        self._added += headers

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": [*message.get("headers", []), *self._added]}
        await self._send(message)


def _check_type(request: _Request) -> None:
    """Refuse bodies that a page may send without asking, and compressed ones."""
    if (coding := request.one(b"content-encoding")) not in (None, b"", b"identity"):
        assert coding is not None
        raise Problematic(415, f"bodies cannot be compressed ({coding.decode('latin-1')[:20]})")
    kind = (request.one(b"content-type") or b"").split(b";")[0].strip().lower()
    if request.from_browser and kind != b"application/json":
        raise Problematic(415, "a page must send Content-Type: application/json")


def _cors(request: _Request) -> list[tuple[bytes, bytes]]:
    assert request.origin is not None
    return [
        (b"access-control-allow-origin", request.origin.encode("latin-1")), (b"vary", b"origin"),
        (b"access-control-expose-headers", _EXPOSED),
    ]  # fmt: skip


async def _preflight(request: _Request, answer: _Answer) -> None:
    """Tell a browser what a page that may use the server may send."""
    headers = [
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-max-age", str(PREFLIGHT_SECONDS).encode()),
    ]
    asked = request.one(b"access-control-request-headers")
    if asked and _TOKENS.fullmatch(asked):
        headers.append((b"access-control-allow-headers", asked))
    if request.one(b"access-control-request-private-network") == b"true":
        headers.append((b"access-control-allow-private-network", b"true"))
    await answer({"type": "http.response.start", "status": 204, "headers": headers})
    await answer({"type": "http.response.body", "body": b""})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body at once, and then waits for the client to leave."""
    waiting: list[bytes] = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay
