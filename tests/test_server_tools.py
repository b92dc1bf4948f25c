"""Tools and forms of answers in /v1/chat/completions: written answers for the shapes, dsv2-nano for the whole way."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from dsv2_local.chunk import CallDelta, Chunk
from dsv2_local.errors import Dsv2Error, InputError
from dsv2_local.server import openai_format, openai_tools
from tests.every_value import with_every_value
from tests.serving import WrittenAnswer, WrittenLLM, call, serving_written

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather of a city.",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
TIME = {"type": "function", "function": {"name": "time"}}
QUESTION = [{"role": "user", "content": "What is the weather?"}]


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"messages": QUESTION, "tools": [WEATHER, TIME], **body})


def events(text: str) -> list[dict[str, Any]]:
    """The data of an event stream, which must end with [DONE]."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


def two_calls(text: str = "") -> WrittenAnswer:
    pieces = [Chunk(text)] if text else []
    return WrittenAnswer([*pieces, *call(0, "weather", '{"ci', 'ty": "Paris"}'), *call(1, "time", "{}")])


def accumulated(chunks: list[dict[str, Any]]) -> Any:
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    return state.get_final_completion()


@pytest.fixture(scope="module")
def written() -> Iterator[tuple[str, WrittenLLM]]:
    """One server for all tests of what is asked and refused; each of them needs one answer at most."""
    with serving_written(*[WrittenAnswer([Chunk("a")]) for _ in range(100)]) as found:
        yield found


def test_calls_of_a_whole_answer() -> None:
    with serving_written(two_calls("I look.")) as (url, _):
        choice = post(url).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant", "content": "I look.", "refusal": None,
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
            {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}},
        ],
    }  # fmt: skip


def test_an_answer_of_calls_alone_has_no_content() -> None:
    with serving_written(two_calls()) as (url, _):
        assert post(url).json()["choices"][0]["message"]["content"] is None


def test_a_call_that_is_cut_off_says_so() -> None:
    with serving_written(WrittenAnswer(call(0, "weather", '{"ci'), finish_reason="length")) as (url, _):
        choice = post(url).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'


def test_a_stream_of_calls_says_id_and_name_once_and_the_index_always() -> None:
    with serving_written(two_calls("I look.")) as (url, _):
        found = events(post(url, stream=True).text)
    deltas = [each["choices"][0]["delta"] for each in found]

    def begun(index: int, name: str) -> dict[str, Any]:
        function = {"name": name, "arguments": ""}
        return {"tool_calls": [{"index": index, "id": f"call_{index}", "type": "function", "function": function}]}

    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1] == {"content": "I look."}
    assert deltas[2:] == [
        begun(0, "weather"),
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ty": "Paris"}'}}]},
        begun(1, "time"),
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]  # fmt: skip
    assert [each["choices"][0]["finish_reason"] for each in found] == [None] * 7 + ["tool_calls"]
    assert len({(each["id"], each["created"], each["model"]) for each in found}) == 1


def test_openais_accumulator_reads_streams_of_several_answers_with_calls() -> None:
    with serving_written(two_calls("A"), two_calls("B")) as (url, _):
        found = events(post(url, stream=True, n=2, stream_options={"include_usage": True}).text)
    whole = accumulated(found)
    assert [each.message.content for each in whole.choices] == ["A", "B"]
    for choice in whole.choices:
        assert choice.finish_reason == "tool_calls"
        assert [(each.id, each.function.name) for each in choice.message.tool_calls] == [
            ("call_0", "weather"), ("call_1", "time"),
        ]  # fmt: skip
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Paris"}'
    assert whole.usage.prompt_tokens == 10
    assert found[-1]["choices"] == []


def test_pieces_of_one_chunk_are_told_apart() -> None:
    """Clients take the first list of calls as it is: two pieces of one call in it would become two calls."""
    chunk = Chunk(
        "So: ", 1, calls=(CallDelta(0, "call_0", "time"), CallDelta(0, arguments="{"), CallDelta(0, arguments="}"))
    )
    with serving_written(WrittenAnswer([chunk])) as (url, _):
        whole = accumulated(events(post(url, stream=True).text))
    message = whole.choices[0].message
    assert message.content == "So: "
    assert [each.function.arguments for each in message.tool_calls] == ["{}"]


def test_an_answer_that_fails_ends_its_stream_with_the_error() -> None:
    with serving_written(WrittenAnswer([Chunk("a"), Dsv2Error("out of memory")])) as (url, _):
        lines = [each for each in post(url, stream=True).text.splitlines() if each]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == "out of memory"


