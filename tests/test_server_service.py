"""The model behind the server: when it is loaded and unloaded, and what threads may do meanwhile."""

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from dsv2_local.errors import InputError
from dsv2_local.server import service as service_module
from dsv2_local.server.service import Job, Service, State

pytest.importorskip("uvicorn")

from tests.serving import serving_nano


class Model:
    """Stands for an `LLM` that can only be closed."""

    name, context = "model", 100

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.engine = SimpleNamespace(scheduler=SimpleNamespace(queue=0))

    def close(self) -> None:
        self.closed.set()


def service(load: Any, idle_unload: float = 0.01) -> Service:
    return Service(load, "model", idle_unload)


async def reaches(service: Service, state: State) -> None:
    async with asyncio.timeout(30):
        while service.state is not state:
            await asyncio.sleep(0.001)


def test_a_model_that_nobody_asks_is_unloaded() -> None:
    model = Model()

    async def run() -> None:
        found = service(lambda: model)
        found.start()
        await reaches(found, State.READY)
        await reaches(found, State.UNLOADED)
        assert model.closed.wait(30)
        await found.close()

    asyncio.run(run())


def test_a_model_whose_only_client_leaves_while_it_is_loaded_is_unloaded() -> None:
    model, may_load = Model(), threading.Event()

    def load() -> Model:
        may_load.wait()
        return model

    async def run() -> None:
        found = service(load)
        found.start()
        found.enter()
        found.leave()
        await asyncio.sleep(0.02)  # longer than it may be idle
        may_load.set()
        await reaches(found, State.READY)
        await reaches(found, State.UNLOADED)
        await found.close()

    asyncio.run(run())


def test_a_model_that_is_asked_stays_and_one_that_is_being_unloaded_is_loaded_again() -> None:
    made: list[Model] = []

    def load() -> Model:
        made.append(Model())
        return made[-1]

    async def run() -> None:
        found = service(load)
        found.start()
        found.enter()
        first = await found.model()
        await asyncio.sleep(0.05)
        assert found.loaded is first
        found.leave()
        await reaches(found, State.UNLOADED)  # it may still be closing
        found.enter()
        second = await found.model()
        assert second is made[1]
        assert made[0].closed.is_set()
        assert not made[1].closed.is_set()
        found.leave()
        await found.close()

    asyncio.run(run())


def test_threads_may_submit_while_the_server_begins_to_drain() -> None:
    async def run() -> None:
        found = service(Model)

        class Submitting(SimpleNamespace):
            """An answer during whose look-up a thread submits another one."""

            @property
            def waits(self) -> bool:
                found.jobs["another"] = Job(SimpleNamespace(ended=True))  # type: ignore[arg-type]
                return False

        found.jobs["first"] = Job(Submitting(ended=False))  # type: ignore[arg-type]
        found.drain()
        assert set(found.jobs) == {"first", "another"}

    asyncio.run(run())


def test_what_was_read_is_on_disk_after_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "PAUSE_SECONDS", 0.01)
    body = {"messages": [{"role": "user", "content": "violin " * 200}], "max_tokens": 1}
    with serving_nano(cache_dir=tmp_path) as (url, found):
        for _ in range(2):
            assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
            assert found.loaded
            engine = found.loaded.engine
            while not engine.stored.written_bytes or engine.stored.queued_bytes:
                time.sleep(0.001)
        assert engine.stored.disk_blocks == engine.cache.pool.cached


def test_a_model_that_cannot_be_loaded_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Any] = [InputError("first"), Model(), InputError("later"), Model()]
    told: list[Exception] = []

    def load() -> Model:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def run() -> None:
        found = Service(load, "model", 0.01, told.append)  # type: ignore[arg-type]
        for expected in (State.FAILED, State.UNLOADED, State.FAILED, State.UNLOADED):
            found.start()
            await reaches(found, expected)
        await found.close()

    asyncio.run(run())
    assert [str(error) for error in told] == ["first"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "the model cannot be loaded: later"
    ]


def test_the_end_waits_for_a_model_that_is_being_unloaded() -> None:
    may_close = threading.Event()

    class Slow(Model):
        def close(self) -> None:
            may_close.wait()
            super().close()

    model = Slow()

    async def run() -> None:
        found = service(lambda: model)
        found.start()
        await reaches(found, State.READY)
        await reaches(found, State.UNLOADED)
        asyncio.get_running_loop().call_later(0.05, may_close.set)
        await found.close()
        assert model.closed.is_set()

    asyncio.run(run())


def test_more_answers_than_may_wait_are_refused_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "QUEUE", 2)
    with serving_nano(parallel=1) as (url, found):
        few, many = ({"prompt": ["A dog is"] * count, "max_tokens": 2} for count in (2, 50))
        refused = httpx.post(f"{url}/v1/completions", json=many, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        assert not found.jobs
        assert httpx.post(f"{url}/v1/completions", json=few, timeout=60).status_code == 200
