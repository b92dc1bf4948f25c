"""The guard before the server, by raw sockets: hosts, pages, keys, bodies, and clients that are slow on purpose."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("uvicorn")

import uvicorn
from starlette.requests import Request

from dsv2_local.errors import InputError
from dsv2_local.server.access import Access, Host, read_keys
from dsv2_local.server.body import read_json
from dsv2_local.server.connections import uvicorn_config
from dsv2_local.server.guard import Guard
from dsv2_local.server.limits import USUAL, Limits

LIMITS = replace(USUAL, body_bytes=1000, bodies_bytes=1500, head_bytes=4000)
LINKED = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
OWN = "http://localhost:8000"
LISTED = "https://notes.example"


class Echo:
    """Answers with what it got; as `/wait` it waits for the client to leave, as `/fault` it has a fault."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.entered = threading.Event()
        self.times = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while (kind := (await receive())["type"]) != "lifespan.shutdown":
                await send({"type": f"{kind}.complete"})
            await send({"type": f"{kind}.complete"})
            return
        self.times += 1
        self.entered.set()
        if scope["path"] == "/fault":
            raise ValueError("the text of a prompt")
        message = await receive() if scope["method"] == "POST" else {"body": b""}
        if scope["path"] == "/wait":
            assert (await receive())["type"] == "http.disconnect"
            self.left.set()
            return
        if scope["path"] == "/flood":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(1000):
                await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            self.left.set()
            return
        body = json.dumps({"path": scope["path"], "size": len(message["body"])}).encode()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]}
        )
        await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(access: Access, limits: Limits = LIMITS, host: str = "127.0.0.1") -> Iterator[tuple[int, Echo]]:
    echo = Echo()
    server = uvicorn.Server(uvicorn_config(Guard(echo, access, limits), limits))
    with socket.create_server((host, 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1], echo
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server():
    with serving(Access.of("127.0.0.1", cors_origins=[LISTED])) as (port, echo):
        yield port, echo


def exchange(port: int, data: bytes) -> bytes:
    """What the server sends until it closes the connection, which `data` asks for."""
    with closing(socket.create_connection(("127.0.0.1", port), 30)) as link:
        link.sendall(data)
        return received(link)


def received(link: socket.socket) -> bytes:
    found = b""
    while piece := link.recv(65536):
        found += piece
    return found


def request(
    port: int, method: str = "POST", path: str = "/v1/chat/completions", body: bytes = b"{}", **headers: str | None
):
    """Send one request; returns the status, the headers and the body."""
    fields = {"host": "localhost:8000", "connection": "close"} | ({"content-length": str(len(body))} if body else {})
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return parsed(exchange(port, "\r\n".join([*lines, "", ""]).encode("latin-1") + body))


def parsed(answer: bytes):
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), {name.lower(): value for name, value in (x.split(": ", 1) for x in lines)}, body


HOSTS = {
    "localhost": True, "localhost:1": True, "LOCALHOST:8000": True, "127.0.0.1": True, "127.0.0.1:65535": True,
    "127.9.9.9": True, "[::1]:8000": True, "[0:0:0:0:0:0:0:1]": True, "[::ffff:127.0.0.1]": True,
    "": False, "evil.example": False, "localhost.evil.example": False, "evil.local": False, "localhost.": False,
    "127.0.0.1.evil.example": False, "127.1": False, "2130706433": False, "0x7f.0.0.1": False, "10.0.0.1": False,
    "[::2]": False, "::1": False, "[::1": False, "[::1%25lo]": False, "localhost:": False, "localhost:0": False,
    "localhost:65536": False, "localhost:8000:1": False, "user@localhost": False, "localhost/": False,
    "localhost, localhost": False, "localhost evil.example": False, "0.0.0.0": False, "l\xf6calhost": False,
}  # fmt: skip
ORIGINS = {
    None: True, OWN: True, LISTED: True, "https://NOTES.example": True,
    "null": False, "": False, "http://localhost:3000": False, "https://localhost:8000": False,
    "http://localhost": False, "http://evil.example": False, "http://localhost:8000.evil.example": False,
    "http://user@localhost:8000": False, "http://localhost:8000/": False, "localhost:8000": False,
    "http://notes.example": False, "https://notes.example:8443": False, "https://x.notes.example": False,
    "file://": False, "chrome-extension://localhost:8000": False,
}  # fmt: skip


