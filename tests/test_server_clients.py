"""Clients that leave, in every state of their request: nothing of them is left. And ones that ask what nobody means."""

import json
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

pytest.importorskip("uvicorn")

from dsv2_local.server.service import Service
from tests.serving import serving_nano

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from fuzz_server import Bodies  # isort: skip (it is found by the line above)

SHORT = [{"role": "user", "content": "What is a violin?"}]
LONG = [{"role": "user", "content": "violin " * 1200}]
ENDLESS = {"logit_bias": {"1": -100}, "temperature": 0}
"""Until the context is full."""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    with serving_nano(parallel=1) as (url, service):
        while httpx.get(f"{url}/health").json()["status"] != "ready":
            time.sleep(0.01)
        yield url, service


@pytest.fixture
def idle(server: tuple[str, Service]) -> Iterator[Callable[[], None]]:
    """Waits until the server does nothing, and has what it had before."""
    url, service = server
    llm = service.loaded
    assert llm
    scheduler, pool = llm.engine.scheduler, llm.engine.cache.pool

    def wait(seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while service.jobs or service.active or scheduler.running or scheduler.waiting or pool.available < pool.count:
            found = service.jobs, service.active, scheduler.running, scheduler.waiting, pool.available, pool.count
            assert time.monotonic() < end, found
            time.sleep(0.005)

    wait()
    yield wait
    wait()
    before = service.totals.answers
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": SHORT, "max_tokens": 3})
    assert answer.status_code == 200
    assert service.totals.answers == before + 1


def connected(url: str, body: dict[str, object], part: int | None = None) -> socket.socket:
    """A connection on which this body was sent, or only so many bytes of it."""
    port = int(url.rsplit(":", 1)[1])
    link = socket.create_connection(("127.0.0.1", port), 60)
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    link.sendall(head.encode() + data[:part])
    return link


def until(link: socket.socket, word: bytes) -> None:
    """Read until this word comes."""
    found = b""
    while word not in found:
        piece = link.recv(4096)
        assert piece, found
        found += piece


def reset(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_answer_comes(server, idle, leave, stream) -> None:
    url, service = server
    link = connected(url, {"messages": SHORT, "stream": stream, **ENDLESS})
    while not any(job.first or job.generation.stats.completion_tokens for job in service.jobs.values()):
        time.sleep(0.001)
    cancelled = service.totals.cancelled
    leave(link)
    idle()
    assert service.totals.cancelled == cancelled + 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_prompt_is_read(server, idle, stream) -> None:
    url, service = server
    content = f"{random.random()} " + str(LONG[0]["content"])  # none of it is known yet
    link = connected(url, {"messages": [{"role": "user", "content": content}], "stream": stream})
    while not any(not job.generation.waits for job in service.jobs.values()):
        time.sleep(0.001)
    tokens = service.totals.completion_tokens
    link.close()
    idle()
    assert service.totals.completion_tokens <= tokens + 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits(server, idle, stream) -> None:
    url, service = server
    with closing(connected(url, {"messages": SHORT, "stream": True, **ENDLESS})) as first:
        until(first, b"content")
        waiting = connected(url, {"messages": SHORT, "stream": stream, "n": 1})
        while not any(job.generation.waits for job in service.jobs.values()):
            time.sleep(0.001)
        waiting.close()
        while len(service.jobs) > 1:
            time.sleep(0.001)
        assert service.loaded
        while service.loaded.engine.scheduler.waiting:
            time.sleep(0.001)
        assert len(service.loaded.engine.scheduler.running) == 1
    idle()


def test_a_client_that_leaves_before_its_body_is_complete(server, idle) -> None:
    url, service = server
    requests = service.totals.requests
    for part in (0, 1, 20):
        connected(url, {"messages": SHORT}, part).close()
    idle()
    assert service.totals.requests == requests


@pytest.mark.slow
def test_clients_that_leave_at_any_moment(server, idle) -> None:
    url, _ = server
    draw = random.Random(0)

    def leave(seconds: float, stream: bool) -> None:
        link = connected(url, {"messages": draw.choice([SHORT, LONG]), "stream": stream, "max_tokens": 5})
        time.sleep(seconds)
        draw.choice([socket.socket.close, reset])(link)

    for _ in range(5):
        threads = [
            threading.Thread(target=leave, args=(draw.random() ** 2 / 2, draw.random() < 0.5)) for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    idle()


@pytest.mark.slow
def test_no_body_is_answered_with_a_fault(server, idle, caplog) -> None:
    url, _ = server
    paths = posts(url)
    bodies = Bodies(1)
    listed = random.Random(1).sample([*bodies.systematic(paths), *bodies.wrong_types(paths)], 120)
    further = bodies.at_random(paths)
    with httpx.Client(base_url=url, timeout=60) as client:
        for path, body in [*listed, *(next(further) for _ in range(120))]:
            response = client.post(path, content=body)
            assert response.status_code < 500, (path, body[:2000], response.text)
            assert "has a fault" not in response.text, (path, body[:2000])
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def posts(url: str) -> list[str]:
    described = httpx.get(f"{url}/openapi.json").json()["paths"]
    return [path for path, methods in described.items() if "post" in methods]


@pytest.mark.slow
def test_what_the_description_allows_is_no_fault(server, idle, caplog) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    url, _ = server
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def check(case) -> None:
            case.headers = {**(case.headers or {}), "x-of-the-test": "1"}
            if isinstance(case.body, dict):  # an answer may be as long as the context
                limited = dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), 3)
                case.body = {**case.body, **limited, "options": {"num_predict": 3}}
            response = case.call(timeout=60)
            assert response.status_code < 500, (case.as_curl_command(), response.text)

        check()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
