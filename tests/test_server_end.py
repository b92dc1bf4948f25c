"""How `dsv2 serve` ends: what signals do to answers that are computed, that wait, and that come too late."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytest.importorskip("uvicorn")

SECRET = "a violin that nobody may read about"
LONG = {
    "messages": [{"role": "user", "content": SECRET}], "stream": True, "temperature": 0, "max_tokens": 1500,
    "logit_bias": {"1": -100},
}  # fmt: skip


@contextmanager
def served(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """`dsv2 serve`, its address, and the lines that it writes to standard error."""
    command = [
        sys.executable,
        "-m",
        "dsv2_local",
        "serve",
        "--port",
        "0",
        "--device",
        "cpu",
        "--threads",
        "1",
        *options,
    ]
    environment = os.environ | {"DSV2_TRACEBACK": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr
            lines: list[str] = []
            while not lines or "serving" not in lines[-1]:
                line = process.stderr.readline()
                assert line, lines
                lines.append(line)
            reader = threading.Thread(target=lambda: lines.extend(process.stderr))
            reader.start()
            yield process, next(word for word in lines[-1].split() if word.startswith("http")), lines
        finally:
            process.kill()
            process.wait()
            reader.join()
            assert "Traceback" not in "".join(lines)
            assert SECRET not in "".join(lines)


def events(response: httpx.Response) -> Iterator[dict[str, object] | str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:]) if line[6:] != "[DONE]" else "[DONE]"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_lets_answers_end_and_refuses_the_rest(number: int) -> None:
    with served("--parallel", "1") as (process, url, lines), httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/chat/completions", json=LONG | {"max_tokens": 300}) as running:
            found = events(running)
            next(found), next(found)
            with client.stream("POST", "/v1/chat/completions", json=LONG) as queued:
                waiting = events(queued)
                next(waiting)
                process.send_signal(number)
                while client.get("/health").json() != {"status": "draining"}:
                    pass
                assert "shutting down" in json.dumps(list(waiting)[-1])
            refused = client.post("/v1/chat/completions", json=LONG)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
            refused = client.post("/v1/messages", json=LONG, headers={"anthropic-version": "2023-06-01"})
            assert refused.status_code in (404, 529)
            assert list(found)[-1] == "[DONE]"
        assert process.wait(30) == 0
    assert any("a second signal ends at once" in line for line in lines)


@pytest.mark.slow
def test_answers_are_cut_off_when_the_time_is_over() -> None:
    with (
        served("--drain-timeout", "1s") as (process, url, _),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG | {"n": 8}, timeout=60) as running,
    ):
        found = events(running)
        next(found)
        process.terminate()
        assert "shutting down" in json.dumps(list(found)[-1])
        assert process.wait(30) == 0


@pytest.mark.slow
def test_the_second_signal_ends_at_once() -> None:
    with (
        served("--drain-timeout", "10m") as (process, url, lines),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG | {"n": 8}, timeout=60) as running,
    ):
        found = events(running)  # httpx hangs up when it is gone
        next(found)
        process.terminate()
        while not any("a second signal ends at once" in line for line in lines):
            assert process.poll() is None, lines
            time.sleep(0.01)
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM


@pytest.mark.slow
def test_a_signal_while_the_model_is_loaded_ends_at_once() -> None:
    with served() as (process, _, _):
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.slow
def test_keys_that_others_can_read_are_told(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a-key-of-some-length\n")
    for mode, told in ((0o644, True), (0o640, False)):
        file.chmod(mode)
        with served("--api-key-file", str(file)) as (_, _, lines):
            assert any("other users can read the keys" in line for line in lines) is told
            assert "a-key-of-some-length" not in "".join(lines)
