"""The chat: conversation, commands and screen. The model is a fake, except in the tests in a terminal."""

import io
import json
import os
import random
import stat
import sys
from collections.abc import Iterator
from typing import Any

import pexpect
import pytest
from rich.console import Console

from dsv2_local.commands.chat import Chat
from dsv2_local.commands.console import prompt_progress
from dsv2_local.commands.markdown import Markdown, MarkdownStream, finished_blocks
from dsv2_local.errors import CheckpointError, InputError
from dsv2_local.llm import Chunk
from dsv2_local.runtime.engine import Stats
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.saved_cache import read_header
from tests.models import heed_signals


class FakeGeneration:
    """Yields prepared pieces of text; exceptions among them are raised."""

    def __init__(self, pieces: list[Any]) -> None:
        self.text, self.stats, self.pieces = "", Stats(context=100), iter(pieces)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        piece = next(self.pieces)
        if isinstance(piece, BaseException):
            raise piece
        self.text += piece
        return Chunk(piece)

    def close(self) -> None:
        self.pieces = iter(())


class FakeLLM:
    """Gives prepared answers, and records the prompts and options; one character counts as one token."""

    name, recipe, context, defaults = "fake", "nf4", 100, SamplingParams(temperature=0.3)

    def __init__(self, *answers: list[Any]) -> None:
        self.answers, self.asked, self.options = list(answers), [], {}

    def count_tokens(self, messages: list[dict[str, str]]) -> int:
        return sum(len(message["content"]) for message in messages)

    def chat(self, messages: list[dict[str, str]], **options: Any) -> FakeGeneration:
        self.asked.append([dict(message) for message in messages])
        self.options = options
        return FakeGeneration(self.answers.pop(0))


class LargerLLM(FakeLLM):
    """A model whose context has room for a summary."""

    context = 800


def talk(llm: FakeLLM, *lines: Any, asked: tuple[str, ...] = ()) -> tuple[Chat, str]:
    """A chat in which the user types `lines` and then Ctrl-D; returns the chat and its output."""
    typed, choices = iter(lines), iter(asked)

    def read(_: str) -> str:
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    out = io.StringIO()
    chat = Chat(llm, None, {}, Console(file=out, width=200), read, lambda _: next(choices))
    chat.loop()
    return chat, out.getvalue()


def contents(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.conversation.messages]


def test_a_conversation_is_sent_whole_and_shown():
    llm = FakeLLM(["one"], ["two ", "words"])
    chat, shown = talk(llm, "first", "  ", "second")
    assert contents(chat) == ["first", "one", "second", "two words"]
    assert [message["role"] for message in llm.asked[1]] == ["user", "assistant", "user"]
    assert "two words" in shown
    assert "context 0/100" in shown


def test_ctrl_c_keeps_what_came():
    chat, shown = talk(FakeLLM(["half ", KeyboardInterrupt()], ["more"]), "q", "go on")
    assert contents(chat) == ["q", "half ", "go on", "more"]
    assert "stopped by Ctrl-C" in shown


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), CheckpointError("the disk is gone")])
def test_a_question_without_an_answer_is_taken_back(failure):
    chat, shown = talk(FakeLLM([failure], ["fine"]), "lost", "kept")
    assert contents(chat) == ["kept", "fine"]
    assert "taken back" in shown
    assert str(failure) in shown


def test_ctrl_c_at_the_prompt_leaves_nothing_and_says_how():
    _, shown = talk(FakeLLM(), KeyboardInterrupt(), KeyboardInterrupt())
    assert shown.count("leave with Ctrl-D or /exit") == 1


def test_undo_retry_clear():
    llm = FakeLLM(["a"], ["b"], ["c"], [KeyboardInterrupt()])
    chat, _ = talk(llm, "q1", "q2", "/retry")
    assert contents(chat) == ["q1", "a", "q2", "c"]
    chat.command("/retry")  # interrupted before the first word: the old answer stays
    assert contents(chat) == ["q1", "a", "q2", "c"]
    chat.command("/undo")
    assert contents(chat) == ["q1", "a"]
    chat.command("/clear")
    assert contents(chat) == []
    with pytest.raises(InputError, match="no question"):
        chat.command("/retry")