@pytest.mark.parametrize("origin", ORIGINS, ids=str)
@pytest.mark.parametrize("host", ["localhost:8000", "evil.example:8000"])
def test_a_page_needs_a_good_host_and_a_good_origin(server, host, origin):
    port, echo = server
    before = echo.times
    status, headers, body = request(port, host=host, origin=origin, content_type="application/json")
    good = ORIGINS[origin] and host.startswith("localhost")
    assert status == (200 if good else 403)
    assert echo.times == before + good
    assert ("access-control-allow-origin" in headers) == (good and "notes" in (origin or "").lower())
    if not good:
        assert json.loads(body)["error"]["code"] in ("host_not_allowed", "origin_not_allowed")


@pytest.mark.parametrize("host", HOSTS, ids=ascii)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_hosts_are_listed_exactly(server, method, host):
    status, _, body = request(server[0], method, body=b"{}" if method == "POST" else b"", host=host)
    assert status == (200 if HOSTS[host] else 403), body


def test_a_request_without_a_host_or_with_two_is_refused(server):
    for lines in ("", "Host: localhost\r\nHost: evil.example\r\n", "Host: localhost\r\nHost: localhost\r\n"):
        assert parsed(exchange(server[0], f"GET / HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode()))[0] == 400
    assert parsed(exchange(server[0], b"GET / HTTP/1.0\r\n\r\n"))[0] == 403


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/responses", lambda body: body["error"]["message"]),
        ("/v1/messages", lambda body: (body["type"] == "error" or None) and body["error"]["message"]),
        ("/api/chat", lambda body: body["error"]),
    ],
)
def test_errors_have_the_shape_of_the_api(server, path, shape):
    status, _, body = request(server[0], path=path, host="evil.example")
    assert status == 403
    assert "--allowed-host evil.example" in shape(json.loads(body))


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {"sec_fetch_site": "same-origin"}, 200),
        ("GET", "/", {"sec_fetch_site": "none"}, 200),
        ("GET", "/", LINKED, 200),
        ("GET", "/", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"}, 403),
        ("GET", "/", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors", "sec_fetch_dest": "image"}, 403),
        ("GET", "/metrics", LINKED, 403),
        ("POST", "/", LINKED, 403),
        ("GET", "/v1/models", {"sec_fetch_site": "same-site"}, 403),
        ("GET", "/v1/models", {"sec_fetch_site": "strange"}, 403),
        ("GET", "/v1/models", {"sec_fetch_site": "cross-site", "origin": LISTED}, 200),
        ("GET", "/v1/models", {"sec_fetch_site": "cross-site", "origin": OWN}, 403),
        ("GET", "/v1/models", {"sec_fetch_site": "same-origin", "origin": "https://localhost:8000"}, 200),
        ("GET", "/v1/models", {"sec_fetch_mode": "cors"}, 200),  # Node
    ],
)  # fmt: skip
def test_what_the_browser_tells_of_the_page(server, method, path, headers, status):
    assert request(server[0], method, path, b"", **headers)[0] == status


@pytest.mark.parametrize(
    ("kind", "headers", "status"),
    [
        ("application/json", {"origin": OWN}, 200),
        ("application/json; charset=utf-8", {"origin": LISTED}, 200),
        ("text/plain", {"origin": OWN}, 415),
        ("application/x-www-form-urlencoded", {"sec_fetch_site": "same-origin"}, 415),
        (None, {"referer": "http://evil.example/"}, 415),
        ("application/x-www-form-urlencoded", {}, 200),  # curl -d
        (None, {}, 200),
        ("application/json", {"content_encoding": "gzip"}, 415),
    ],
)
def test_types_of_bodies(server, kind, headers, status):
    assert request(server[0], content_type=kind, **headers)[0] == status