def test_old_functions_are_answered_with_a_function_call() -> None:
    functions = {"tools": None, "functions": [WEATHER["function"]], "function_call": {"name": "weather"}}
    script = call(0, "weather", '{"city": ', '"Paris"}')
    with serving_written(WrittenAnswer(script), WrittenAnswer(script)) as (url, llm):
        choice = post(url, **functions).json()["choices"][0]
        streamed = events(post(url, stream=True, **functions).text)
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert "tool_calls" not in choice["message"]
    assert [each["choices"][0]["delta"] for each in streamed][1:] == [
        {"function_call": {"name": "weather", "arguments": ""}}, {"function_call": {"arguments": '{"city": '}},
        {"function_call": {"arguments": '"Paris"}'}}, {},
    ]  # fmt: skip
    assert streamed[-1]["choices"][0]["finish_reason"] == "function_call"
    assert llm.asked[0][1]["tool_choice"] == "weather"
    assert llm.asked[0][1]["parallel_tool_calls"] is False


NAMED = {"type": "function", "function": {"name": "time"}}


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({}, {"tools": [WEATHER, TIME]}),
        ({"tools": []}, {}),
        ({"tools": None, "tool_choice": "auto"}, {}),
        ({"tool_choice": "required"}, {"tools": [WEATHER, TIME], "tool_choice": "required"}),
        ({"tool_choice": "none"}, {"tools": [WEATHER, TIME], "tool_choice": "none"}),
        ({"tool_choice": NAMED}, {"tools": [WEATHER, TIME], "tool_choice": "time"}),
        ({"parallel_tool_calls": False}, {"tools": [WEATHER, TIME], "parallel_tool_calls": False}),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}},
            {"tools": [TIME], "tool_choice": "required"},
        ),
        ({"tools": [], "response_format": {"type": "text"}}, {"schema": None}),
        ({"tools": [], "response_format": {"type": "json_object"}}, {"schema": {"type": "object"}}),
        (
            {"tools": [], "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}},
            {"schema": {"type": "array"}, "strict": False},
        ),
        (
            {
                "tools": [],
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {}}},
            },
            {"schema": {}, "strict": True},
        ),
        ({"tools": [], "structured_outputs": {"json": '{"type": "null"}', "regex": None}},
            {"schema": {"type": "null"}}),
        ({"tools": [], "guided_regex": "a+"}, {"regex": "a+"}),
        ({"tools": [], "guided_choice": ["a", 'b"']}, {"grammar": 'start: "a" | "b\\""'}),
        ({"tools": [], "grammar": "start: /a/"}, {"grammar": "start: /a/"}),
        ({"tools": [], "regex": "[ab]"}, {"regex": "[ab]"}),
        ({"tools": [], "chat_template_kwargs": {"enable_thinking": False}}, {}),
        ({"tools": [], "chat_template_kwargs": {"documents": [{"text": "a"}]}}, {"documents": [{"text": "a"}]}),
        ({"tools": [], "continue_final_message": True, "add_generation_prompt": False}, {"continue_final": True}),
    ],
)  # fmt: skip
def test_what_the_model_is_asked(
    written: tuple[str, WrittenLLM], body: dict[str, Any], options: dict[str, Any]
) -> None:
    url, llm = written
    assert post(url, **body).status_code == 200
    assert llm.asked[-1] == (QUESTION, options)


def test_messages_with_calls() -> None:
    function = {"name": "weather", "arguments": '{"city":  "Rome"}'}
    given = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "", "function_call": function},
        {"role": "function", "name": "weather", "content": "sun"},
    ]
    with serving_written(WrittenAnswer([Chunk("a")])) as (url, llm):
        assert post(url, tools=None, messages=given).status_code == 200
    assert llm.asked[0][0] == [
        {"role": "system", "content": "Be\nbrief."},
        given[1],
        given[2],
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "assistant", "content": ""},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "name": "weather", "tool_call_id": "call_1", "content": "sun"},
    ]


BAD_CALL = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": 3}}]}


@pytest.mark.parametrize(
    "body",
    [
        {"tools": {}}, {"tools": [3]}, {"tools": [{"type": "custom", "custom": {"name": "a"}}]},
        {"tools": [{"type": "function"}]}, {"tools": [{"type": "function", "function": {"name": ""}}]},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, {"tools": [TIME, TIME]},
        {"tool_choice": "any"}, {"tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tool_choice": {"type": "function"}}, {"tool_choice": 3}, {"tools": [], "tool_choice": "required"},
        {"tools": [], "tool_choice": NAMED}, {"parallel_tool_calls": "no"},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{"function": {"name": "other"}}]}}},
        {"tools": None, "functions": [{"name": 1}]},
        {"tools": None, "functions": [TIME["function"]], "function_call": "x"},
        {"response_format": "json"}, {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
        {"response_format": {"type": "json_object"}, "regex": "a"}, {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"structural_tag": "a"}}, {"structured_outputs": []}, {"guided_choice": []},
        {"guided_regex": 3}, {"grammar": 3}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": 3}, {"chat_template_kwargs": {"documents": 3}}, {"continue_final_message": 1},
        {"messages": [BAD_CALL]}, {"messages": [{"role": "assistant", "tool_calls": 3}]},
        {"messages": [{"role": "assistant", "tool_calls": [3]}]},
    ],
)  # fmt: skip
def test_impossible_tools_and_forms_are_refused(written: tuple[str, WrittenLLM], body: dict[str, Any]) -> None:
    response = post(written[0], **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


MADE = {"name": "time", "arguments": "{}"}
FULL = {
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": MADE}]},
        {"role": "tool", "tool_call_id": "a", "content": "b"},
        {"role": "assistant", "function_call": MADE},
        {"role": "function", "name": "time", "content": "c"},
    ],
    "tools": [WEATHER, TIME], "tool_choice": NAMED, "parallel_tool_calls": True,
    "response_format": {"type": "json_schema", "json_schema": {"strict": True, "schema": {"type": "null"}}},
    "chat_template_kwargs": {"documents": [{"title": "a", "text": "b"}], "thinking": True},
    "continue_final_message": False, "logprobs": True, "top_logprobs": 3, "logit_bias": {"1": 2}, "stop": ["a"],
    "max_tokens": 3, "max_completion_tokens": 4, "n": 1, "stream": False, "stream_options": {"include_usage": True},
}  # fmt: skip
OTHERS = (
    {"functions": [TIME["function"]], "function_call": {"name": "time"}},
    {"structured_outputs": {"choice": ["a", "b"]}}, {"guided_json": {}}, {"regex": "a"},
    {"tools": [TIME], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}},
)  # fmt: skip