def test_system_and_settings_reach_the_model():
    llm = FakeLLM(["x"], ["y"])
    _, shown = talk(llm, "/system Be brief.", "/set temperature 0.7", "/set top_k 5", "q", "/set top_k -", "q")
    assert llm.asked[0][0] == {"role": "system", "content": "Be brief."}
    assert llm.options["temperature"] == 0.7
    assert "top_k" not in llm.options
    assert "temperature = 0.3" in talk(FakeLLM(), "/set")[1]
    assert "system: Be brief." in shown


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/sav x", "did you mean /save?"),
        ("/zzz", "/help lists the commands"),
        ("/set nothing 1", "there is no setting nothing"),
        ("/set temperature hot", "temperature must be a number"),
        ("/set temperature -1", "temperature must be at least 0"),
        ("/set max_tokens 0", "max_tokens must be at least 1"),
        ("/set temperature", "a name and a value"),
        ("/load never-saved", "there is no session never-saved"),
        ("/save", "name the session"),
        ("/save a/b", "'a/b' cannot name a session"),
        ("/help", "Ctrl-C stops an answer"),
        ("/stats", "no answer yet"),
        ("/undo", "nothing to take back"),
    ],
)
def test_commands_never_end_the_chat(line, said):
    chat, shown = talk(FakeLLM(["still here"]), line, "hello?")
    assert said in shown
    assert contents(chat) == ["hello?", "still here"]


def test_two_slashes_are_a_message():
    llm = FakeLLM(["x"])
    talk(llm, "//etc/passwd is what?")
    assert llm.asked[0][-1]["content"] == "/etc/passwd is what?"


FULL = ("x" * 40, "y" * 40, "z" * 30)


def test_a_full_context_offers_to_drop_the_oldest_turns():
    chat, shown = talk(FakeLLM(["a" * 10], ["b"], ["c"]), "/system S", *FULL, asked=("what?", "Drop"))
    assert contents(chat) == ["y" * 40, "b", "z" * 30, "c"]
    assert chat.conversation.system == "S"
    assert "122 tokens and the context holds 100" in shown
    assert "dropped 1 turn, the oldest" in shown
    chat, _ = talk(FakeLLM(["a" * 10], ["b"], ["c"]), *FULL, "short", asked=("back",))
    assert contents(chat) == ["x" * 40, "a" * 10, "y" * 40, "b", "short", "c"]


def test_a_full_context_offers_a_summary():
    llm = LargerLLM(["a" * 200], ["b"], [" the gist "], ["c"])
    chat, shown = talk(llm, "x" * 300, "y" * 200, "z" * 300, asked=("s",))
    assert contents(chat)[1:] == ["the gist", "y" * 200, "b", "z" * 300, "c"]
    assert contents(chat)[0] == "[A summary by the model stands here for the oldest turns.]"
    assert "the gist" in shown
    for failure in (KeyboardInterrupt(), CheckpointError("the disk is gone"), ""):
        llm = LargerLLM(["a" * 200], ["b"], [failure])
        chat, shown = talk(llm, "x" * 300, "y" * 200, "z" * 300, asked=("s",))
        assert contents(chat) == ["x" * 300, "a" * 200, "y" * 200, "b"]
        assert "taken back" in shown


def test_a_question_that_is_too_long_alone_is_no_choice():
    chat, shown = talk(FakeLLM(["a"], ["b"]), "one", "w" * 200, "two")
    assert "this question alone has 200 tokens and the context holds 100" in shown
    assert contents(chat) == ["one", "a", "two", "b"]


def test_a_full_context_is_reported():
    generation = FakeGeneration(["the end"])
    generation.stats = Stats(context=100, context_used=100, finish_reason="length")
    llm = FakeLLM()
    llm.chat = lambda *_, **__: generation  # type: ignore[method-assign]
    assert "the context is full" in talk(llm, "q")[1]


def test_progress_shows_rate_and_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dsv2_local.commands.console.time.monotonic", lambda: now[0])
    with prompt_progress(terminal()) as progress:
        shown = []
        for step in range(14):  # 40,000 tokens, 12,000 of them reused: 100 per second, from the seventh step on half
            now[0] = 10.0 * step + 10.0 * max(0, step - 6)
            progress(12_000 + 1_000 * step, 40_000)
            shown.append(progress.figures())
        now[0] += 20.0
        shown.append(progress.figures())
    assert shown[0] == "12,000/40,000 tokens · 0:00:00"
    assert shown[1] == "13,000/40,000 · 100 tokens/s · 0:04:30 left"
    assert shown[6] == "18,000/40,000 · 100 tokens/s · 0:03:40 left"
    assert shown[13] == "25,000/40,000 · 53 tokens/s · 0:04:41 left"  # 8,000 tokens in 150 s: only the latest calls
    assert shown[14] == "25,000/40,000 · 53 tokens/s · 0:04:21 left"


TEXT = """# Title

A paragraph with *stress*, <b>html</b> and `code`.

- one
- two

  still two

```python
x = 1

y = 2
```

| a | b |
|---|---|
| 1 | 2 |

The end."""


def terminal(height: int = 10) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=60, height=height, _environ={})