def test_a_listed_page_may_ask_what_it_may_send(server):
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "authorization,x-stainless-os"}
    status, headers, body = request(server[0], "OPTIONS", body=b"", origin=LISTED, **asked)
    assert (status, body) == (204, b"")
    assert headers["access-control-allow-origin"] == LISTED
    assert headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert "POST" in headers["access-control-allow-methods"]
    assert headers["vary"] == "origin"
    status, headers, _ = request(server[0], "OPTIONS", body=b"", origin="http://evil.example", **asked)
    assert status == 403
    assert not any(name.startswith("access-control") for name in headers)


KEY, OTHER = "first-key-of-two", "second-key-of-two"


@pytest.fixture(scope="module")
def locked():
    access = Access.of("0.0.0.0", ["pc.example"], [LISTED], keys=[KEY, OTHER])
    with serving(access, host="0.0.0.0") as (port, _):
        yield port


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/health", {}, 200),
        ("/health/", {}, 401),
        ("//health", {}, 401),
        ("/metrics", {}, 401),
        ("/openapi.json", {}, 401),
        ("/v1/models", {"authorization": f"Bearer {KEY}"}, 200),
        ("/v1/models", {"authorization": f"bearer   {OTHER} "}, 200),
        ("/v1/models", {"x_api_key": OTHER}, 200),
        ("/v1/models", {"authorization": "Bearer wrong-key", "x_api_key": OTHER}, 200),
        ("/v1/models", {"authorization": f"Basic {KEY}"}, 401),
        ("/v1/models", {"authorization": KEY}, 401),
        ("/v1/models", {"authorization": "Bearer"}, 401),
        ("/v1/models", {"x_api_key": ""}, 401),
        ("/v1/models", {"x_api_key": KEY[:-1]}, 401),
        ("/v1/models", {"x_api_key": KEY + "x"}, 401),
        ("/v1/models", {"x_api_key": KEY + "\xfc"}, 401),
        (f"/v1/models?key={KEY}", {}, 401),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_keys(locked, method, path, headers, status):
    found, fields, body = request(locked, method, path, b"", host="pc.example", **headers)
    assert found == status, body
    assert ("www-authenticate" in fields) == (status == 401)


def test_the_answer_that_a_key_is_wrong_can_be_read_by_a_listed_page(locked):
    status, headers, _ = request(locked, "GET", "/v1/models", b"", origin=LISTED, x_api_key="not-the-key")
    assert (status, headers["access-control-allow-origin"]) == (401, LISTED)


def test_the_address_that_a_connection_came_to_is_a_host(locked):
    assert request(locked, "GET", "/health", b"", host="127.0.0.1:1")[0] == 200
    assert Access().answers_to(Host("192.0.2.7"), "192.0.2.7")
    assert Access().answers_to(Host("192.0.2.7"), "::ffff:192.0.2.7")
    assert not Access().answers_to(Host("192.0.2.8"), "192.0.2.7")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "pc.example", "localhost.example"])
def test_beyond_loopback_a_key_is_needed(host):
    with pytest.raises(InputError, match="a key is needed: give --api-key-file"):
        Access.of(host)
    assert Access.of(host, keys=[KEY]).names == {host}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.3.2.1"])
def test_on_loopback_none_is(host):
    assert not Access.of(host).keys


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"host": "local host"}, "--host must be"),
        ({"host": "localhost:80"}, "the port has an option of its own"),
        ({"allowed_hosts": ["*.example"]}, "--allowed-host must be"),
        ({"allowed_hosts": [""]}, "--allowed-host must be"),
        ({"allowed_hosts": ["a.example:80"]}, "without a port"),
        ({"cors_origins": ["*"]}, "--cors-origin must be"),
        ({"cors_origins": ["null"]}, "--cors-origin must be"),
        ({"cors_origins": ["http://a.example/"]}, "without a path"),
    ],
)
def test_wrong_options_are_named(options, wrong):
    with pytest.raises(InputError, match=wrong.replace("*", "\\*")):
        Access.of(**{"host": "localhost"} | options)


