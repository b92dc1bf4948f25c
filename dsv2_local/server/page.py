"""The web page at `/`: a fixed table of files, which are read once and sent with a strict content security policy."""

import hashlib
from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = (
    "index.html", "style.css", "chat.css", "machine.css", "icon.svg", "main.js", "answering.js", "api.js",
    "conversation.js", "dom.js", "experts.js", "machine.js", "markdown.js", "settings.js", "sidebar.js", "store.js",
    "thread.js",
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",  # asked for again, and answered with 304 while it is the same
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class _File:
    """One file of the page."""

    def __init__(self, name: str) -> None:
        self._body = files("dsv2_local.server").joinpath("page", name).read_bytes()
        self._type = _TYPES[name[name.rindex(".") :]]
        self._tag = f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'

    async def respond(self, request: Request) -> Response:
        """The file, or 304 if the client has it."""
        headers = {**HEADERS, "ETag": self._tag}
        known = request.headers.get("if-none-match", "")
        if self._tag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(None, 304, headers)
        return Response(self._body, 200, headers, self._type)


PATHS = {"/": "index.html"} | {f"/{name}": name for name in FILES if name != "index.html"}
"""Which file each path is."""

router = APIRouter(include_in_schema=False)
for _path, _name in PATHS.items():
    router.add_route(_path, _File(_name).respond, methods=["GET", "HEAD"])
