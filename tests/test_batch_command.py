"""`dsv2 run --batch`: lines of any bytes, both formats, interruptions at any byte, and files that do not fit."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import dsv2_local
from dsv2_local import locks
from dsv2_local.commands import batch as command
from dsv2_local.commands import streams
from dsv2_local.commands.batch import Batch
from dsv2_local.commands.batch_lines import LONGEST, Line, Parser, Request, read_lines
from dsv2_local.commands.batch_options import BatchOptions, Order
from dsv2_local.commands.batch_output import FileOutput
from dsv2_local.commands.batch_progress import BatchProgress
from dsv2_local.errors import BatchError, DeviceError, InputError
from dsv2_local.llm import LLM
from dsv2_local.runtime.stats import Stats
from tests.models import heed_signals
from tests.test_cli import DSV2, dsv2, environment

ASK = {"role": "user", "content": "What is a dog?"}
CHAT = {"url": "/v1/chat/completions", "method": "POST"}
TWO = {"type": "json_schema", "json_schema": {"schema": {"enum": [2]}}}
COMPLETION = {"url": "/v1/completions", "method": "POST"}


def openai(custom_id: Any, endpoint: dict[str, str] = CHAT, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, **endpoint, "body": {"model": "any", **body}}


LINES: list[Any] = [
    {"prompt": "A dog is", "max_tokens": 4},
    {"messages": [ASK], "max_tokens": 5, "id": 7},
    b"not json",
    openai("a", messages=[ASK], max_completion_tokens=3),
    {"prompt": [1, 2, 3], "max_tokens": 2, "temperature": 1.5, "seed": 11},
    b"",
    openai("b", COMPLETION, prompt="A river is", max_tokens=3, temperature=2, seed=5),
    openai("b", messages=[ASK]),
    {"prompt": "A cat is", "max_tokens": 3, "custom_id": "c"},
    {"prompt": "x" * 20_000},
]
ERRORS = [3, 6, 8, 10]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with dsv2_local.load(device="cpu", threads=1) as loaded:
        yield loaded


def written(path: Path, lines: list[Any]) -> Path:
    path.write_bytes(
        b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)
    )
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "in.jsonl", LINES)


def options(source: Path, output: Path | None, order: Order = Order.INPUT, **generation: Any) -> BatchOptions:
    return BatchOptions(source, output, {"temperature": 0, **generation}, order=order)


def run(llm: LLM, asked: BatchOptions) -> int:
    with Batch(asked) as batch:
        if not batch.is_complete():
            batch.run(llm)
        return batch.end()


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def text_of(result: dict[str, Any]) -> str:
    if "text" in result:
        return str(result["text"])
    choice = result["response"]["body"]["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.fixture(scope="module")
def unbroken(llm, tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("unbroken")
    run(llm, options(written(folder / "in.jsonl", LINES), folder / "out.jsonl"))
    return (folder / "out.jsonl").read_bytes()


# What is asked and answered


def test_answers_are_those_of_single_requests(llm, unbroken, capsys):
    found = [json.loads(line) for line in unbroken.splitlines()]
    assert len(found) == len(LINES)
    greedy = {"temperature": 0}
    alone = {
        0: llm.generate("A dog is", max_tokens=4, **greedy),
        1: llm.chat([ASK], max_tokens=5, **greedy),
        3: llm.chat([ASK], max_tokens=3, **greedy),
        4: llm.generate([1, 2, 3], max_tokens=2, temperature=1.5, seed=11),
        8: llm.generate("A cat is", max_tokens=3, **greedy),
    }
    for index, generation in alone.items():
        assert text_of(found[index]) == "".join(chunk.text for chunk in generation) != ""
        stats = generation.stats
        usage = {
            "prompt_tokens": stats.prompt_tokens, "completion_tokens": stats.completion_tokens,
            "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        }  # fmt: skip
        body = found[index] if "usage" in found[index] else found[index]["response"]["body"]
        assert body["usage"] == usage
    assert found[1]["id"] == 7
    assert found[4]["seed"] == 11
    assert found[8]["custom_id"] == "c"
    assert [each["line"] for each in found if "line" in each] == [1, 2, 3, 5, 6, 9, 10]
    assert [number for number, each in enumerate(found, 1) if each.get("error")] == ERRORS
    assert [found[number - 1]["error"]["line"] for number in ERRORS] == ERRORS
    assert found[9]["error"]["code"] == "context_length_exceeded"


def test_the_shapes_are_openais(unbroken):
    chat, completion, wrong = (json.loads(unbroken.splitlines()[index]) for index in (3, 6, 7))
    assert set(chat) == {"id", "custom_id", "response", "error"}
    assert (chat["custom_id"], chat["error"], chat["response"]["status_code"]) == ("a", None, 200)
    assert chat["id"].startswith("batch_req_4_")
    assert chat["response"]["request_id"].startswith("req_4_")
    body = chat["response"]["body"]
    assert (body["object"], body["model"], body["created"]) == ("chat.completion", "dsv2-nano", 0)
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["finish_reason"] == "length"
    assert completion["response"]["body"]["object"] == "text_completion"
    assert wrong["response"]["status_code"] == 400
    assert wrong["response"]["body"]["error"]["type"] == "invalid_request_error"
    assert "custom_id 'b'" in wrong["error"]["message"]
    unreadable = json.loads(unbroken.splitlines()[2])  # for programs that read either format
    assert (unreadable["line"], unreadable["custom_id"], unreadable["response"]) == (3, None, None)


def test_logprobs_have_the_shape_of_their_format(llm, tmp_path):
    asked = [
        {"prompt": "A dog is", "max_tokens": 2, "logprobs": 2},
        {"prompt": "A dog is", "max_tokens": 2, "logprobs": True, "top_logprobs": 2},
        openai("a", messages=[ASK], max_tokens=2, logprobs=True, top_logprobs=1),
        openai("b", COMPLETION, prompt=[[5, 6]], max_tokens=2, logprobs=0),
        openai("c", messages=[ASK], max_tokens=2, logprobs=True),
    ]
    assert run(llm, options(written(tmp_path / "in", asked), tmp_path / "out")) == 0
    first, second, chat, completion, bare = results(tmp_path / "out")
    assert first["logprobs"] == second["logprobs"]
    assert [len(each["top_logprobs"]) for each in first["logprobs"]] == [2, 2]
    content = chat["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert [bytes(each["bytes"]).decode() for each in content] == [each["token"] for each in content]
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]  # greedy
    found = completion["response"]["body"]["choices"][0]["logprobs"]
    assert found["text_offset"] == [0, len(found["tokens"][0])]
    assert [list(each.values()) for each in found["top_logprobs"]] == [[each] for each in found["token_logprobs"]]
    assert bare["response"]["body"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_completion_may_repeat_its_prompt(llm, tmp_path):
    asked = [
        openai("a", COMPLETION, prompt="A dog is", echo=True),
        openai("b", COMPLETION, prompt="A dog is", echo=True, logprobs=1, max_tokens=2),
        openai("c", COMPLETION, prompt=[5, 6], echo=True, max_tokens=1),
    ]
    assert run(llm, options(written(tmp_path / "in", asked), tmp_path / "out")) == 0
    alone, scored, ids = (each["response"]["body"] for each in results(tmp_path / "out"))
    assert alone["choices"][0] == {"index": 0, "text": "A dog is", "logprobs": None, "finish_reason": "length"}
    assert alone["usage"]["completion_tokens"] == 0
    found, prompt = scored["choices"][0]["logprobs"], llm.tokenizer.encode("A dog is")
    wanted = llm.logits(prompt).log_softmax(-1)
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:-2] == [float(wanted[at - 1, prompt[at]]) for at in range(1, len(prompt))]
    assert "".join(found["tokens"]) == scored["choices"][0]["text"]
    assert ids["choices"][0]["text"].startswith(llm.tokenizer.decode([5, 6]))


def test_a_seed_is_counted_on_by_line(llm, tmp_path):
    asked = [{"prompt": "A dog is", "max_tokens": 6}, {"prompt": "A dog is", "max_tokens": 6}]
    asked += [{"prompt": "A dog is", "max_tokens": 6, "seed": 40}]
    for name in ("one", "two"):
        run(llm, options(written(tmp_path / "in", asked), tmp_path / name, temperature=3.0, seed=40))
    found = results(tmp_path / "one")
    assert [each["seed"] for each in found] == [40, 41, 40]
    assert found[0]["text"] == found[2]["text"] != found[1]["text"]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert Parser({"seed": 2**64 - 1}, None).parse(Line(2, 1, b'{"prompt": "a"}')).options["seed"] == 0


def parsed(line: Any, system: str | None = None, **defaults: Any) -> Request:
    return Parser(defaults, system).parse(Line(1, 1, line if isinstance(line, bytes) else json.dumps(line).encode()))


def test_options_of_a_line_win():
    defaults = {"max_tokens": 5, "temperature": 0.5, "logprobs": 3, "stop": ["a"]}
    own = {"max_tokens": 7, "logprobs": False, "stop": "b", "logit_bias": {"12": -1}, "temperature": None}
    wanted = {"max_tokens": 7, "temperature": 0.5, "logprobs": None, "stop": "b", "logit_bias": {12: -1}}
    assert parsed({"prompt": "a", **own}, **defaults).options == wanted
    assert parsed(openai("a", messages=[ASK], **own), **defaults).options == wanted
    assert parsed({"prompt": "a", "max_tokens": 1, "max_completion_tokens": 2}).options == {"max_tokens": 2}
    assert parsed(openai("a", COMPLETION, prompt="a")).options == {"max_tokens": 16}
    assert parsed(openai("a", COMPLETION, prompt="a"), max_tokens=9).options == {"max_tokens": 9}


def test_messages_become_those_of_templates():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = [
        {"role": "developer", "content": "first"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "system", "content": "second"},
        ASK,
    ]
    request = parsed(openai("a", messages=asked, store=True, user="me"), system="not used")
    assert [(each["role"], each["content"]) for each in request.messages or []] == [
        ("system", "first"), ("user", "one\ntwo"), ("assistant", ""), ("system", "second"), ("user", ASK["content"]),
    ]  # fmt: skip
    assert parsed({"messages": [ASK]}, system="be kind").messages == [{"role": "system", "content": "be kind"}, ASK]
    assert parsed(openai("a", messages=[ASK]), system="be kind").messages == [
        {"role": "system", "content": "be kind"},
        ASK,
    ]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b"\xff", "not UTF-8 text: byte 0 is 0xff"),
        (b'{"prompt": "a\0"}', "byte 13 is NUL"),
        (b"{", "not JSON: Expecting property name"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "not JSON: a number has 5,000 digits"),
        (b"  \t", "the line is empty"),
        (b"[1]", "the line must be an object"),
        ({}, "needs a prompt or messages"),
        ({"prompt": "a", "messages": [ASK]}, "and not both"),
        ({"prompt": "a", "temprature": 0}, "there is no option 'temprature'"),
        ({"prompt": 3}, "prompt must be text or a list of token ids, not 3"),
        ({"prompt": []}, "prompt must be text or a list of token ids"),
        ({"prompt": [1, True]}, "a token id of prompt must be a whole number, not True"),
        (b'{"prompt": "\\ud800"}', "prompt is not Unicode text: character 0 is half a pair"),
        (b'{"prompt": "a", "custom_id": "\\ud800"}', "custom_id is not Unicode"),
        ({"prompt": "a", "id": [1]}, "id must be text"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"prompt": "a", "logprobs": 2, "top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "'x' is no token id"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, "url must be /v1/chat/completions or"),
        ({**openai("a", messages=[ASK]), "method": "GET"}, "method must be POST"),
        ({**openai("a"), "body": None}, "body must be an object"),
        ({**CHAT, "body": {"messages": [ASK]}}, "custom_id is missing"),
        (openai("a"), "messages must be a list that is not empty"),
        (openai("a", messages=[{"role": "user"}]), "the content of a message must be text"),
        (openai("a", messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "of type image_url"),
        (openai("a", messages=[ASK], n=2), "n must be 1"),
        (openai("a", messages=[ASK], n="2"), "n must be a whole number"),
        (openai("a", messages=[ASK], tools=[{}]), "a function must be an object"),
        (openai("a", messages=[ASK], response_format={"type": "xml"}), "type of response_format must be text"),
        (openai("a", messages=[ASK], response_format="json"), "response_format must be an object"),
        (openai("a", messages=[ASK], response_format={"type": "json_schema"}), "json_schema of response_format"),
        (
            openai("a", COMPLETION, prompt="a", response_format=TWO | {"json_schema": {"schema": 3}}),
            "schema of response_format's",
        ),
        (openai("a", messages=[ASK], top_logprobs=2), "top_logprobs needs logprobs: true"),
        (openai("a", messages=[ASK], logprobs=True, top_logprobs=21), "between 0 and 20"),
        (openai("a", COMPLETION, prompt=["a", "b"]), "there are 2 prompts"),
        (openai("a", COMPLETION, prompt="a", suffix="b"), "suffix is not supported"),
        (openai("a", COMPLETION, prompt="a", echo=1), "echo must be true or false"),
        (openai("a", messages=[ASK], echo=True), "echo is not supported"),
        (openai("a", messages=[ASK], max_tokens=0), "max_tokens must be at least 1"),
    ],
)
def test_a_bad_line_is_named(line, wrong):
    assert wrong in str(parsed(line).error)


def test_a_line_has_its_own_structure_or_that_of_all_lines():
    every = {"schema": {"type": "object"}, "strict": True}
    wanted = [
        ({"prompt": "a"}, every),
        ({"prompt": "a", "regex": "b"}, {"regex": "b", "strict": True}),
        ({"prompt": "a", "schema": {"enum": [1]}, "strict": False}, {"schema": {"enum": [1]}, "strict": False}),
        ({"prompt": "a", "response_format": {"type": "text"}}, {"schema": None, "strict": True}),
        (openai("a", messages=[ASK], response_format=TWO), {"schema": {"enum": [2]}, "strict": False}),
        (openai("a", messages=[ASK], response_format={"type": "json_object"}), every),
        (openai("a", messages=[ASK]), every),
    ]
    for line, options in wanted:
        found = parsed(line, **every)
        assert found.error is None
        assert {
            name: found.options[name] for name in ("schema", "grammar", "regex", "strict") if name in found.options
        } == options


def test_answers_have_the_structure_of_their_lines(llm, tmp_path):
    asked = [
        {"prompt": "A violin", "regex": "[0-9]{4}"},
        openai("a", messages=[ASK], response_format=TWO),
        openai("b", messages=[ASK], response_format=TWO | {"json_schema": {"schema": {"not": {}}, "strict": True}}),
    ]
    run(llm, options(written(tmp_path / "in", asked), tmp_path / "out"))
    first, second, third = results(tmp_path / "out")
    assert len(first["text"]) == 4
    assert first["text"].isdecimal()
    assert second["response"]["body"]["choices"][0]["message"]["content"] == "2"
    assert third["response"]["status_code"] == 400
    assert "uses not" in third["error"]["message"]


def test_what_is_switched_off_is_no_fault():
    body = {"n": 1, "tools": [], "response_format": {"type": "text"}, "echo": False, "stop": None, "logprobs": None}
    assert parsed(openai("a", messages=[ASK], **body)).error is None


def test_options_that_the_model_refuses_are_errors_of_their_line(llm, tmp_path):
    asked = [
        {"prompt": "a", "temperature": "hot"},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": [10**9]},
        {"prompt": "a", "stop": [""]},
        {"messages": [{"role": "user"}]},
        {"prompt": "A dog", "max_tokens": 1},
    ]
    assert run(llm, options(written(tmp_path / "in", asked), tmp_path / "out")) == 1
    errors = [each.get("error", {}).get("message", "") for each in results(tmp_path / "out")]
    wanted = [
        "temperature must be",
        "max_tokens must be",
        "outside the vocabulary",
        "stop string",
        "a message needs",
        "",
    ]
    for message, part in zip(errors, wanted, strict=True):
        assert part in message
    assert errors[-1] == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["prompt", "messages", "body", "url", "method", "custom_id", "id", "seed", "stop", "logprobs", "top_logprobs", "n",
     "max_tokens", "logit_bias", "tools", "role", "content", "type", "text"]
)  # fmt: skip
VALUES = JSON | st.sampled_from(["/v1/chat/completions", "/v1/completions", "POST", "user", [ASK], "text"])
OBJECTS = st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, max_size=4), max_size=6)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.binary(max_size=30) | OBJECTS.map(lambda each: json.dumps(each).encode()), max_size=5))
@example([b'{"prompt": "a", "id": 1e999}', b'{"prompt": "a", "custom_id": NaN}'])
def test_any_line_is_a_request_or_an_error(llm, lines):
    data = b"\n".join(lines)
    parser, count = Parser({"seed": 1}, "system"), 0
    for line in read_lines(io.BytesIO(data), "it", b""):
        count += 1
        request = parser.parse(line)
        assert request.number == count
        if request.error is None:
            assert (request.prompt is None) != (request.messages is None)
            with contextlib.suppress(command.FAULTS_OF_A_LINE):
                ask = llm.generate if request.messages is None else llm.chat
                ask(request.prompt if request.messages is None else request.messages, **request.options)
        else:
            assert isinstance(request.error, InputError)
            result = command.refusal(request, request.error)
            assert json.loads(json.dumps(result).encode())["error"]["line"] == count
    assert count == data.count(b"\n") + (not data.endswith(b"\n") and data != b"")


def test_lines_are_read_in_pieces():
    long = b'{"prompt": "' + b"x" * LONGEST + b'"}'
    lines = list(read_lines(io.BytesIO(b"\xef\xbb\xbf" + long + b"\na\r\n" + long + b"\nb"), "it", b""))
    assert [line.data for line in lines] == [None, b"a", None, b"b"]
    assert lines[0].key == lines[2].key
    assert lines[0].key != next(read_lines(io.BytesIO(long + b"y"), "it", b"")).key
    assert lines[1].key != next(read_lines(io.BytesIO(b"a"), "it", b"other options")).key
    assert "more than 16 MiB" in str(Parser({}, None).parse(lines[0]).error)
    with pytest.raises(InputError, match="it is UTF-16 or UTF-32"):
        next(read_lines(io.BytesIO("a".encode("utf-16")), "it", b""))


# Going on


def test_cut_at_any_byte_it_continues_to_the_same_bytes(source, tmp_path, unbroken, llm, monkeypatch):
    """The model's answers are remembered, so that thousands of runs are quick."""
    monkeypatch.setattr(command, "notice", lambda text: None)
    asked, fake = options(source, tmp_path / "out"), Remembered(llm)
    places = {*range(0, len(unbroken), 13), len(unbroken) - 1}
    places |= {place + each for place in range(len(unbroken)) if unbroken[place] == 10 for each in (-1, 0, 1, 2)}
    for cut in sorted(places):
        (tmp_path / "out").write_bytes(unbroken[:cut])
        assert run(fake, asked) == 1
        assert (tmp_path / "out").read_bytes() == unbroken, cut