def test_keys_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of Ann\n{KEY}\r\n\n  {OTHER}\n")
    assert read_keys(file, {"DSV2_API_KEY": "third-key"}) == ["third-key", KEY, OTHER]
    assert read_keys(None, {"DSV2_API_KEY": ""}) == []
    for text, wrong in (("", "has no key"), ("short\n", "one has 5"), ("two words here\n", "visible ASCII")):
        file.write_text(text)
        with pytest.raises(InputError, match=wrong):
            read_keys(file, {})
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "none", {})
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="UTF-8"):
        read_keys(file, {})


HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000, 200),
        (HEAD + b"Content-Length: 1001\r\n\r\n", 413),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", 413),
        (HEAD + b"Content-Length: 999999999999999999999999999\r\n\r\n", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 1, 2\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"x" * 1000) + b"0\r\n\r\n", 200),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"x" * 600) * 2 + b"0\r\n\r\n", 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (HEAD + b"X: " + b"y" * 5000 + b"\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"GET\r\n\r\n", 400),
        (b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 403),
    ],
)
def test_bodies_and_heads_of_all_sizes(data, status):
    with serving(Access.of("localhost"), replace(LIMITS, head_seconds=0.3, keep_alive_seconds=1)) as (port, _):
        with closing(socket.create_connection(("127.0.0.1", port), 30)) as link:
            link.sendall(data)
            found = parsed(received(link))
        if status == 501:
            assert found[0] in (400, 501)
        else:
            assert found[0] == status, found


def test_a_head_that_never_ends_is_not_waited_for():
    with serving(Access.of("localhost"), replace(LIMITS, head_seconds=0.3)) as (port, echo):
        for start in (b"", b"GE", HEAD):
            with closing(socket.create_connection(("127.0.0.1", port), 30)) as link:
                link.sendall(start)
                assert received(link) == b""
        assert isinstance(dripped(port, HEAD * 100), OSError)
        assert not echo.times


def dripped(port: int, data: bytes) -> OSError | None:
    """Send a byte now and then; returns what ends it."""
    with closing(socket.create_connection(("127.0.0.1", port), 30)) as link:
        try:
            for byte in data:
                link.sendall(bytes([byte]))
                time.sleep(0.02)
        except OSError as error:
            return error
    return None


@pytest.mark.parametrize("limits", [{"body_pause_seconds": 0.2}, {"body_seconds": 0.2}], ids=str)
def test_half_a_body_is_not_waited_for(limits):
    with serving(Access.of("localhost"), replace(LIMITS, head_seconds=0.2, **limits)) as (port, echo):
        status, _, body = parsed(exchange(port, HEAD + b"Content-Length: 10\r\n\r\n{"))
        assert (status, json.loads(body)["error"]["code"]) == (408, "timeout")
        assert not echo.times


def test_all_bodies_that_arrive_are_bounded_together():
    with (
        serving(Access.of("localhost"), replace(LIMITS, body_pause_seconds=30)) as (port, _),
        closing(socket.create_connection(("127.0.0.1", port), 30)) as link,
    ):
        link.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n")
        assert link.recv(100).startswith(b"HTTP/1.1 100")
        link.sendall(b"x" * 999)
        statuses = set()
        while 503 not in statuses:  # as soon as the server has read those bytes
            statuses.add(request(port, body=b"x" * 600)[0])
        link.sendall(b"x")
        assert link.recv(1000).startswith(b"HTTP/1.1 200")
        assert request(port, body=b"x" * 1000)[0] == 200


