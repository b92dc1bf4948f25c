"""/v1/responses: written answers for shapes and orders of events, dsv2-nano with OpenAI's client for the whole way."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai._models import construct_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent

from dsv2_local.chunk import Chunk
from dsv2_local.errors import Dsv2Error, InputError
from dsv2_local.server import responses_format
from dsv2_local.server.service import Service
from dsv2_local.server.written_arguments import WrittenArguments
from tests.every_value import with_every_value
from tests.serving import WrittenAnswer, WrittenLLM, call, serving_written

WEATHER = {
    "type": "function", "name": "weather", "description": "The weather of a city.",
    "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": False,
    },
}  # fmt: skip
PATCH = {
    "type": "custom", "name": "patch", "description": "Applies a patch.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}  # fmt: skip
HOSTED = {"type": "web_search", "external_web_access": False}
NAMESPACE = {"type": "namespace", "name": "agents", "tools": [WEATHER]}


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/responses", json={"input": "Hello", **body})


def events(text: str) -> list[dict[str, Any]]:
    """The data of an event stream whose events are named like their types and numbered from 0."""
    found = []
    for frame in text.split("\n\n"):
        name, _, data = frame.partition("\n")
        if name.startswith("event: "):
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return [each["type"].removeprefix("response.") for each in found]


def accumulated(found: list[dict[str, Any]]) -> Any:
    """What OpenAI's client makes of the events."""
    state: Any = ResponseStreamState(text_format=openai.NOT_GIVEN, input_tools=openai.NOT_GIVEN)
    for each in found:
        state.handle_event(construct_type(type_=ResponseStreamEvent, value=each))
    return state._completed_response


@pytest.fixture(scope="module")
def written() -> Iterator[tuple[str, WrittenLLM]]:
    """One server for all tests of what is asked and refused; each of them needs one answer at most."""
    with serving_written(*[WrittenAnswer([Chunk("a")]) for _ in range(100)]) as found:
        yield found


