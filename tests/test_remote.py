"""`dsv2 run` and `dsv2 chat` with the model of a running server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest
from starlette.types import Receive, Scope, Send

from dsv2_local.commands.remote import RemoteLLM
from dsv2_local.errors import InputError, ServerError
from dsv2_local.server.service import Service
from tests.serving import serving

TEXT = "A piano is"
QUESTION = [{"role": "user", "content": "What is a violin?"}]


@pytest.fixture
def remote(server: tuple[str, Service]) -> Iterator[RemoteLLM]:
    with RemoteLLM(server[0] + "/v1/") as remote:
        yield remote


def dsv2(*options: str, host: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv2_local", *options]
    environment = {**os.environ, "DSV2_HOST": host, **more}
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)


def test_an_answer_is_that_of_the_model(server: tuple[str, Service], remote: RemoteLLM) -> None:
    llm = server[1].loaded
    assert llm
    local, answer = llm.chat(QUESTION, temperature=0), remote.chat(QUESTION, temperature=0, progress=lambda *_: None)
    list(local)
    assert "".join(chunk.text for chunk in answer) == answer.text == local.text
    for name in ("prompt_tokens", "completion_tokens", "context_used", "context", "finish_reason"):
        assert getattr(answer.stats, name) == getattr(local.stats, name), name
    assert remote.name == "dsv2-nano"
    assert remote.context == 2048
    assert remote.count_tokens(QUESTION) == llm.count_tokens(QUESTION)


def test_a_text_is_continued(server: tuple[str, Service], remote: RemoteLLM) -> None:
    llm = server[1].loaded
    assert llm
    local, answer = llm.generate(TEXT, temperature=0), remote.generate(TEXT, temperature=0)
    list(local), list(answer)
    assert answer.text == local.text
    assert answer.stats.completion_tokens == local.stats.completion_tokens > 16  # not the API's default


def test_closing_an_answer_cancels_it(server: tuple[str, Service], remote: RemoteLLM) -> None:
    service = server[1]
    before = service.totals.cancelled
    answer = remote.chat(QUESTION, temperature=3, seed=3, max_tokens=2000)  # has over 1,000 tokens
    next(answer)
    answer.close()
    while service.jobs:  # ends within a step
        remote.count_tokens(QUESTION)
    assert service.totals.cancelled == before + 1


def test_wrong_options_are_the_callers_fault(remote: RemoteLLM) -> None:
    with pytest.raises(InputError, match="temperature must be at least 0"):
        next(remote.chat(QUESTION, temperature=-1))
    with pytest.raises(InputError, match="--logprobs"):
        remote.chat(QUESTION, logprobs=3)
    with pytest.raises(InputError, match="--cache-dir"):
        remote.save_cache("file")


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("ftp://host", InputError, "is no address"), ("http://host:port", InputError, "is no address"),
        ("http://127.0.0.1:1", ServerError, "no server answers"),
    ],
)  # fmt: skip
def test_an_address_without_a_server_is_told(address: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RemoteLLM(address)


def test_the_command_loads_no_model_and_no_torch(server: tuple[str, Service]) -> None:
    code = (
        "import sys; from dsv2_local.cli import app; "
        "app(['run', 'What is a violin?', '--temperature', '0', '--stats'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "DSV2_HOST": server[0]}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, input="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A violin is")
    assert "prompt 12 tokens" in done.stderr


def test_the_command_gives_json_and_schemas(server: tuple[str, Service], tmp_path: Path) -> None:
    found = json.loads(dsv2("run", "What is a violin?", "--json", host=server[0]).stdout)
    assert found["model"] == "dsv2-nano"
    assert found["completion_tokens"] > 0
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    done = dsv2("run", "Answer.", "--json-schema", str(tmp_path / "schema.json"), host=server[0])
    assert json.loads(done.stdout)["a"] in ("x", "y")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "100"], "--context is for loading a model"), (["--cache", "file"], "--cache keeps the KV cache"),
        (["--batch", "file"], "unset DSV2_HOST"), (["--logprobs", "1", "--json"], "--logprobs"),
    ],
)  # fmt: skip
def test_options_of_a_model_that_is_loaded_here_are_refused(
    server: tuple[str, Service], options: list[str], words: str
) -> None:
    prompt = [] if "--batch" in options else ["text"]
    done = dsv2("run", *prompt, *options, host=server[0])
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout == ""


def test_a_chat_in_a_terminal(server: tuple[str, Service], tmp_path: Path) -> None:
    environment = {**os.environ, "DSV2_HOST": server[0], "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "dsv2_local", "chat", "--temperature", "0"]
    with pexpect.spawn(command[0], command[1:], env=environment, encoding="utf-8", timeout=30) as child:
        child.expect_exact("context 2,048 tokens")
        child.send("What is a violin?\r")
        child.expect_exact("bowed stringed instrument")
        child.send("/save mine\r")
        child.expect_exact("--cache-dir")
        child.send("/exit\r")
        child.expect(pexpect.EOF)
    assert child.exitstatus == 0


MODELS = {"data": [{"id": "m", "max_model_len": 100}]}
GOOD = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}


@contextmanager
def answering(models: object, *lines: bytes) -> Iterator[str]:
    """Serve a list of models, and these lines as each answer."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (kind := (await receive())["type"]) != "lifespan.shutdown":
                await send({"type": f"{kind}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in [json.dumps(models).encode()] if scope["path"].endswith("models") else lines:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    with serving(app) as url:
        yield url


def test_a_password_in_the_address_is_used_and_not_shown(server: tuple[str, Service]) -> None:
    with RemoteLLM(server[0].replace("//", "//user:secret@")) as remote:
        assert remote.recipe == server[0]
    for address in ("http://user:secret@127.0.0.1:1", "user:secret@127.0.0.1:x"):
        with pytest.raises((ServerError, InputError)) as raised:
            RemoteLLM(address)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize("key", ["kéy", "a\nb"])
def test_a_key_that_cannot_be_sent_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV2_API_KEY", key)
    with pytest.raises(InputError, match=r"\$DSV2_API_KEY must be"):
        RemoteLLM("127.0.0.1:1")


def data(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@pytest.mark.parametrize("models", [None, [], {}, {"data": []}, {"data": [5]}, {"data": [{"max_model_len": 5}]}])
def test_what_is_no_server_is_refused(models: object) -> None:
    with answering(models) as url, pytest.raises(ServerError, match="no server of OpenAI's API"):
        RemoteLLM(url)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([data({"choices": [{"delta": {"content": 5}}]})], "no server of OpenAI's API"),
        ([data({"choices": ["x"]})], "no server of OpenAI's API"), ([data([1])], "no server of OpenAI's API"),
        ([data(GOOD | {"usage": {"prompt_tokens": "a"}})], "no server of OpenAI's API"),
        ([b"data: " + b"[" * 100_000 + b"\n\n"], "no server of OpenAI's API"),
        ([b"data: ", *[b"x" * (1 << 20)] * 20], "no server of OpenAI's API"),
        ([data({"choices": [{"delta": {"content": "hi"}}]})], "before it was complete"), ([], "before it was complete"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error(lines: list[bytes], words: str) -> None:
    with answering(MODELS, *lines) as url, RemoteLLM(url) as remote, pytest.raises(ServerError, match=words):
        list(remote.chat(QUESTION))


def test_lines_may_come_in_any_pieces() -> None:
    text = data(GOOD) + b": ping\n\ndata: [DONE]"
    with answering(MODELS, *(text[at : at + 1] for at in range(len(text)))) as url, RemoteLLM(url) as remote:
        assert [chunk.text for chunk in remote.chat(QUESTION)] == ["hi"]
