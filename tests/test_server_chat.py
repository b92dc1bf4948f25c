"""/v1/chat/completions, with OpenAI's client and with raw requests."""

import asyncio
import json
import threading

import httpx
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from dsv2_local.server import body as bodies
from dsv2_local.server.service import Service

QUESTION = [{"role": "user", "content": "What is a violin?"}]


def expected(server: tuple[str, Service], **options: object) -> str:
    llm = server[1].loaded
    assert llm
    generation = llm.chat(QUESTION, **options)
    list(generation)
    return generation.text


def test_an_answer_is_that_of_the_python_api(server: tuple[str, Service], client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="any", messages=QUESTION, temperature=0)  # type: ignore[arg-type]
    assert found.choices[0].message.content == expected(server, temperature=0)
    assert found.choices[0].finish_reason == "stop"
    assert found.model == "dsv2-nano"
    assert found.usage
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_stream_accumulates_to_the_same_answer(server: tuple[str, Service], client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="any", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}, n=2
    )  # type: ignore[call-overload]
    state, chunks = ChatCompletionStreamState(), list(stream)
    for chunk in chunks:
        state.handle_chunk(chunk)
    whole = state.get_final_completion()
    assert [choice.message.content for choice in whole.choices] == [expected(server, temperature=0)] * 2
    assert [choice.finish_reason for choice in whole.choices] == ["stop", "stop"]
    assert chunks[0].choices[0].index == 0
    assert chunks[-1].choices == []
    assert whole.usage
    assert whole.usage.prompt_tokens_details
    assert whole.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


def test_seeds_of_choices_follow_each_other(server: tuple[str, Service], client: openai.OpenAI) -> None:
    options = {"temperature": 1.5, "max_tokens": 8}
    found = client.chat.completions.create(model="any", messages=QUESTION, seed=7, n=3, **options)  # type: ignore[call-overload]
    texts = [choice.message.content for choice in found.choices]
    assert texts == [expected(server, seed=seed, **options) for seed in (7, 8, 9)]