class Remembered:
    """A model that computes every answer once."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.name, self.tokenizer = llm, llm.name, llm.tokenizer
        self.known: dict[str, Any] = {}
        self.asked = 0

    def generate(self, prompt: Any, **given: Any) -> Any:
        return self._remember(repr((prompt, given)), lambda: self.llm.generate(prompt, **given))

    def chat(self, messages: Any, **given: Any) -> Any:
        return self._remember(repr((messages, given)), lambda: self.llm.chat(messages, **given))

    def _remember(self, name: str, ask: Any) -> Any:
        self.asked += 1
        if name not in self.known:
            self.known[name] = next(iter(self.llm.batch([ask()])))
        return self.known[name]

    def batch(self, generations: Any, *, ordered: bool) -> Iterator[Any]:
        """Takes four at once; the last comes first if the order is that in which they finish."""
        window = []
        for generation in generations:
            window.append(generation)
            if len(window) == 4:
                yield from window if ordered else reversed(window)
                window = []
        yield from window


@pytest.mark.parametrize("order", list(Order))
def test_results_as_they_come_are_the_same_lines(source, tmp_path, unbroken, llm, order):
    fake, out = Remembered(llm), tmp_path / "out"
    run(fake, options(source, out, Order.FINISHED))
    found = out.read_bytes().splitlines(keepends=True)
    assert sorted(found) == sorted(unbroken.splitlines(keepends=True)) != found
    fake.asked = 0
    out.write_bytes(b"".join(found[:3]) + found[3][:20])
    if order is Order.INPUT:
        with pytest.raises(BatchError, match="continue it with --order finished"):
            run(fake, options(source, out, order))
        return
    run(fake, options(source, out, order))
    assert sorted(out.read_bytes().splitlines(keepends=True)) == sorted(found)
    assert fake.asked == 7 - sum(b'"text"' in line or b'"content"' in line for line in found[:3])


def test_what_is_done_is_not_computed_again(source, tmp_path, unbroken, capsys):
    (tmp_path / "out").write_bytes(unbroken)
    with Batch(options(source, tmp_path / "out")) as batch:
        assert batch.is_complete()
        assert batch.end() == 1
    told = capsys.readouterr().err
    assert "has the results of all 10 lines already" in told
    assert "4 of 10 lines have errors, the first is line 3: the line is not JSON" in told
    assert (tmp_path / "out").read_bytes() == unbroken


def test_a_duplicate_is_found_behind_what_is_done(tmp_path, llm):
    lines = [{"prompt": "a", "custom_id": "x", "max_tokens": 1}, {"prompt": "b", "custom_id": "x", "max_tokens": 1}]
    asked = options(written(tmp_path / "in", lines), tmp_path / "out")
    run(llm, asked)
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(whole.splitlines(keepends=True)[0])
    run(llm, asked)
    assert (tmp_path / "out").read_bytes() == whole
    assert b"earlier line" in whole


def test_an_output_that_does_not_belong_is_refused_and_left_alone(source, tmp_path, unbroken):
    lines = unbroken.splitlines(keepends=True)
    foreign = {
        "line 1 of .* not those": unbroken.replace(
            lines[0], lines[0].replace(b'"key": "', b'"key": "0')[:28] + lines[0][28:]
        ),
        "is no result of a batch": b'{"mine": 1}\n',
        "last line of .* is no result": b"my notes",
        "has two results of line 1": lines[0] * 2,
        "has results of more lines than the 10": unbroken + b'{"line": 11, "key": "0123456789abcdef", "text": ""}\n',
        "more lines than the 10 of": unbroken + b'{"li',
        "continue it with --order finished": b"".join(lines[1:]),
        "line 2 of .* is no result": lines[0] + lines[1][:-9] + b"\n",
    }
    for wrong, data in foreign.items():
        (tmp_path / "out").write_bytes(data)
        with pytest.raises(BatchError, match=wrong):
            Batch(options(source, tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == data
    (tmp_path / "out").write_bytes(lines[0])
    with pytest.raises(BatchError, match="the model or the options are not those"):
        Batch(options(source, tmp_path / "out", max_tokens=3))
    written(source, [LINES[1]])
    with pytest.raises(BatchError, match="line 1 of"):
        Batch(options(source, tmp_path / "out"))


def test_zeros_after_a_crash_of_the_system_are_dropped(source, tmp_path, unbroken, llm):
    first = unbroken.splitlines(keepends=True)[0]
    (tmp_path / "out").write_bytes(first + b'{"line": 2' + bytes(5000))
    run(llm, options(source, tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == unbroken


def test_a_torn_line_goes_before_the_next_one_is_written(tmp_path, unbroken):
    """Killed right after the first write, nothing of the torn line may be left behind it."""
    first = unbroken.splitlines(keepends=True)[0]
    (tmp_path / "out").write_bytes(first + b'{"line": 2' + b"x" * 5000)
    output = FileOutput(tmp_path / "out")
    assert (output.torn, output.done.count) == (True, 1)
    assert (tmp_path / "out").stat().st_size > 5000  # not before something is written
    output.write({"line": 2})
    assert (tmp_path / "out").read_bytes() == first + b'{"line": 2}\n'
    output.close()


def test_one_process_at_a_time(source, tmp_path, unbroken):
    (tmp_path / "out").write_bytes(unbroken[:50])
    descriptor = locks.take(tmp_path / "out")
    with pytest.raises(BatchError, match="another process writes to"):
        Batch(options(source, tmp_path / "out"))
    os.close(descriptor)
    assert (tmp_path / "out").read_bytes() == unbroken[:50]
    Batch(options(source, tmp_path / "out")).__exit__()


def test_impossible_places(source, tmp_path):
    before = source.read_bytes()
    os.link(source, tmp_path / "link")
    (tmp_path / "symbolic").symlink_to(source)
    for same in (source, tmp_path / "link", tmp_path / "symbolic"):
        with pytest.raises(InputError, match="is the input too"):
            Batch(options(source, same))
    assert source.read_bytes() == before
    with pytest.raises(InputError, match="is a directory"):
        Batch(options(source, tmp_path))
    with pytest.raises(BatchError, match="cannot be written: No such file or directory"):
        Batch(options(source, tmp_path / "none" / "out"))
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Batch(options(tmp_path / "none", tmp_path / "out"))
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        Batch(options(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_output_behind_a_link(source, tmp_path, unbroken, llm):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    run(llm, options(source, tmp_path / "link"))
    assert (tmp_path / "out").read_bytes() == unbroken
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nothing_is_left_of_a_batch_that_did_not_begin(source, tmp_path):
    Batch(options(source, tmp_path / "out")).__exit__()
    assert not (tmp_path / "out").exists()


def test_an_empty_input(tmp_path, capsys):
    (tmp_path / "in").touch()
    assert run(None, options(tmp_path / "in", tmp_path / "out")) == 0  # type: ignore[arg-type]
    assert (tmp_path / "out").read_bytes() == b""
    assert "has no lines" in capsys.readouterr().err


def test_a_full_disk_keeps_whole_lines(source, tmp_path, unbroken, llm, monkeypatch, capsys):
    write, room = os.write, 700

    def short(descriptor: int, data: Any) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        count = write(descriptor, data[:room])
        room -= count
        return count

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(BatchError, match="out cannot be written: No space left on device"):
        run(llm, options(source, tmp_path / "out"))
    kept = (tmp_path / "out").read_bytes()
    assert unbroken.startswith(kept)
    assert kept.endswith(b"}\n")
    assert "lines are done; the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    run(llm, options(source, tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == unbroken


def test_a_fault_of_the_machine_ends_the_batch(source, tmp_path, unbroken, llm):
    class Failed:
        error, stats = DeviceError("the GPU fell off the bus"), Stats()

    class Failing(Remembered):
        def _remember(self, name: str, ask: Any) -> Any:
            return super()._remember(name, ask) if self.asked < 2 else Failed()

    with pytest.raises(DeviceError, match="fell off"):
        run(Failing(llm), options(source, tmp_path / "out"))  # type: ignore[arg-type]
    assert (tmp_path / "out").read_bytes() == b"".join(unbroken.splitlines(keepends=True)[:3])


def test_memory_stays_bounded(tmp_path, llm):
    """Lines are taken as the model wants them."""
    taken = 0

    class Counting(Remembered):
        def batch(self, generations: Any, *, ordered: bool) -> Iterator[Any]:
            nonlocal taken
            for generation in generations:
                taken += 1
                assert len(written_lines()) == taken - 1
                yield generation

    def written_lines() -> list[bytes]:
        return (tmp_path / "out").read_bytes().splitlines()

    lines = [{"prompt": "A dog is", "max_tokens": 1}] * 20
    run(Counting(llm), options(written(tmp_path / "in", lines), tmp_path / "out"))  # type: ignore[arg-type]
    assert taken == 20


# The command


WORDS = ["dog", "cat", "river", "hammer", "violin", "house", "tree", "bird", "fish", "king"]
LONG = [
    {"messages": [{"role": "user", "content": f"What is a {word}?"}], "max_tokens": 24, "id": number}
    if number % 3
    else openai(f"n{number}", COMPLETION, prompt=f"A {word} is", max_tokens=24, temperature=1, seed=number)
    for number, word in enumerate(8 * WORDS)
]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["input", "finished"])
def test_killed_five_times_it_ends_with_the_same_bytes(tmp_path, order):
    source = written(tmp_path / "in", LONG)
    args = ["run", "--batch", source, "--temperature", 0, "--seed", 5, "--threads", 1, "--parallel", 2]
    args += ["--order", order]
    whole = dsv2(*args, "-o", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out, kills = tmp_path / "out", 0
    generator = random.Random(order)
    while kills < 5:
        begun = out.stat().st_size if out.exists() else 0
        with subprocess.Popen([*DSV2, *map(str, args), "-o", str(out)], env=environment()) as process:
            while not out.exists() or out.stat().st_size <= begun:
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.03))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    assert 5 <= len(out.read_bytes().splitlines()) < len(LONG)  # there was something left each time
    done = dsv2(*args, "-o", out)
    assert done.returncode == 0, done.stderr
    lines = [path.read_bytes().splitlines() for path in (out, tmp_path / "whole")]
    assert lines[0] == lines[1] if order == "input" else sorted(lines[0]) == sorted(lines[1])
    again = dsv2(*args, "-o", out)
    assert again.returncode == 0
    assert b"has the results of all 80 lines already" in again.stderr
    assert b"dsv2-nano" not in again.stderr  # not even loaded


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_written(tmp_path):
    source, out = written(tmp_path / "in", LONG), tmp_path / "out"
    args = ["run", "--batch", source, "-o", out, "--temperature", 0, "--threads", 1, "--parallel", 2]
    command = [*DSV2, *map(str, args)]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, preexec_fn=heed_signals) as process:
        while not out.exists() or out.stat().st_size < 500:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    count = len(results(out))
    assert f"{count} of 80 lines are done; the same command continues ({out})" in told.decode()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_batch_that_waits_for_its_next_line(tmp_path, number, code):
    out, fifo = tmp_path / "out", tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [*DSV2, "run", "--batch", "-" if code == 130 else str(fifo), "-o", str(out), "--temperature", "0"]
    with (
        os.fdopen(os.open(fifo, os.O_RDWR), "r+b", buffering=0) as pipe,
        subprocess.Popen(
            command, stdin=pipe, env=environment(), stderr=subprocess.PIPE, preexec_fn=heed_signals
        ) as process,
    ):
        pipe.write(b'{"prompt": "A dog is", "max_tokens": 2}\n')
        while not out.exists() or not out.stat().st_size:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        try:
            _, told = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == code
    assert b"1 lines are done; the same command continues" in told
    assert b"Traceback" not in told


@pytest.mark.slow
def test_pipes(tmp_path):
    lines = b'{"prompt": "A dog is", "max_tokens": 2}\r\n{"prompt": "A\xe2\x80\xa8cat is", "max_tokens": 2}'
    done = dsv2("run", "--batch", "-", "--temperature", 0, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [1, 2]
    assert b"2 requests in 0:00:0" in done.stderr
    out = tmp_path / "out"
    out.write_bytes(done.stdout.splitlines(keepends=True)[0])
    done_again = dsv2("run", "--batch", "-", "-o", out, "--temperature", 0, stdin=lines)
    assert done_again.returncode == 0
    assert b"1 requests in" in done_again.stderr
    assert out.read_bytes() == done.stdout
    other = dsv2("run", "--batch", "-", "-o", out, "--temperature", 0, stdin=b"x\n" + lines)
    assert other.returncode == 1
    assert b"line 1 of standard input, the model or the options are not those that" in other.stderr
    assert out.read_bytes() == done.stdout
    full = dsv2("run", "--batch", "-", "-o", "/dev/full", stdin=lines)
    assert full.returncode == 1
    assert b"/dev/full cannot be written: No space left on device" in full.stderr


@pytest.mark.parametrize(
    ("args", "wrong"),
    [
        (["--batch", "in", "prompt"], b"a PROMPT has no meaning with --batch"),
        (["--batch", "in", "--raw"], b"--raw has no meaning with --batch"),
        (["--batch", "in", "--json"], b"--json has no meaning"),
        (["--batch", "in", "--no-stream"], b"--no-stream has no meaning"),
        (["--batch", "in", "--no-stdin"], b"--no-stdin has no meaning"),
        (["--batch", "in", "-N"], b"--no-newline has no meaning"),
        (["--batch", "in", "--cache", "c"], b"--cache has no meaning"),
        (["--batch", "in", "-f", "c"], b"--file has no meaning"),
        (["--batch", "in", "--order", "random"], b"--order 'random' is not one of input, finished"),
        (["--batch", ""], b"the file of --batch has no name"),
        (["--batch", "none"], b"none cannot be read: No such file or directory"),
        (["hi", "-o", "out"], b"--output needs --batch FILE"),
        (["hi", "--parallel", "2"], b"--parallel needs --batch FILE"),
    ],
)
def test_options_without_meaning_are_refused(args, wrong):
    done = dsv2("run", *args)
    assert done.returncode == 2
    assert wrong in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_seed_that_is_drawn_does_not_bind_the_output(tmp_path):
    def fingerprint(seed: int, drawn: bool) -> bytes:
        return BatchOptions(Path("in"), None, {"seed": seed}, drawn=drawn).fingerprint()

    assert fingerprint(1, True) == fingerprint(2, True)
    assert fingerprint(1, False) != fingerprint(2, False)
    (tmp_path / "model").mkdir()
    named = [
        BatchOptions(None, None, model=str(tmp_path / name)).fingerprint() for name in ("model", "model/", "other")
    ]
    assert named[0] == named[1] != named[2]


def test_progress_is_shown_on_a_terminal():
    screen = io.StringIO()
    counts = [4, 0]
    bar = BatchProgress(lambda: (counts[0], counts[1]), 500, Console(file=screen, force_terminal=True, width=120))
    with bar:
        counts[:] = [14, 1000]
        bar._start -= 10
        bar._recent[0] = (bar._start, 0)
        assert bar.figures() in [f"14/500 requests · 100 tokens/s · 0:08:0{second} left" for second in (6, 7, 8)]
    assert "requests" in screen.getvalue()
    endless = BatchProgress(lambda: (counts[0], 0), None, None)
    with endless:
        assert endless.figures().startswith("14 requests · 0 tokens/s · 0:00:0")


def test_an_input_that_does_not_block_is_waited_for(capsys, monkeypatch):
    monkeypatch.setattr(streams, "PATIENCE", 0.05)
    read, write = os.pipe()
    os.set_blocking(read, False)

    def feed() -> None:
        time.sleep(0.2)
        os.write(write, b"one\ntw")
        time.sleep(0.1)
        os.write(write, b"o\n")
        os.close(write)

    thread = threading.Thread(target=feed)
    thread.start()
    with streams.reader(read, "it") as file:
        assert [line.data for line in read_lines(file, "it", b"")] == [b"one", b"two"]
    thread.join()
    os.close(read)
    assert capsys.readouterr().err == "dsv2: waiting for it\n"
