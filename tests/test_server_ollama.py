"""Ollama's API, with its client and with raw requests."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from dsv2_local.chunk import Chunk
from dsv2_local.errors import CacheFullError, Dsv2Error, QueueFullError
from dsv2_local.server import streaming
from dsv2_local.server.service import Service
from tests.serving import WrittenAnswer, call, serving_written

QUESTION: list[Any] = [{"role": "user", "content": "What is a violin?"}]
GREEDY = {"temperature": 0}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]},
    },
}  # fmt: skip
MIXED = [
    Chunk("Let", 1), Chunk("", 2), *call(0, "weather", '{"city"', ': "Rome"}'), *call(1, "time", "{", "}"),
    Chunk("Done", 5), *call(2, "cut", '{"off'),
]  # fmt: skip


@pytest.fixture
def client(server: tuple[str, Service]) -> Iterator[ollama.Client]:
    with client_of(server[0]) as client:
        yield client


def client_of(url: str) -> ollama.Client:
    return ollama.Client(url)


def expected(server: tuple[str, Service], **options: Any) -> str:
    assert server[1].loaded
    generation = server[1].loaded.chat(QUESTION, temperature=0, **options)
    list(generation)
    return generation.text


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    """The lines of a stream, every one of which must be an object."""
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text[:-1].split("\n")]


def test_an_answer_is_that_of_the_python_api(server: tuple[str, Service], client: ollama.Client) -> None:
    found = client.chat("any", QUESTION, options=GREEDY)
    assert found.message.content == expected(server)
    assert (found.model, found.done, found.done_reason) == ("dsv2-nano:latest", True, "stop")
    assert found.prompt_eval_count
    assert found.eval_count
    times = found.total_duration, found.load_duration, found.prompt_eval_duration, found.eval_duration
    assert all(isinstance(time, int) for time in times)
    assert found.total_duration
    assert found.eval_duration
    assert found.total_duration > found.eval_duration > 1000


def test_a_stream_is_the_default_and_says_the_same(server: tuple[str, Service], client: ollama.Client) -> None:
    parts = list(client.chat("any", QUESTION, options=GREEDY, stream=True))
    assert "".join(part.message.content or "" for part in parts) == expected(server)
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == len(parts)  # the end token has no line, the end has one
    body = {"model": "any", "messages": QUESTION, "options": GREEDY}
    assert len(lines(httpx.post(f"{server[0]}/api/chat", json=body))) == len(parts)


def test_prompts_with_and_without_the_template(server: tuple[str, Service], client: ollama.Client) -> None:
    found = client.generate("any", "What is a violin?", options=GREEDY)
    assert found.response == expected(server)
    briefly = client.generate("any", "What is a violin?", system="Be brief.", options=GREEDY)
    assert briefly.prompt_eval_count
    assert found.prompt_eval_count
    assert briefly.prompt_eval_count > found.prompt_eval_count
    assert server[1].loaded
    continued = server[1].loaded.generate("A violin is", temperature=0, max_tokens=5)
    list(continued)
    options = {**GREEDY, "num_predict": 5}
    parts = list(client.generate("any", "A violin is", raw=True, options=options, stream=True))
    assert "".join(part.response or "" for part in parts) == continued.text
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("length", 5)


def test_the_last_turn_goes_on(server: tuple[str, Service], client: ollama.Client) -> None:
    found = client.chat("any", [*QUESTION, {"role": "assistant", "content": "A violin is a"}], options=GREEDY)
    assert "A violin is a" + str(found.message.content) == expected(server)


def test_a_request_without_a_prompt_loads_the_model(server: tuple[str, Service], client: ollama.Client) -> None:
    assert (client.generate("any").done_reason, client.generate("any").response) == ("load", "")
    assert client.chat("any").done_reason == "load"
    assert client.chat("any", keep_alive=0).done_reason == "load"
    streamed = lines(httpx.post(f"{server[0]}/api/generate", json={"model": "any"}))
    assert [(line["done"], line["done_reason"]) for line in streamed] == [(True, "load")]
    assert server[1].loaded


def test_formats(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"], "additionalProperties": False}
    content = client.chat("any", QUESTION, format=schema, options={"num_predict": 100, "seed": 3}).message.content
    assert json.loads(content or "") == {"n": 1}
    for seed in range(3):
        begun = client.generate("any", "What is a violin?", format="json", options={"num_predict": 2, "seed": seed})
        assert begun.response.strip()[0] == "{"
    plain = client.chat("any", QUESTION, format="", options=GREEDY).message.content
    assert plain
    assert plain[0] == "A"


def test_log_probabilities(client: ollama.Client) -> None:
    options = {**GREEDY, "num_predict": 4}
    whole = client.chat("any", QUESTION, options=options, logprobs=True, top_logprobs=2)
    parts = list(client.chat("any", QUESTION, options=options, logprobs=True, top_logprobs=2, stream=True))
    assert whole.logprobs
    assert [each for part in parts for each in part.logprobs or []] == whole.logprobs
    assert len(whole.logprobs) == 4
    assert all(len(each.top_logprobs or []) == 2 for each in whole.logprobs)


def test_tools(server: tuple[str, Service], client: ollama.Client) -> None:
    """nano calls no tools by itself; what it would be told of them counts."""
    with_tools = client.chat("any", QUESTION, tools=[WEATHER], options={"num_predict": 1}).prompt_eval_count
    without = client.chat("any", QUESTION, options={"num_predict": 1}).prompt_eval_count
    assert with_tools
    assert without
    assert with_tools > without + 50
    called = [*QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}]
    result = {"role": "tool", "tool_name": "weather", "content": "rain"}
    assert client.chat("any", [*called, result], tools=[WEATHER], options={"num_predict": 2}).eval_count == 2


def test_a_call_is_a_line_when_it_is_whole() -> None:
    with serving_written(WrittenAnswer(MIXED), WrittenAnswer(MIXED)) as (url, _):
        body = {"model": "any", "messages": QUESTION, "tools": [WEATHER]}
        streamed = lines(httpx.post(f"{url}/api/chat", json=body))
        whole = httpx.post(f"{url}/api/chat", json=body | {"stream": False}).json()
    weather = {"id": "call_0", "function": {"index": 0, "name": "weather", "arguments": {"city": "Rome"}}}
    time = {"id": "call_1", "function": {"index": 1, "name": "time", "arguments": {}}}
    assert [line["message"] for line in streamed] == [
        {"role": "assistant", "content": "Let"},
        {"role": "assistant", "content": "", "tool_calls": [weather]},
        {"role": "assistant", "content": "", "tool_calls": [time]},
        {"role": "assistant", "content": "Done"},
        {"role": "assistant", "content": ""},
    ]
    assert whole["message"] == {"role": "assistant", "content": "LetDone", "tool_calls": [weather, time]}
    assert streamed[-1]["done"]
    assert whole["done"]


def test_the_conversation_in_openais_shape() -> None:
    def made(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": arguments}}

    written_text = '{ "city":"Rome" }'
    messages: list[Any] = [
        {"role": "system", "content": "Be nice."}, {"role": "user", "content": "and?", "images": []},
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [
            made("weather", {"city": "Rome"}), made("time", {}), made("time", {"zone": 1})]},
        {"role": "tool", "tool_name": "time", "content": "noon"},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "night"},
    ]  # fmt: skip
    options = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 5, "repeat_penalty": 1.1, "stop": ["END"],
        "num_predict": -2, "num_ctx": 4096, "num_gpu": 3, "mirostat": 0, "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
    }  # fmt: skip
    answers = WrittenAnswer(call(0, "weather", written_text)), WrittenAnswer([])
    with serving_written(*answers) as (url, written), client_of(url) as client:
        client.chat("any", QUESTION)
        client.chat("any", messages, tools=[WEATHER], options=options, think=True, keep_alive="5m")
    found, given = written.asked[1]
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool", "tool", "tool"]
    calls = found[2]["tool_calls"]
    assert found[2]["content"] is None
    assert [each["function"]["arguments"] for each in calls] == [written_text, "{}", '{"zone": 1}']
    ids = [each["id"] for each in calls]
    assert len(set(ids)) == 3
    assert [message["tool_call_id"] for message in found[3:]] == [ids[1], ids[0], ids[2]]
    tools = given.pop("tools")
    assert tools[0]["function"]["name"] == "weather"
    assert given == {
        "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 5, "repetition_penalty": 1.1,
        "stop": ["END"], "max_tokens": -1, "presence_penalty": 0.5, "frequency_penalty": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat", {"messages": "hi"}), ("chat", {"messages": ["hi"]}), ("chat", {"messages": [{"role": "robot"}]}),
        ("chat", {"messages": [{"role": "user", "content": 3}]}), ("chat", {"messages": QUESTION, "tools": {}}),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}),
        ("chat", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}]}),
        ("chat", {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}),
        ("chat", {"messages": QUESTION, "options": 3}),
        ("chat", {"messages": QUESTION, "options": {"num_predict": "x"}}),
        ("chat", {"messages": QUESTION, "options": {"temperature": -1}}), ("chat", {"messages": QUESTION, "stream": 1}),
        ("chat", {"messages": QUESTION, "format": "xml"}), ("chat", {"messages": QUESTION, "top_logprobs": 3}),
        ("chat", {"messages": QUESTION, "template": "{{ .Prompt }}"}), ("generate", {"prompt": 3}),
        ("generate", {"prompt": "x", "images": ["aGk="]}), ("generate", {"prompt": "x", "context": [1, 2]}),
        ("generate", {"prompt": "x", "suffix": "y"}), ("generate", {"prompt": "x", "system": 3}),
        ("generate", {"prompt": "x", "raw": "yes"}), ("generate", {"prompt": "violin " * 3000}),
        ("pull", {"model": "llama3"}), ("pull", {}), ("create", {}), ("copy", {}), ("push", {}), ("show", []),
        ("blobs/sha256:00", {}),
    ],
)  # fmt: skip
def test_what_is_impossible_is_refused_in_ollamas_shape(server: tuple[str, Service], path: str, body: Any) -> None:
    response = httpx.post(f"{server[0]}/api/{path}", json=body)
    assert response.status_code == 400, response.text
    assert list(response.json()) == ["error"]
    assert response.json()["error"]


def test_clients_see_what_is_refused(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="has one model, dsv2-nano"):
        client.pull("llama3")
    with pytest.raises(ollama.ResponseError, match="one model"):
        client.delete("any")
    with pytest.raises(ollama.ResponseError, match="no embeddings"):
        client.embed("any", "text")
    with pytest.raises(ollama.ResponseError, match="context"):
        list(client.chat("any", [{"role": "user", "content": "violin " * 3000}], stream=True))


@pytest.mark.parametrize(
    ("error", "status"), [(Dsv2Error("it broke"), 500), (QueueFullError(3), 429), (CacheFullError(5), 503)]
)
def test_an_answer_that_fails(error: Dsv2Error, status: int) -> None:
    answers = [WrittenAnswer([Chunk("x", 1), error]) for _ in range(3)]
    body = {"model": "any", "messages": QUESTION}
    with serving_written(*answers) as (url, _):
        streamed = lines(httpx.post(f"{url}/api/chat", json=body))
        assert streamed[0]["message"]["content"] == "x"
        assert streamed[1:] == [{"error": str(error)}]
        assert httpx.post(f"{url}/api/chat", json=body | {"stream": False}).status_code == status
        with client_of(url) as client, pytest.raises(ollama.ResponseError, match=str(error)[:10]):
            list(client.chat("any", QUESTION, stream=True))


def test_a_prompt_that_is_read_for_long_has_lines_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.01)
    held = threading.Event()
    with serving_written(WrittenAnswer([Chunk("x", 1)], held)) as (url, _), client_of(url) as client:
        try:
            parts = client.chat("any", QUESTION, stream=True)
            assert [next(iter(parts)).message.content for _ in range(3)] == ["", "", ""]
            held.set()
            rest = list(parts)
        finally:
            held.set()
    assert "".join(part.message.content or "" for part in rest) == "x"
    assert rest[-1].done


def test_the_model_is_described(server: tuple[str, Service], client: ollama.Client) -> None:
    client.generate("any")
    (listed,) = client.list().models
    (running,) = client.ps().models
    assert listed.model == running.model == "dsv2-nano:latest"
    assert listed.size
    assert listed.details
    assert (listed.details.family, listed.details.quantization_level) == ("deepseek2", "NF4")
    assert running.context_length == 2048
    shown = client.show("any")
    assert shown.modelinfo
    assert shown.modelinfo["general.architecture"] == "deepseek2"
    assert shown.modelinfo["deepseek2.context_length"] == 2048
    assert server[1].loaded
    assert shown.modelinfo["deepseek2.block_count"] == server[1].loaded.config.num_hidden_layers
    assert {"completion", "tools"} <= set(shown.capabilities or [])
    assert client.pull("dsv2-nano").status == "success"
    assert [part.status for part in client.pull("dsv2-nano:latest", stream=True)] == ["success"]
    assert httpx.get(f"{server[0]}/api/version").json()["version"].count(".") == 2
