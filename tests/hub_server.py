"""A fake hub on the loopback interface for huggingface_hub: model info, file tree, and files with range requests."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """One repository.

    Attributes:
        revisions: files by name of the revision.
        token: token that requests must have; None: none.
        gated: answer like a gated repository whose terms were not accepted.
        cut: number of bytes of a file after which to close the connection, once (always, if `always_cut`).
        log: method, path and Range header of each request.
    """

    def __init__(self, repository: str, revisions: dict[str, dict[str, bytes]]) -> None:
        self.repository, self.revisions = repository, revisions
        self.token: str | None = None
        self.gated = False
        self.cut: dict[str, int] = {}
        self.always_cut = False
        self.log: list[tuple[str, str, str | None]] = []
        self.url = ""

    def commit(self, revision: str) -> str:
        return hashlib.sha1(revision.encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        for name, files in self.revisions.items():
            if revision in (name, self.commit(name)):
                return files
        return None


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        if self.hub.gated:
            return self.refuse(403, "GatedRepo")
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401, "RepoNotFound")
        api, web = f"/api/models/{self.hub.repository}", f"/{self.hub.repository}/resolve/"
        if path.startswith(web):
            revision, _, name = path[len(web) :].partition("/")
            return self.send_file(revision, name, body)
        if path == api or path.startswith((api + "/revision/", api + "/tree/")):
            _, _, rest = path[len(api) + 1 :].partition("/")
            return self.send_info(rest.split("/")[0] or "main", tree="/tree/" in path)
        return self.refuse(404, "RepoNotFound")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_info(self, revision: str, tree: bool) -> None:
        files = self.hub.files(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        name = next(n for n in self.hub.revisions if revision in (n, self.hub.commit(n)))
        listing = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        siblings = [{"rfilename": path} for path in files]
        info = {"id": self.hub.repository, "sha": self.hub.commit(name), "siblings": siblings, "private": False}
        data = json.dumps(listing if tree else info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def send_file(self, revision: str, name: str, body: bool) -> None:
        files = self.hub.files(revision)
        if files is None or name not in files:
            return self.refuse(404, "RevisionNotFound" if files is None else "EntryNotFound")
        data, start = files[name], 0
        if requested := self.headers.get("Range"):
            start = int(requested.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if requested else 200)
        if requested:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", revision)
        self.end_headers()
        if body:
            self.send_body(name, data[start:])
        return None

    def send_body(self, name: str, data: bytes) -> None:
        if name in self.hub.cut:
            data = data[: self.hub.cut[name] if self.hub.always_cut else self.hub.cut.pop(name)]
        self.wfile.write(data)
        self.close_connection = True
