"""/v1/messages and /v1/messages/count_tokens, with Anthropic's client, its accumulator, and raw requests."""

import asyncio
import json
import threading
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.lib.streaming._messages import accumulate_event

from dsv2_local.chunk import Chunk
from dsv2_local.errors import CacheFullError, DeadlineError, Dsv2Error, QueueFullError
from dsv2_local.llm import LLM
from dsv2_local.server import anthropic as api
from dsv2_local.server import streaming
from dsv2_local.server.anthropic_messages import BILLING
from dsv2_local.server.service import Job, Service
from dsv2_local.server.written_arguments import WrittenArguments
from dsv2_local.text.tools.calls import ToolCall
from tests.serving import WrittenAnswer, WrittenLLM, call, serving_written

QUESTION: list[Any] = [{"role": "user", "content": "What is a violin?"}]
GREEDY = {"temperature": 0}
"""The SDK knows this field of the API no longer."""
WEATHER: dict[str, Any] = {
    "name": "weather", "description": "Tells the weather.",
    "input_schema": {
        "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
    },
}  # fmt: skip
FUNCTIONS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "Tells the weather.", "parameters": WEATHER["input_schema"],
        },
    }
]  # fmt: skip
MIXED = [
    Chunk("Let", 1), Chunk(" me", 2), *call(0, "weather", '{"city"', ': "Rome"}'), Chunk("\n", 3),
    *call(1, "time", "{", "}"), Chunk("\n", 4), Chunk("Done", 5),
]  # fmt: skip


@pytest.fixture
def client(server: tuple[str, Service]) -> Iterator[anthropic.Anthropic]:
    with client_of(server[0]) as client:
        yield client