def test_events_of_a_text_come_in_order() -> None:
    with serving_written(WrittenAnswer([Chunk("Hel"), Chunk(""), Chunk("lo")])) as (url, _):
        found = events(post(url, stream=True).text)
    assert kinds(found) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    last = found[-1]["response"]
    item = {
        "id": found[2]["item"]["id"], "type": "message", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    assert last["output"] == [item] == [found[-2]["item"]]
    assert last["status"] == "completed"
    assert last["usage"] == {
        "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0}, "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 13,
    }  # fmt: skip
    assert found[0]["response"]["status"] == "in_progress"
    assert {each["response"]["id"] for each in found if "response" in each} == {last["id"]}
    assert {each["item_id"] for each in found if "item_id" in each} == {item["id"]}
    assert accumulated(found).output_text == "Hello"


def test_events_of_calls_come_in_order() -> None:
    script = [
        Chunk("I look."),
        Chunk("\n"),
        *call(0, "weather", '{"ci', 'ty": "Rome"}'),
        Chunk("\n"),
        *call(1, "time", "{}"),
    ]
    with serving_written(WrittenAnswer(script), WrittenAnswer(script)) as (url, _):
        found = events(post(url, stream=True).text)
        whole = post(url).json()
    text = ["output_text.done", "content_part.done", "output_item.done"]
    assert kinds(found)[2:] == [
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", *text,
        "output_item.added", *["function_call_arguments.delta"] * 2, "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    added = [each for each in found if each["type"] == "response.output_item.added"]
    done = [each for each in found if each["type"] == "response.output_item.done"]
    assert [each["output_index"] for each in added] == [each["output_index"] for each in done] == [0, 1, 2]
    assert [each["item"]["id"] for each in added] == [each["item"]["id"] for each in done]
    assert added[1]["item"] | {"id": ""} == {
        "id": "", "type": "function_call", "call_id": "call_0", "name": "weather", "arguments": "",
        "status": "in_progress",
    }  # fmt: skip
    output = found[-1]["response"]["output"]
    assert output == [each["item"] for each in done]
    assert [(each.get("name"), each.get("arguments")) for each in output[1:]] == [
        ("weather", '{"city": "Rome"}'), ("time", "{}"),
    ]  # fmt: skip

    def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [each | {"id": ""} for each in items]

    assert without_ids(whole["output"]) == without_ids(output)
    final = accumulated(found)
    assert [each.type for each in final.output] == ["message", "function_call", "function_call"]
    assert [each.arguments for each in final.output[1:]] == ['{"city": "Rome"}', "{}"]


def test_white_space_around_calls_is_no_message() -> None:
    with serving_written(WrittenAnswer([Chunk("\n"), *call(0, "time", "{}"), Chunk("\n")])) as (url, _):
        found = events(post(url, stream=True).text)
    assert [each["type"] for each in found[-1]["response"]["output"]] == ["function_call"]


def test_words_after_a_call_are_a_message_of_their_own() -> None:
    script = [Chunk("A"), *call(0, "time", "{}"), Chunk("\n"), Chunk("B")]
    with serving_written(WrittenAnswer(script)) as (url, _):
        final = accumulated(events(post(url, stream=True).text))
    assert [each.type for each in final.output] == ["message", "function_call", "message"]
    assert final.output[2].content[0].text == "\nB"


def test_an_empty_answer_has_an_empty_message() -> None:
    with serving_written(WrittenAnswer([])) as (url, _):
        assert post(url).json()["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize("script", [[Chunk("Hel")], call(0, "weather", '{"ci')])
def test_an_answer_that_is_cut_off_is_incomplete(script: list[Chunk]) -> None:
    with serving_written(*[WrittenAnswer(script, finish_reason="length") for _ in range(2)]) as (url, _):
        found = events(post(url, stream=True).text)
        whole = post(url).json()
    assert kinds(found)[-2:] == ["output_item.done", "incomplete"]
    for each in (found[-1]["response"], whole):
        assert each["status"] == "incomplete"
        assert each["incomplete_details"] == {"reason": "max_output_tokens"}
        assert each["output"][-1]["status"] == "incomplete"


def test_an_answer_that_fails_says_so_in_its_last_event() -> None:
    with serving_written(*[WrittenAnswer([Chunk("Hel"), Dsv2Error("out of memory")]) for _ in range(2)]) as (url, _):
        found = events(post(url, stream=True).text)
        whole = post(url)
    assert kinds(found)[-1] == "failed"
    assert found[-1]["response"]["status"] == "failed"
    assert found[-1]["response"]["error"] == {"code": "server_error", "message": "out of memory"}
    assert whole.status_code == 500
    assert whole.json()["error"]["message"] == "out of memory"


def test_a_custom_tool_gets_text() -> None:
    script = call(0, "patch", '{"in', 'put": "a\\nb"}')
    with serving_written(WrittenAnswer(script)) as (url, llm):
        found = events(post(url, stream=True, tools=[PATCH]).text)
    assert kinds(found)[2:] == [
        "output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    item = found[-1]["response"]["output"][0]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "patch", "a\nb")
    assert found[3]["delta"] == "a\nb"
    function = llm.asked[0][1]["tools"][0]["function"]
    assert function["parameters"]["required"] == ["input"]
    assert "start: /.+/" in function["description"]
    accumulated(found)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_custom_tool_comes_back_as_the_model_wrote_it(stream: bool) -> None:
    arguments = '{ "input":"a\\u00e9"}'
    with serving_written(WrittenAnswer(call(0, "patch", arguments)), WrittenAnswer([Chunk("a")])) as (url, llm):
        first = post(url, stream=stream, tools=[PATCH])
        item = (events(first.text)[-1]["response"] if stream else first.json())["output"][0]
        assert item["input"] == "a\u00e9"
        assert post(url, input=[{"role": "user", "content": "Hello"}, item]).status_code == 200
    assert llm.asked[1][0][1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_items_become_messages() -> None:
    arguments = '{"city":  "Rome"}'
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rome?"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": arguments},
        {"type": "function_call", "call_id": "b", "name": "weather", "arguments": arguments},
        {"type": "function_call_output", "call_id": "a", "output": "rain"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "sun"}]},
        {"type": "web_search_call", "id": "c", "status": "completed"},
        {"type": "custom_tool_call", "call_id": "d", "name": "patch", "input": "é"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": "done"},
        {"role": "user", "content": "And?"},
    ]
    with serving_written(WrittenAnswer([Chunk("a")])) as (url, llm):
        assert post(url, input=items, instructions="You are a cat.", store=True, include=["x"]).status_code == 200

    def calls(*made: tuple[str, str, str]) -> list[dict[str, Any]]:
        return [
            {"id": id, "type": "function", "function": {"name": name, "arguments": text}} for id, name, text in made
        ]

    assert llm.asked[0][0] == [
        {"role": "system", "content": "You are a cat."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rome?"},
        {
            "role": "assistant", "content": "I look.",
            "tool_calls": calls(("a", "weather", arguments), ("b", "weather", arguments)),
        },
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "tool", "tool_call_id": "b", "content": "sun"},
        {"role": "assistant", "content": None, "tool_calls": calls(("d", "patch", '{"input": "é"}'))},
        {"role": "tool", "tool_call_id": "d", "content": "done"},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip


CHOICE = {"type": "function", "name": "weather"}
FUNCTION = {"type": "function", "function": {name: WEATHER[name] for name in ("name", "description", "parameters")}}


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({"tools": [WEATHER, HOSTED, NAMESPACE]}, {"tools": [FUNCTION]}),
        ({"tools": [HOSTED]}, {}),
        ({"tools": [WEATHER], "tool_choice": "required"}, {"tools": [FUNCTION], "tool_choice": "required"}),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": False},
            {"tools": [FUNCTION], "tool_choice": "weather", "parallel_tool_calls": False},
        ),
        (
            {
                "tools": [WEATHER, PATCH],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [CHOICE]},
            },
            {"tools": [FUNCTION], "tool_choice": "auto"},
        ),
        ({"max_output_tokens": 7, "temperature": 0, "top_p": 0.5}, {"max_tokens": 7, "temperature": 0, "top_p": 0.5}),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}),
        ({"text": {"format": {"type": "json_object"}}}, {"schema": {"type": "object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "null"}, "strict": True}}},
            {"schema": {"type": "null"}, "strict": True},
        ),
        ({"reasoning": {"effort": "low"}, "prompt_cache_key": "x", "client_metadata": {}, "background": False}, {}),
    ],
)  # fmt: skip
def test_what_the_model_is_asked(
    written: tuple[str, WrittenLLM], body: dict[str, Any], options: dict[str, Any]
) -> None:
    url, llm = written
    assert post(url, **body).status_code == 200
    assert llm.asked[-1] == ([{"role": "user", "content": "Hello"}], options)