def test_any_value_in_any_field_is_taken_or_refused() -> None:
    taken = refused = 0
    for each in (FULL, *({"messages": QUESTION} | other for other in OTHERS)):
        for body in with_every_value(each):
            try:
                openai_format.messages(body.get("messages"))
                openai_tools.chat_tools(body)
                openai_tools.answer_form(body)
                openai_tools.template_options(body)
                openai_format.sampling(body)
                openai_format.chat_logprobs(body)
                taken += 1
            except InputError:
                refused += 1
    assert taken > 100
    assert refused > 100


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_made_and_its_result_read(client: openai.OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"model": "any", "tools": [WEATHER], "seed": 1, "max_tokens": 100}
    asked = options | {"messages": QUESTION, "tool_choice": "required", "parallel_tool_calls": False}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            for _ in events:
                pass
            choice = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    (made,) = choice.message.tool_calls
    assert made.function.name == "weather"
    assert set(json.loads(made.function.arguments)) == {"city"}
    turn = choice.message.model_dump(exclude_none=True)
    turn = {name: turn[name] for name in turn if name != "parsed"}
    messages = [*QUESTION, turn, {"role": "tool", "tool_call_id": made.id, "content": "rain"}]
    again = client.chat.completions.create(messages=messages, tool_choice="none", **options)
    assert again.choices[0].finish_reason in ("stop", "length")
    assert not again.choices[0].message.tool_calls


class Point(pydantic.BaseModel):
    x: Literal[1, 2, 3]
    y: Literal[1, 2, 3]


@pytest.mark.slow
def test_parse_returns_an_object_of_the_schema(client: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        points: list[Point] = pydantic.Field(max_length=2)
        sure: bool

    found = client.chat.completions.parse(
        model="any", messages=QUESTION, response_format=Answer, temperature=1, seed=3, max_tokens=400
    )  # type: ignore[arg-type]
    choice = found.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Answer)


@pytest.mark.slow
def test_parse_returns_the_arguments_of_a_call(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(
        model="any", messages=QUESTION, tools=[openai.pydantic_function_tool(Point, name="point")],
        tool_choice={"type": "function", "function": {"name": "point"}}, max_tokens=200, seed=0,
    )  # type: ignore[arg-type] # fmt: skip
    (made,) = found.choices[0].message.tool_calls
    assert isinstance(made.function.parsed_arguments, Point)


@pytest.mark.slow
def test_a_strict_schema_that_is_not_supported_is_refused(client: openai.OpenAI) -> None:
    schema = {"type": "object", "not": {"type": "null"}}
    wanted = {"name": "a", "schema": schema, "strict": True}
    with pytest.raises(openai.BadRequestError, match="not"):
        client.chat.completions.create(
            model="any", messages=QUESTION, response_format={"type": "json_schema", "json_schema": wanted}
        )  # type: ignore[call-overload]
    lenient = {"type": "json_schema", "json_schema": wanted | {"strict": False}}
    found = client.chat.completions.create(model="any", messages=QUESTION, response_format=lenient, max_tokens=300)  # type: ignore[call-overload]
    assert found.choices[0].message.content.startswith("{")


@pytest.mark.slow
def test_choices_and_patterns(client: openai.OpenAI) -> None:
    def answer(**extra: Any) -> str:
        found = client.chat.completions.create(
            model="any", messages=QUESTION, temperature=1.5, extra_body=extra, max_tokens=20
        )  # type: ignore[call-overload]
        return found.choices[0].message.content  # type: ignore[no-any-return]

    assert answer(structured_outputs={"choice": ["sun", 'the "rain"']}) in ("sun", 'the "rain"')
    assert answer(guided_regex="[0-9]{3}").isdecimal()
    assert answer(grammar='start: "yes" | "no"') in ("yes", "no")
    with pytest.raises(openai.BadRequestError):
        answer(regex="(")