def client_of(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def frames(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream, each of which must have a name."""
    found = []
    for frame in response.text.strip().split("\n\n"):
        name, data = frame.split("\n")
        assert name.startswith("event: "), frame
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def post(url: str, **body: Any) -> httpx.Response:
    body = {"model": "claude", "max_tokens": 16, "messages": QUESTION} | body
    return httpx.post(f"{url}/v1/messages", json={name: value for name, value in body.items() if value is not ...})


def test_events_come_in_their_order_and_blocks_one_after_the_other() -> None:
    with serving_written(WrittenAnswer(MIXED)) as (url, _):
        found = frames(post(url, stream=True))
    assert [name for name, _ in found] == [data["type"] for _, data in found]
    start, text, delta, stop = "message_start", "content_block_start", "content_block_delta", "content_block_stop"
    assert [(name, data.get("index")) for name, data in found] == [
        (start, None), (text, 0), (delta, 0), (delta, 0), (stop, 0), (text, 1), (delta, 1), (delta, 1), (stop, 1),
        (text, 2), (delta, 2), (delta, 2), (stop, 2), (text, 3), (delta, 3), (stop, 3), ("message_delta", None),
        ("message_stop", None),
    ]  # fmt: skip
    message = found[0][1]["message"]
    assert message["content"] == []
    assert message["usage"]["output_tokens"] == 0
    assert found[1][1]["content_block"] == {"type": "text", "text": ""}
    assert found[5][1]["content_block"] == {"type": "tool_use", "id": "call_0", "name": "weather", "input": {}}
    assert found[6][1]["delta"] == {"type": "input_json_delta", "partial_json": '{"city"'}
    assert found[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert found[-2][1]["usage"] == {
        "input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": len(MIXED),
    }  # fmt: skip


@pytest.mark.parametrize("script", [MIXED, [], [Chunk("\n", 1), *call(0, "time", "{}")], [Chunk(" ", 1)], MIXED[:4]])
def test_the_sdk_accumulates_the_events_to_the_whole_answer(script: list[Chunk]) -> None:
    async def accumulated() -> Any:
        message, buffers = None, dict[int, bytes]()
        events = api.events(Service(lambda: written, "x"), written, Job(WrittenAnswer(script)))  # type: ignore
        async for event in events:
            message = accumulate_event(event=event, current_snapshot=message, json_bufs=buffers)  # type: ignore
        return message

    written = WrittenLLM()
    streamed = asyncio.run(accumulated())
    with serving_written(WrittenAnswer(script)) as (url, _):
        whole = post(url).json()
    content = [block.to_dict() for block in streamed.content]
    assert content == whole["content"]
    assert streamed.usage.to_dict() == whole["usage"]
    assert streamed.stop_reason == whole["stop_reason"]
    assert streamed.stop_reason == ("tool_use" if any(chunk.calls for chunk in script) else "end_turn")
    assert not any(block.get("text", "x").isspace() for block in content)


@pytest.mark.parametrize(
    ("stats", "reason", "sequence"),
    [
        ({}, "end_turn", None), ({"stop_string": "END"}, "stop_sequence", "END"),
        ({"finish_reason": "length"}, "max_tokens", None),
        ({"finish_reason": "length", "context_used": 100}, "model_context_window_exceeded", None),
    ],
)  # fmt: skip
def test_the_reason_of_the_end(stats: dict[str, Any], reason: str, sequence: str | None) -> None:
    answers = [WrittenAnswer([Chunk("x", 1)], **stats) for _ in range(2)]
    with serving_written(*answers) as (url, _):
        whole, streamed = post(url).json(), frames(post(url, stream=True))[-2][1]["delta"]
    assert streamed == {"stop_reason": reason, "stop_sequence": sequence}
    assert {"stop_reason": whole["stop_reason"], "stop_sequence": whole["stop_sequence"]} == streamed


def test_a_prompt_that_is_read_for_long_has_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.01)
    held = threading.Event()
    with serving_written(WrittenAnswer([Chunk("x", 1)], held)) as (url, _):
        body = {"max_tokens": 1, "messages": QUESTION, "stream": True}
        try:
            with httpx.stream("POST", f"{url}/v1/messages", json=body) as response:
                lines = response.iter_lines()
                assert next(lines) == "event: message_start"
                while next(lines) != "event: ping":
                    pass
                assert json.loads(next(lines).removeprefix("data: ")) == {"type": "ping"}
                held.set()
                assert "event: message_stop" in list(lines)
        finally:
            held.set()


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (Dsv2Error("it broke"), "api_error", 500), (QueueFullError(3), "rate_limit_error", 429),
        (CacheFullError(5), "overloaded_error", 529), (DeadlineError(3), "timeout_error", 504),
    ],
)  # fmt: skip
def test_errors_have_anthropics_shape(error: Dsv2Error, kind: str, status: int) -> None:
    answers = [WrittenAnswer([Chunk("x", 1), error]) for _ in range(3)]
    with serving_written(*answers) as (url, _), client_of(url) as client:
        whole, streamed = post(url), frames(post(url, stream=True))
        assert (whole.status_code, whole.json()["type"], whole.json()["error"]["type"]) == (status, "error", kind)
        assert streamed[-1] == ("error", whole.json())
        with (
            pytest.raises(anthropic.APIStatusError),
            client.messages.stream(model="any", max_tokens=5, messages=QUESTION) as stream,
        ):
            list(stream)


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": ...}, {"max_tokens": -1}, {"max_tokens": "5"}, {"messages": []}, {"messages": ...},
        {"messages": ["hi"]}, {"messages": [{"role": "robot", "content": "hi"}]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
        {"messages": [{"role": "user", "content": ["hi"]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": "c"}]}]},
        {"system": 3}, {"system": [{"type": "image"}]}, {"stream": 1}, {"stop_sequences": "END"},
        {"stop_sequences": [1]}, {"temperature": "hot"}, {"top_p": 2}, {"tools": {}}, {"tools": [{"name": "x"}]},
        {"tools": [{"input_schema": {}}]}, {"tool_choice": {"type": "any"}}, {"tool_choice": {"type": "one"}},
        {"tool_choice": "any"}, {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "time"}},
        {"output_config": {"format": {"type": "xml"}}}, {"output_config": {"format": {"type": "json_schema"}}},
        {"output_config": 3},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object", "uniqueItems": 3}}}},
    ],
)  # fmt: skip
def test_impossible_bodies_are_refused(server: tuple[str, Service], body: dict[str, Any]) -> None:
    for stream in (False, True):
        response = post(server[0], **({"stream": stream} | body))
        assert response.status_code == 400, response.text
        found = response.json()
        assert (found["type"], found["error"]["type"]) == ("error", "invalid_request_error")


def test_the_conversation_in_openais_shape() -> None:
    image_free: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                                     {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "I "}, {"type": "text", "text": "look."},
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Rome"}},
            {"type": "tool_use", "id": "2", "name": "time", "input": {}}]},
        {"role": "user", "content": [
            {"type": "text", "text": "and now?"},
            {"type": "tool_result", "tool_use_id": "1", "content": "sunny"},
            {"type": "tool_result", "tool_use_id": "2", "is_error": True, "content": [
                {"type": "text", "text": "no"}, {"type": "text", "text": "clock"}]},
            {"type": "tool_result", "tool_use_id": "3"}]},
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "It is"},
    ]  # fmt: skip
    system = [{"type": "text", "text": f"{BILLING}: cc_version=2; cch=1a2b3;"}, {"type": "text", "text": "Be nice."}]
    tools = [WEATHER | {"cache_control": {"type": "ephemeral"}}, {"type": "web_search_20250305", "name": "web_search"}]
    with serving_written(WrittenAnswer([Chunk("x", 1)])) as (url, written):
        response = post(
            url, messages=image_free, system=system, tools=tools, stop_sequences=["END"], temperature=0.5, top_k=3,
            tool_choice={"type": "any", "disable_parallel_tool_use": True}, thinking={"type": "adaptive"},
            metadata={"user_id": "me"}, context_management={"edits": []}, service_tier="auto",
            output_config={"effort": "high", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        )  # fmt: skip
        assert response.status_code == 200, response.text
    messages, options = written.asked[0]
    calls = [("1", "weather", '{"city": "Rome"}'), ("2", "time", "{}")]
    assert messages == [
        {"role": "system", "content": "Be nice."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "I look.", "tool_calls": [
            {"id": id, "type": "function", "function": {"name": name, "arguments": text}} for id, name, text in calls]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "2", "content": "Error: no\nclock"},
        {"role": "tool", "tool_call_id": "3", "content": ""},
        {"role": "user", "content": "and now?"},
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "It is"},
    ]  # fmt: skip
    function = {"name": "weather", "description": "Tells the weather.", "parameters": WEATHER["input_schema"]}
    assert options == {
        "tools": [{"type": "function", "function": function}], "tool_choice": "required", "parallel_tool_calls": False,
        "continue_final": True, "schema": {"type": "object"}, "strict": True, "max_tokens": 16, "stop": ["END"],
        "temperature": 0.5, "top_k": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "auto"}, "auto"), ({"type": "none"}, "none"), ({"type": "tool", "name": "weather"}, "weather"),
        (None, None),
    ],
)  # fmt: skip
def test_the_choice_of_a_tool(given: Any, expected: str | None) -> None:
    with serving_written(WrittenAnswer([])) as (url, written):
        assert post(url, tools=[WEATHER], tool_choice=given).status_code == 200
    assert written.asked[0][1].get("tool_choice") == expected


def test_an_answer_is_that_of_the_python_api(server: tuple[str, Service], client: anthropic.Anthropic) -> None:
    found = client.messages.create(model="any", messages=QUESTION, max_tokens=100, extra_body=GREEDY)
    assert server[1].loaded
    expected = server[1].loaded.chat(QUESTION, temperature=0)
    list(expected)
    assert [block.to_dict() for block in found.content] == [{"type": "text", "text": expected.text}]
    assert (found.stop_reason, found.model, found.role) == ("end_turn", "dsv2-nano", "assistant")
    with client.messages.stream(model="any", messages=QUESTION, max_tokens=100, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == expected.text
        whole = stream.get_final_message()
    assert whole.usage.output_tokens == found.usage.output_tokens == expected.stats.completion_tokens


def test_counted_tokens_are_those_of_the_usage(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "any", "messages": QUESTION, "system": "Be brief.", "tools": [WEATHER]}
    counted = client.messages.count_tokens(**asked).input_tokens
    plain = client.messages.count_tokens(model="any", messages=QUESTION).input_tokens
    assert counted > plain + 50
    for choice in ({"type": "auto"}, {"type": "none"}):
        counted = client.messages.count_tokens(**asked, tool_choice=choice).input_tokens  # type: ignore[arg-type]
        usage = client.messages.create(**asked, tool_choice=choice, max_tokens=1).usage
        assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert client.messages.count_tokens(**asked, tool_choice={"type": "none"}).input_tokens < plain + 20


def test_the_last_turn_goes_on(server: tuple[str, Service], client: anthropic.Anthropic) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "A violin is a"}]
    found = client.messages.create(model="any", messages=begun, max_tokens=100, extra_body=GREEDY)
    whole = client.messages.create(model="any", messages=QUESTION, max_tokens=100, extra_body=GREEDY)
    assert found.content[0].type == whole.content[0].type == "text"
    assert "A violin is a" + found.content[0].text == whole.content[0].text


def test_a_stop_sequence_is_told(client: anthropic.Anthropic) -> None:
    found = client.messages.create(
        model="any", messages=QUESTION, max_tokens=100, extra_body=GREEDY, stop_sequences=["zzz", "bowed"]
    )
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "bowed")


def test_a_long_prompt_is_refused_in_words_that_agents_know(client: anthropic.Anthropic) -> None:
    long: list[Any] = [{"role": "user", "content": "violin " * 3000}]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 2047 maximum"):
        client.messages.create(model="any", messages=long, max_tokens=5)


def test_structured_output(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    wanted: Any = {"format": {"type": "json_schema", "schema": schema}}
    found = client.messages.create(model="any", messages=QUESTION, max_tokens=60, output_config=wanted)
    assert found.content[0].type == "text"
    assert json.loads(found.content[0].text)["n"] in (1, 2)


def test_a_tool_that_must_be_called(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {
        "model": "any", "messages": QUESTION, "max_tokens": 200, "tools": [WEATHER],
        "tool_choice": {"type": "tool", "name": "weather"}, "extra_body": GREEDY,
    }  # fmt: skip
    found = client.messages.create(**asked)
    assert found.stop_reason == "tool_use"
    (block,) = found.content
    assert block.type == "tool_use"
    assert block.name == "weather"
    assert set(block.input) == {"city", "days"}
    with client.messages.stream(**asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert streamed.input == block.input


def test_a_second_round_reuses_the_first(server: tuple[str, Service], client: anthropic.Anthropic) -> None:
    """All of prompt and answer, in whatever tokens and with whatever white space the model has written the call."""
    client.messages.create(model="any", max_tokens=1, messages=QUESTION)
    llm, gained = server[1].loaded, 0
    assert llm
    for seed in range(16):
        begun = [{"role": "system", "content": "Use the tools."}, {"role": "user", "content": f"What is {seed}?"}]
        first = llm.chat(begun, tools=FUNCTIONS, tool_choice="required", parallel_tool_calls=False, seed=seed)
        tokens = [chunk.token_id for chunk in first if chunk.token_id is not None]
        server[1].arguments.note(first.tool_calls)
        (made,) = first.tool_calls
        known = llm.chats.prompt(begun, tools=FUNCTIONS).ids + tokens[:-1]  # the last one was never computed

        block = {"type": "tool_use", "id": made.id, "name": made.name, "input": json.loads(made.arguments)}
        result = {"type": "tool_result", "tool_use_id": made.id, "content": "rain"}
        messages: Any = [begun[1], {"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
        asked: dict[str, Any] = {"model": "any", "tools": [WEATHER], "messages": messages, "system": system(str(seed))}
        usage = client.messages.create(max_tokens=1, **asked).usage
        assert usage.cache_read_input_tokens == len(known)
        counted = client.messages.count_tokens(**asked).input_tokens
        assert counted == usage.cache_read_input_tokens + usage.input_tokens
        gained += len(known) - common(known, replayed(llm, begun, json.dumps(block["input"])))
    assert gained > 0


def replayed(llm: LLM, begun: list[Any], arguments: str) -> list[int]:
    """The prompt after a call with these arguments."""
    called = {"id": "x", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    answer = {"role": "assistant", "content": None, "tool_calls": [called]}
    result = {"role": "tool", "tool_call_id": "x", "content": "rain"}
    return llm.chats.prompt([*begun, answer, result], tools=FUNCTIONS).ids


def common(first: list[int], second: list[int]) -> int:
    """How many tokens two prompts have in common from their beginning on."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def system(nonce: str) -> Any:
    """The system prompt as Claude Code begins it."""
    return [{"type": "text", "text": f"{BILLING}: cch={nonce}"}, {"type": "text", "text": "Use the tools."}]


def test_arguments_are_written_as_the_model_did() -> None:
    text = '{ "b":1.0,\t"a" : 12345678901234567890, "c": "é" }'
    asked: list[Any] = [{"role": "user", "content": "go"}]
    # JavaScript sends numbers as it has read them, and may have names in another order.
    replayed = {"a": 12345678901234567000, "b": 1, "c": "é"}
    answer = {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": replayed}]}
    other = {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "g", "input": replayed}]}
    for stream in (False, True):
        answers = WrittenAnswer(call(0, "f", text[:9], text[9:])), WrittenAnswer([]), WrittenAnswer([])
        with serving_written(*answers) as (url, written):
            post(url, messages=asked, stream=stream)
            post(url, messages=[*asked, answer])
            post(url, messages=[*asked, other])
        found = [messages[1]["tool_calls"][0]["function"]["arguments"] for messages, _ in written.asked[1:]]
        assert found == [text, '{"a": 12345678901234567000, "b": 1, "c": "é"}']


def test_the_memory_for_arguments_is_bounded() -> None:
    few = WrittenArguments(entries=3, nbytes=1000)
    for number in range(5):
        few.note([ToolCall("x", "f", f'{{"a":{number}}}')])
    assert [few.text("f", {"a": number}) for number in range(5)] == [
        '{"a": 0}',
        '{"a": 1}',
        '{"a":2}',
        '{"a":3}',
        '{"a":4}',
    ]
    few.note([ToolCall("x", "f", f'{{"a":"{"b" * 990}"}}')])
    assert few.text("f", {"a": 4}) == '{"a": 4}'
    assert few.text("f", {"a": "b" * 990}) == f'{{"a":"{"b" * 990}"}}'
    few.note([ToolCall("x", "f", f'{{"a":"{"c" * 1000}"}}'), ToolCall("x", "f", "[1]"), ToolCall("x", "f", '{"a')])
    assert few.text("f", {"a": "b" * 990}) == f'{{"a":"{"b" * 990}"}}'