@pytest.mark.parametrize(
    "body",
    [
        {"input": None}, {"input": []}, {"input": 3}, {"input": [3]}, {"input": [{"role": "user"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": [{"type": "item_reference", "id": "a"}]}, {"input": [{"type": "new"}]}, {"input": [{"type": {}}]},
        {"input": [{"type": "function_call", "call_id": "a"}]}, {"input": [{"type": "custom_tool_call", "name": "a"}]},
        {"input": [{"type": "function_call", "call_id": 3, "name": "a", "arguments": "{}"}]}, {"instructions": 3},
        {"previous_response_id": "resp_1"}, {"conversation": {"id": "a"}}, {"prompt": {"id": "a"}},
        {"background": True},
        {"tools": 3}, {"tools": [3]}, {"tools": [{"type": "function"}]}, {"tools": [WEATHER, WEATHER]},
        {"tool_choice": "required"}, {"tools": [WEATHER], "tool_choice": {"type": "web_search"}},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, {"parallel_tool_calls": 1},
        {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "tools": 3}},
        {"text": 3}, {"text": {"format": {"type": "xml"}}}, {"text": {"format": {"type": "json_schema", "schema": 1}}},
        {"max_output_tokens": "x"}, {"stream": "yes"},
    ],
)  # fmt: skip
def test_impossible_bodies_are_refused(written: tuple[str, WrittenLLM], body: dict[str, Any]) -> None:
    response = post(written[0], **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


FULL = {
    "input": [
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "a"}]},
        {"type": "custom_tool_call", "call_id": "b", "name": "patch", "input": "a"},
        {"type": "custom_tool_call_output", "call_id": "b", "output": "a"},
        {"type": "reasoning", "summary": []},
    ],
    "instructions": "a", "tools": [WEATHER, PATCH, HOSTED], "tool_choice": CHOICE, "parallel_tool_calls": True,
    "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "null"}, "strict": True}},
    "max_output_tokens": 3, "temperature": 1, "background": False, "stream": False, "metadata": {"a": "b"},
}  # fmt: skip
ALLOWED = {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [CHOICE]}}


