"""/dsv2/status: what it says while answers wait, are read and are written, of whom, and that it waits for nobody."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsv2_local.offload.plan_request import Mode
from dsv2_local.runtime import engine_core
from dsv2_local.server.app import create_app
from dsv2_local.server.service import Service
from dsv2_local.server.status import FORGET, Rates, describe
from tests.serving import serving, serving_nano
from tests.test_placement import devices, loaded

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is a violin?"}]
KEYS = {
    "state", "model", "version", "uptime_s", "context", "parallel", "device", "answers", "waiting", "rates", "totals",
    "blocks", "memory", "experts",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    with serving_nano() as (url, service):
        chat(url)  # which waits for the model
        yield url, service


def chat(url: str, **options: Any) -> dict[str, Any]:
    body = {"messages": QUESTION, "temperature": 0, **options}
    found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()  # type: ignore[no-any-return]


def status(url: str) -> dict[str, Any]:
    found = httpx.get(f"{url}/dsv2/status")
    assert found.status_code == 200
    assert set(found.json()) == KEYS
    return found.json()  # type: ignore[no-any-return]


@contextmanager
def asked(url: str, *bodies: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Ask in threads; the answers are in the list afterwards."""
    answers: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda body=body: answers.append(chat(url, **body))) for body in bodies]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        for thread in threads:
            thread.join()
    assert len(answers) == len(bodies)


def test_an_idle_server(server: tuple[str, Service]) -> None:
    url, service = server
    assert service.loaded
    service.loaded.engine.clear()
    before = status(url)["totals"]
    usage = chat(url, max_tokens=5)["usage"]
    found = status(url)
    assert found["state"] == "ready"
    assert (found["model"], found["device"], found["context"], found["parallel"]) == ("dsv2-nano", "CPU", 2048, 16)
    assert (found["answers"], found["waiting"], found["experts"]) == ([], 0, None)
    added = {name: value - before[name] for name, value in found["totals"].items()}
    assert added == {
        "requests": 1, "prompt_tokens": usage["prompt_tokens"], "reused_tokens": 0, "completion_tokens": 5,
    }  # fmt: skip
    assert found["blocks"] == {"size": 64, "total": 32, "held": 0, "cached": 1, "free": 31}
    assert 0 < found["memory"]["rss_bytes"] < found["memory"]["ram_bytes"]
    assert found["memory"]["gpu"] == []
    assert found["uptime_s"] > 0


def test_answers_are_seen_in_every_phase_while_another_thread_has_the_engine(
    server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This thread holds the engine throughout, so a status that waited for it would never come."""
    url, service = server
    assert service.loaded
    engine = service.loaded.engine
    engine.clear()
    monkeypatch.setattr(engine_core, "PREFILL_SECONDS", 0.0)  # a pass is computed in the smallest pieces
    secret = [{"role": "user", "content": "xyzzy plugh " * 20}]
    engine.turn.acquire()
    with asked(url, {"messages": secret, "max_tokens": 6}):
        try:
            while not (found := status(url))["answers"]:
                pass
            [waiting] = found["answers"]
            assert (waiting["phase"], found["waiting"], waiting["prefilled_tokens"]) == ("waiting", 1, 0)
            assert waiting["prompt_tokens"] > 40
            seen = [waiting]
            while found["answers"]:
                with engine.opened():
                    engine.step()
                found = status(url)
                seen += found["answers"]
                blocks = found["blocks"]
                assert blocks["held"] > 0 or not found["answers"] or seen[-1]["completion_tokens"] == 6
                assert blocks["held"] + blocks["cached"] + blocks["free"] == blocks["total"]
                assert "xyzzy" not in json.dumps(found)
        finally:
            engine.turn.release()
    phases = list(dict.fromkeys(each["phase"] for each in seen))
    assert phases[:3] == ["waiting", "prefill", "decode"]
    assert len({each["id"] for each in seen}) == 1
    assert seen[0]["id"].startswith("chatcmpl-")
    read = [each["prefilled_tokens"] for each in seen]
    assert read == sorted(read)
    assert len(set(read)) > 3  # in part, while a pass is in flight
    assert read[-1] == waiting["prompt_tokens"]
    written = [each["completion_tokens"] for each in seen]
    assert written == sorted(written)
    assert written[-1] >= 5  # with the sixth it has ended


def test_the_id_of_an_answer_is_that_of_the_api(server: tuple[str, Service]) -> None:
    url, service = server
    assert service.loaded
    service.loaded.engine.turn.acquire()
    with asked(url, {"max_tokens": 2}, {"max_tokens": 2}) as answers:
        try:
            while len(found := status(url)["answers"]) < 2:
                pass
        finally:
            service.loaded.engine.turn.release()
    assert {each["id"] for each in found} == {each["id"] for each in answers}


def test_experts_off_the_gpu_are_counted_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    service = Service(lambda: loaded(Mode.HYBRID, on=devices(7)), "simulated")
    with serving(create_app(service)) as url:
        chat(url, max_tokens=12)
        found = status(url)
        assert service.loaded
        totals = service.loaded.experts.stats  # type: ignore[attr-defined]
        layers = found["experts"]["layers"]
        assert [layer["layer"] for layer in layers] == [1, 2, 3, 4, 5]
        assert all(set(layer) == {"layer", "experts", "resident", "hits", "fetched", "cpu"} for layer in layers)
        assert sum(layer["hits"] for layer in layers) == totals.hits > 0
        assert sum(layer["cpu"] for layer in layers) == totals.host_experts > 0
        assert sum(layer["fetched"] for layer in layers) > 0
        assert sum(len(layer["resident"]) for layer in layers) == 7
        assert all(set(layer["resident"]) <= set(range(layer["experts"])) for layer in layers)
        assert found["device"] != "CPU"


def test_a_model_that_is_not_loaded_has_no_figures() -> None:
    service = Service(lambda: pytest.fail("it is not loaded"), "model")
    found = describe(service, Rates())
    assert set(found) == KEYS
    assert (found["state"], found["context"], found["blocks"], found["experts"]) == ("unloaded", None, None, None)
    assert found["memory"]["rss_bytes"] > 0
    json.dumps(found)


def test_rates_are_those_of_the_last_second() -> None:
    rates = Rates()
    assert rates.add(100.0, 500, 50) == (0, 0)  # since when?
    assert rates.add(101.0, 1500, 60) == (1000, 10)
    assert rates.add(102.0, 1500, 80) == (0, 20)
    assert rates.add(102.5, 1500, 90) == (0, 20)  # the window is as long as if one page asked
    assert rates.add(102.55, 1500, 90) == pytest.approx((0, 30 / 1.55))
    assert rates.add(104.0, 1000, 100) == pytest.approx((0, 10 / 1.5))  # a pass was dropped
    assert rates.add(104.0 + FORGET + 1, 9000, 900) == (0, 0)


def test_many_pages_that_ask_cost_no_memory() -> None:
    rates = Rates()
    for number in range(100_000):
        rates.add(number / 1000, number, number)
    assert len(rates._seen) < 20