def test_logprobs_have_an_entry_for_each_token(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="any", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5
    )  # type: ignore[call-overload]
    content = found.choices[0].logprobs.content
    assert len(content) == 5
    assert all(each.logprob == max(top.logprob for top in each.top_logprobs) for each in content)
    assert "".join(each.token for each in content).strip() == found.choices[0].message.content


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []}, {"messages": "hi"}, {"messages": [{"role": "user"}]}, {}, {"messages": QUESTION, "n": 0},
        {"messages": [{"role": "User", "content": "hi"}]},
        {"messages": QUESTION, "n": 1000}, {"messages": QUESTION, "temperature": -1},
        {"messages": QUESTION, "top_logprobs": 3}, {"messages": QUESTION, "stream": "yes"},
        {"messages": QUESTION, "stream_options": 3}, {"messages": QUESTION, "max_tokens": -2},
        {"messages": QUESTION, "logit_bias": {"99999999": 1}, "stream": True},
        {"messages": QUESTION, "logit_bias": {"x": 1}}, {"messages": QUESTION, "logit_bias": {"99999999": 1}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        [], "text", 3, None,
    ],
)  # fmt: skip
def test_impossible_bodies_are_refused_in_openais_shape(server: tuple[str, Service], body: object) -> None:
    response = httpx.post(f"{server[0]}/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_a_long_prompt_has_openais_code(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "violin " * 3000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=long, stream=True)  # type: ignore[call-overload]
    assert caught.value.code == "context_length_exceeded"


def test_unknown_fields_are_ignored(server: tuple[str, Service]) -> None:
    body = {"messages": QUESTION, "max_tokens": 2, "user": "me", "store": True, "metadata": {"a": 1}, "new": [1, 2]}
    assert httpx.post(f"{server[0]}/v1/chat/completions", json=body).status_code == 200


def test_an_unknown_path_has_a_json_error(server: tuple[str, Service]) -> None:
    response = httpx.get(f"{server[0]}/v1/nothing")
    assert response.status_code == 404
    assert "GET /v1/nothing" in response.json()["error"]["message"]
    assert httpx.get(f"{server[0]}/api/nothing").json() == {"error": "not found: GET /api/nothing"}
    wrong = httpx.get(f"{server[0]}/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"


def test_models(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    assert [model.id for model in client.models.list()] == ["dsv2-nano"]
    assert client.models.retrieve("dsv2-nano").id == "dsv2-nano"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="text")
    listed = httpx.get(f"{server[0]}/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert listed["first_id"] == "dsv2-nano"


def test_a_client_that_leaves_ends_its_answer(server: tuple[str, Service]) -> None:
    url, service = server
    assert service.loaded
    scheduler = service.loaded.engine.scheduler
    body = {"messages": QUESTION, "logit_bias": {"1": -1e9}, "stream": True, "min_p": 0, "temperature": 5}

    async def leave_after_three_events() -> None:
        async with httpx.AsyncClient() as client, client.stream("POST", f"{url}/v1/chat/completions", json=body) as got:
            lines = got.aiter_lines()
            events = 0
            while events < 3:
                events += (await anext(lines)).startswith("data: ")

    cancelled = service.totals.cancelled
    asyncio.run(leave_after_three_events())
    for _ in range(1000):
        if service.totals.cancelled > cancelled and not scheduler.running:
            break
        asyncio.run(asyncio.sleep(0.01))
    assert service.totals.cancelled == cancelled + 1
    assert not scheduler.running
    assert not service.jobs


def test_figures_are_counted(server: tuple[str, Service], client: openai.OpenAI) -> None:
    before = server[1].totals.completion_tokens
    client.chat.completions.create(model="any", messages=QUESTION, temperature=0, max_tokens=4)  # type: ignore[arg-type]
    assert server[1].totals.completion_tokens == before + 4
    text = httpx.get(f"{server[0]}/metrics").text
    assert f"dsv2_completion_tokens_total {float(before + 4)}" in text
    assert "dsv2_model_loaded 1.0" in text


def test_health(server: tuple[str, Service]) -> None:
    assert httpx.get(f"{server[0]}/health").json() == {"status": "ready"}


def test_the_description_of_the_api_is_json(server: tuple[str, Service]) -> None:
    described = httpx.get(f"{server[0]}/openapi.json").json()
    assert json.dumps(described["paths"]["/v1/chat/completions"]["post"]["requestBody"])


def test_an_answer_has_the_structure_that_is_asked_for(client: openai.OpenAI) -> None:
    schema = {
        "type": "object", "properties": {"strings": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["strings"], "additionalProperties": False,
    }  # fmt: skip

    def ask(wanted: dict[str, object], **options: object) -> str:
        found = client.chat.completions.create(model="any", messages=QUESTION, response_format=wanted, **options)  # type: ignore[call-overload]
        assert found.choices[0].finish_reason == "stop"
        return str(found.choices[0].message.content)

    def described(schema: object, strict: bool) -> dict[str, object]:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": strict}}

    found = json.loads(ask(described(schema, True), temperature=1.0))
    assert list(found) == ["strings"]
    assert 1 <= found["strings"] <= 9
    assert ask(described({"enum": ["one"], "uniqueItems": True}, False)) == '"one"'
    with pytest.raises(openai.BadRequestError, match="uses uniqueItems"):
        ask(described({"enum": ["one"], "uniqueItems": True}, True))
    with pytest.raises(openai.BadRequestError, match="type of response_format must be text"):
        ask({"type": "xml"})
    started = client.chat.completions.create(
        model="any", messages=QUESTION, response_format={"type": "json_object"}, max_tokens=20
    )  # type: ignore[call-overload]
    assert started.choices[0].message.content.startswith("{")


def test_long_bodies_are_read_beside_the_event_loop(
    server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    read = bodies.read_object
    monkeypatch.setattr(
        bodies, "read_object", lambda *given: (threads.append(threading.current_thread().name), read(*given))[1]
    )
    for size in (10, 100_000):
        sent = {"messages": QUESTION, "max_tokens": 1, "metadata": "x" * size}
        assert httpx.post(f"{server[0]}/v1/chat/completions", json=sent).status_code == 200
    assert "AnyIO" not in threads[0]
    assert "AnyIO" in threads[1]


def test_lists_of_token_ids_are_bounded(server: tuple[str, Service]) -> None:
    for path, name in (("/detokenize", "tokens"), ("/v1/completions", "prompt")):
        refused = httpx.post(f"{server[0]}{path}", json={name: [1] * 1_000_001}, timeout=30)
        assert refused.status_code == 400
        assert "1,000,000 are the most" in refused.json()["error"]["message"]