def test_any_value_in_any_field_is_taken_or_refused() -> None:
    taken = refused = 0
    for each in (FULL, FULL | ALLOWED):
        for body in with_every_value(each):
            try:
                responses_format.refuse_state(body)
                responses_format.messages(body, WrittenArguments())
                responses_format.tools(body)
                responses_format.options(body)
                taken += 1
            except InputError:
                refused += 1
    assert taken > 100
    assert refused > 100


def test_responses_are_not_kept() -> None:
    with serving_written() as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for action in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match="keeps no responses"):
                action("resp_1")
        with pytest.raises(openai.BadRequestError, match="keeps no responses"):
            client.responses.create(model="any", input="a", previous_response_id="resp_1")


@pytest.mark.slow
def test_an_answer_is_that_of_the_python_api(server: tuple[str, Service], client: openai.OpenAI) -> None:
    assert server[1].name
    found = client.responses.create(model="any", input="What is a violin?", temperature=0)
    llm = server[1].loaded
    assert llm
    generation = llm.chat([{"role": "user", "content": "What is a violin?"}], temperature=0)
    list(generation)
    assert found.output_text == generation.text
    assert found.status == "completed"
    with client.responses.stream(model="any", input="What is a violin?", temperature=0) as stream:
        texts = [each.delta for each in stream if each.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == final.output_text == generation.text
    short = client.responses.create(model="any", input="What is a violin?", max_output_tokens=3)
    assert short.status == "incomplete"
    assert short.usage
    assert short.usage.output_tokens == 3


@pytest.mark.slow
def test_a_call_and_its_result(client: openai.OpenAI) -> None:
    options: Any = {"model": "any", "tools": [WEATHER | {"strict": True}], "max_output_tokens": 100}
    question: Any = [{"role": "user", "content": "What is the weather?"}]
    with client.responses.stream(
        input=question, tool_choice="required", parallel_tool_calls=False, **options
    ) as stream:
        for _ in stream:
            pass
        found = stream.get_final_response()
    (made,) = found.output
    assert made.type == "function_call"
    assert made.parsed_arguments["city"] in ("Paris", "Rome")
    turn = made.model_dump(exclude={"parsed_arguments"}, exclude_none=True)
    result = {"type": "function_call_output", "call_id": made.call_id, "output": "rain"}
    again = client.responses.create(input=[*question, turn, result], tool_choice="none", **options)
    assert [each.type for each in again.output] == ["message"]
    assert again.usage
    assert again.usage.input_tokens > 0


@pytest.mark.slow
def test_parse_returns_an_object_of_the_schema(client: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        colour: Literal["red", "blue"]
        sure: bool

    found = client.responses.parse(model="any", input="Which colour?", text_format=Answer, temperature=1)
    assert isinstance(found.output_parsed, Answer)