def test_bodies_count_until_they_are_answered():
    with serving(Access.of("localhost")) as (port, echo):
        with closing(socket.create_connection(("127.0.0.1", port), 30)) as link:
            link.sendall(b"POST /wait HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000)
            assert echo.entered.wait(30)
            assert request(port, body=b"x" * 501)[0] == 503
            assert request(port, body=b"x" * 500)[0] == 200
        assert echo.left.wait(30)
        while request(port, body=b"x" * 501)[0] == 503:  # until the one that has left is forgotten
            pass
        assert request(port, body=b"x" * 1000)[0] == 200


def test_requests_one_after_the_other_without_waiting(server):
    one = HEAD + b"Content-Length: 2\r\n\r\n{}"
    answers = exchange(server[0], one * 20 + one.replace(b"Host", b"Connection: close\r\nHost"))
    assert answers.count(b"HTTP/1.1 200") == 21


@pytest.mark.parametrize("further", [b"", HEAD, b"\r\n", HEAD + b"Content-Length: 50000\r\n\r\n" + b"x" * 20000])
@pytest.mark.parametrize("last", [b"", b"Connection: close\r\n"])
def test_a_client_that_leaves_is_noticed_whatever_it_sent(further, last):
    with serving(Access.of("localhost")) as (port, echo):
        with closing(socket.create_connection(("127.0.0.1", port), 30)) as link:
            link.sendall(
                b"POST /wait HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n" + last + b"\r\n{}" + further
            )
            assert echo.entered.wait(30)
        assert echo.left.wait(30)


def test_a_client_that_does_not_read_is_cut_off():
    with (
        serving(Access.of("localhost"), replace(LIMITS, stalled_seconds=0.3)) as (port, echo),
        closing(socket.create_connection(("127.0.0.1", port), 30)) as link,
    ):
        link.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert echo.entered.wait(30)
        assert echo.left.wait(30)
        assert not received(link).endswith(b"0\r\n\r\n")


def test_connections_are_counted():
    with serving(Access.of("localhost"), replace(LIMITS, connections=3)) as (port, _):
        links = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(3)]
        try:
            status, headers, _ = parsed(exchange(port, b""))
            assert (status, headers["retry-after"]) == (503, "2")
        finally:
            for link in links:
                link.close()
        while request(port)[0] != 200:
            pass


def test_a_fault_is_logged_without_its_text(server, caplog):
    with caplog.at_level(logging.DEBUG):
        status, _, body = request(server[0], path="/fault")
    assert status == 500
    assert "ValueError at" in caplog.text
    assert "prompt" not in caplog.text + body.decode()
    assert "Traceback" not in caplog.text


BODIES = {
    b"": "is empty", b"[]": "must be an object", b"{": "is not JSON", b"\xff": "not UTF-8",
    b"\xef\xbb\xbf{}": "byte order mark",
    b"\xff\xfe{\0}\0": "byte order mark", b'{"a": NaN}': "no finite number", b'{"a": 1e999}': "no finite number",
    b'{"a": ' + b"1" * 101 + b"}": "101 digits", b'{"a": 1, "a": 2}': "given twice",
    b'{"a": {"b": 1, "b": 1}}': "given twice",
    b'{"a": "\\ud83d"}': "surrogate", b'{"a": "\\udca9"}': "surrogate", b"{\0}": "NUL",
    b'{"a":' + b"[" * 100 + b"]" * 100 + b"}": "nested", b"[" * 100_000: "nested", b'{"a":' * 100_000: "nested",
    b'{"stop": [' + b"1," * 256 + b"1]}": "stop has 257 entries", b'{"a": 1} x': "is not JSON",
}  # fmt: skip


def read(data: bytes) -> dict[str, object]:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": data}

    return asyncio.run(read_json(Request({"type": "http", "headers": []}, receive)))


@pytest.mark.parametrize("data", BODIES, ids=lambda data: ascii(data[:20]))
def test_what_is_no_body_is_refused(data):
    with pytest.raises(InputError, match=BODIES[data]):
        read(data)


def test_what_is_a_body_is_read():
    deep = b'{"a":' + b"[" * 99 + b'"]]]{{{[[[ \\" ]"' + b"]" * 99 + b"}"
    assert read(deep) == json.loads(deep)
    assert read(b'{"a": "\\ud83d\\ude00", "b": 1.5, "c": ' + b"9" * 100 + b"}")["a"] == "\U0001f600"
    brackets = json.dumps({"a": "[{" * 1000 + '"\\', "b": [[{}]] * 200}).encode()
    assert read(brackets) == json.loads(brackets)