def test_streamed_markdown_ends_as_if_printed_whole():
    blocks: list[str] = []
    rng = random.Random(0)
    for _ in range(20):
        console = terminal()
        with MarkdownStream(console) as stream:
            stream._print = blocks.append  # type: ignore[method-assign]
            rest = TEXT
            while rest:
                size = rng.randrange(1, 9)
                stream.push(rest[:size])
                rest = rest[size:]
        assert "".join(blocks) == TEXT
        assert not any(block.count("```") % 2 for block in blocks)
        blocks.clear()


def test_the_part_that_is_redrawn_is_never_taller_than_the_screen():
    console = terminal(height=8)
    with MarkdownStream(console) as stream:
        for line in range(30):
            stream.push(f"- item {line}\n")
            assert stream._live is not None
            assert len(console.render_lines(stream._live.renderable)) <= 8


def test_html_is_shown_and_control_characters_are_not():
    console = terminal(height=30)
    console.print(Markdown("a <b>bold</b> word\n\n<div>block</div>"))
    assert "<b>" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "<div>" in console.file.getvalue()  # type: ignore[attr-defined]
    plain = io.StringIO()
    with MarkdownStream(Console(file=plain)) as stream:
        stream.push("a\x1b[2Jb\x07c\td\n")
    assert plain.getvalue() == "a[2Jbc\td\n"


def test_where_blocks_end():
    assert finished_blocks("one\n\ntwo") == 5
    assert finished_blocks("one\n\n") == 0
    assert finished_blocks("```\na\n\nb") == 0
    assert finished_blocks("- a\n\n  more of a") == 0


READY = r"\[\?2004h"
"""What prompt_toolkit sends once it reads the keyboard. Before that the terminal turns Enter into a new line."""


def terminal_environment() -> dict[str, str]:
    """The environment for a chat in a pseudo-terminal, without the COLUMNS that pytest-xdist sets."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DSV2_MODEL", "COLUMNS", "LINES")}
    return {**kept, "TERM": "xterm-256color", "NO_COLOR": "1"}


@pytest.fixture
def dsv2(tmp_path) -> Iterator[pexpect.spawn]:
    """The real chat, with the bundled model, in a pseudo-terminal."""
    environment = terminal_environment() | {"XDG_STATE_HOME": str(tmp_path)}
    command = ["-c", "from dsv2_local.cli import main; main()", "chat", "--temperature", "0"]
    child = pexpect.spawn(
        sys.executable, command, env=environment, encoding="utf-8", timeout=90, dimensions=(30, 140), echo=False,
        preexec_fn=heed_signals,
    )  # fmt: skip
    child.expect("lists commands")
    child.expect(READY)
    yield child
    child.close(force=True)


@pytest.mark.slow
def test_in_a_terminal(dsv2, tmp_path):
    dsv2.send("What is a river?\r")
    dsv2.expect("context [0-9]+/2,048")
    dsv2.expect(READY)
    dsv2.send("/sav x\r")
    dsv2.expect("did you mean /save")
    dsv2.expect(READY)
    dsv2.send("/save talk\r")
    dsv2.expect("saved session talk: 1 turn")
    dsv2.expect(READY)
    file = tmp_path / "dsv2-local" / "sessions" / "talk.safetensors"
    assert json.loads(read_header(file).conversation)["messages"][0]["content"] == "What is a river?"
    dsv2.send("\x1b[200~two\nlines\x1b[201~\r")  # a paste keeps its line ends and does not send
    dsv2.expect("context [0-9]+/2,048")
    dsv2.expect(READY)
    dsv2.send("/save\r")
    dsv2.expect("saved session talk: 2 turns")
    assert json.loads(read_header(file).conversation)["messages"][2]["content"] == "two\nlines"
    dsv2.send("\x04")
    dsv2.expect(pexpect.EOF)
    dsv2.wait()
    assert dsv2.exitstatus == 0
    history = tmp_path / "dsv2-local" / "history"
    assert "What is a river?" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_stops_the_answer_alone(dsv2):
    dsv2.send("/set temperature 100\r")  # so flat a distribution that an end token is unlikely
    dsv2.expect("stop = |seed = ")
    dsv2.expect(READY)
    dsv2.send("/set max_tokens 2000\r")
    dsv2.expect("max_tokens = 2000")
    dsv2.expect(READY)
    dsv2.send("Tell me everything.\r")
    dsv2.expect(r"\[\?2004l")  # prompt_toolkit has released the terminal: the answer is being generated
    for _ in range(20):  # one that arrives before the answer has begun goes to prompt_toolkit and is lost
        dsv2.send("\x03")
        if dsv2.expect(["stopped by Ctrl-C|taken back", pexpect.TIMEOUT], timeout=0.4) == 0:
            break
    else:
        pytest.fail("Ctrl-C did not stop the answer")
    dsv2.expect(READY)
    dsv2.send("/stats\r")
    dsv2.expect("answer")
    assert dsv2.isalive()
