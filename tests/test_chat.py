"""The chat: conversation, commands and screen. The model is a fake, except in the tests in a terminal."""

import errno
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import stat
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, ConsoleDimensions

from dsv2_local import cli
from dsv2_local.chunk import Chunk
from dsv2_local.commands.chat import Chat
from dsv2_local.commands.console import prompt_progress
from dsv2_local.commands.markdown import Markdown, MarkdownStream, finished_block
from dsv2_local.commands.messages import as_message, as_typed, is_command
from dsv2_local.commands.prompt import Prompt
from dsv2_local.commands.terminal import Terminal
from dsv2_local.errors import CheckpointError, InputError, TemplateError
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.saved_cache import read_header
from dsv2_local.runtime.stats import Stats
from tests.models import heed_signals
from tests.screen import Screen


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


@pytest.mark.parametrize("line", ["/exit", "/quit ", "/exit now"])
def test_leaving(line):
    llm = FakeLLM()
    talk(llm, line, "never asked")
    assert llm.asked == []


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


def streamed(console: Console, pieces: list[str]) -> str:
    """What is written to the terminal if every piece is drawn when it comes."""
    with MarkdownStream(console) as stream:
        stream._closed.set()  # ends the thread that would draw at times of its own
        stream._thread.join()
        for piece in pieces:
            stream.push(piece)
            stream._draw()
    return written(console)


def written(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def in_pieces(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        size = rng.randrange(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("height", [6, 40])
def test_streamed_markdown_ends_as_if_printed_whole(height):
    whole = Screen(60, height).write(streamed(terminal(height), [TEXT])).lines
    assert [line for line in whole if "still two" in line]
    assert whole[-2:] == ["The end.", ""]
    rng = random.Random(0)
    for _ in range(20):
        assert Screen(60, height).write(streamed(terminal(height), in_pieces(TEXT, rng))).lines == whole


def test_a_table_taller_than_the_screen_is_shown_once():
    table = "| name | value |\n|---|---|\n" + "".join(f"| row {n} | x{'x' * n} |\n" for n in range(20)) + "\nThe end.\n"
    shown = Screen(60, 8).write(streamed(terminal(8), in_pieces(table, random.Random(1)))).lines
    assert [sum(f"row {n} " in line for line in shown) for n in range(20)] == [1] * 20


def test_finished_lines_of_code_are_never_drawn_again():
    lines = [f"value_{n} = [{n}, 'text', None]  # comment {n}" for n in range(80)]
    code = "```python\n" + "\n".join(lines) + "\n```\n"
    out = streamed(terminal(30), in_pieces(code, random.Random(2)))
    assert "\x1b[1A" not in out
    assert len(out) < 100_000
    assert [line for line in Screen(60, 30).write(out).lines if line] == lines


def test_code_is_shown_as_it_is_and_long_lines_are_left_to_the_terminal():
    code = ["def f():", "", "    return " + "x" * 100, "``", "~~~", "    ```", "\tend"]
    for ending in ("\n```", "\n````\nafter", ""):
        text = "```py\n" + "\n".join(code) + ending
        for pieces in ([text], in_pieces(text, random.Random(3)), list(text)):
            rest = "\n\nafter\n" if ending.endswith("after") else "\n"
            whole = Screen(60, 30).write("\n".join(code).expandtabs(4) + rest)  # the terminal breaks the long line
            assert Screen(60, 30).write(streamed(terminal(30), pieces)).lines == whole.lines


def test_a_change_of_the_screen_repeats_no_line():
    """Once the size has changed, or a shell has written to the screen, nobody knows where a line is."""
    words = [f"word{n:03}" for n in range(120)]
    text = " ".join(
        f"**{word}**" if n % 9 == 5 else f"`{word}`" if n % 7 == 3 else word for n, word in enumerate(words)
    )
    for change in ("narrower", "wider", "lower"):
        console, rng = terminal(20), random.Random(4)
        with MarkdownStream(console) as stream:
            stream._closed.set()
            stream._thread.join()
            for number, piece in enumerate(in_pieces(text + "\n\nThe end of it all.", rng)):
                if number % 40 == 20:
                    width, height = console.size
                    new = {"narrower": (width - 3, height), "wider": (width + 3, height), "lower": (width, height - 2)}
                    console.size = ConsoleDimensions(*new[change])
                before = len(written(console))
                stream.push(piece)
                stream._draw()
                if number % 40 == 20:
                    assert "\x1b[" not in re.sub(r"\x1b\[[\d;]*m", "", written(console)[before:])
        shown = " ".join(Screen(60, 20).write(written(console)).lines)
        assert [len(re.findall(word, shown)) for word in words] == [1] * len(words)
    stops = [0]
    console = terminal(20)
    with MarkdownStream(console, lambda: stops[0]) as stream:
        stream._closed.set()
        stream._thread.join()
        stream.push("one two thr")
        stream._draw()
        console.file.write("\n[1]+  Stopped\n")
        stops[0] = 1
        stream.push("ee four")
    assert Screen(60, 20).write(written(console)).lines == ["one two", "[1]+  Stopped", "one two three four", ""]


def test_generating_does_not_wait_for_the_drawing(monkeypatch):
    drawn: list[threading.Thread] = []

    def slow(self: MarkdownStream, last: bool = False) -> None:
        drawn.append(threading.current_thread())
        self._pushed.clear()
        time.sleep(0.02)

    monkeypatch.setattr(MarkdownStream, "_draw", slow)
    start = time.monotonic()
    with MarkdownStream(terminal()) as stream:
        while time.monotonic() < start + 0.55:
            stream.push("word ")
            time.sleep(0.001)
    assert 1 <= len(drawn) - 1 <= 2  # the first after 0.1 s, and after 0.02 s of drawing a pause of 0.4 s
    assert threading.main_thread() not in drawn[:-1]


def test_an_error_of_the_drawing_ends_the_answer(monkeypatch):
    console = terminal()

    def gone(text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(console.file, "write", gone)

    def answer() -> None:
        with MarkdownStream(console) as stream:
            for _ in range(200):
                stream.push("word ")
                time.sleep(0.01)
            pytest.fail("nobody noticed")

    with pytest.raises(OSError, match="Input/output"):
        answer()


def test_html_and_links_are_shown_and_control_characters_are_not():
    console = terminal(height=30)
    console.print(Markdown("a <b>bold</b> word\n\n<div>block</div>\n\n[text](http://there)\n\n[1]: http://source"))
    for part in ("<b>", "<div>", "http://there", "http://source"):
        assert part in written(console)
    image = streamed(terminal(), ["see ![this](http://image) here"])
    assert Screen(60, 10).write(image).lines[0] == "see !this (http://image) here"
    assert "\x1b]" not in written(console)
    plain = io.StringIO()
    with MarkdownStream(Console(file=plain)) as stream:
        stream.push("a\x1b[2Jb\x07c\td\n")
    assert plain.getvalue() == "a[2Jbc\td\n"
    assert "\x1b[2J" not in streamed(terminal(), ["a\x1b[2Jb ", "c\x9b2Jd", "\x07"])


def test_where_blocks_end():
    assert finished_block("one\n\ntwo") == 5
    assert finished_block("one\n\n") == 0
    assert finished_block("- a\n\n  more of a") == 0
    assert finished_block("- a\n  ```\n  b\n\nc\n") == 0  # inside the code of a list
    assert finished_block("one\n```\na\n\nb") == 4
    assert finished_block("one\n``") == 0
    assert finished_block("one\n```") == 0  # perhaps ```code``` in a line


def test_emoji_codes_are_text():
    _, shown = talk(FakeLLM(), "/system :smile: [bold]")
    assert "system: :smile: [bold]" in shown


@given(st.text(alphabet="/a?* \n.", max_size=8))
def test_text_can_always_be_sent_as_it_is(text):
    assert not is_command(as_typed(text))
    assert as_message(as_typed(text)) == text.rstrip("\r\n")


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("//help", "/help"),
        ("//etc/passwd is what?", "/etc/passwd is what?"),
        ("/etc/passwd is what?", "/etc/passwd is what?"),
        ("/* sort */\nint x;", "/* sort */\nint x;"),
        ("// main.cpp", "// main.cpp"),
        ("/// doc", "/// doc"),
        ("  indented\n", "  indented"),
        (" /exit", " /exit"),
        ("\n/quit\n", "\n/quit"),
    ],
)
def test_what_is_a_message(typed, sent):
    llm = FakeLLM(["x"])
    talk(llm, typed)
    assert llm.asked[0][-1]["content"] == sent


def test_a_drawn_seed_is_kept_and_shown():
    llm = FakeLLM(["x"])
    chat, shown = talk(llm, "/set seed -1", "q")
    seed = chat.conversation.settings["seed"]
    assert seed >= 0
    assert f"seed = {seed}" in shown
    assert llm.options["seed"] == seed


def test_ctrl_c_twice_does_not_end_the_chat(monkeypatch):
    monkeypatch.setattr("dsv2_local.commands.chat.describe_stats", Mock(side_effect=[KeyboardInterrupt, "figures"]))
    chat, shown = talk(FakeLLM(["half ", KeyboardInterrupt()], ["more"]), "q", "go on")
    assert contents(chat) == ["q", "half ", "go on", "more"]
    assert "figures" in shown


@pytest.fixture
def keyboard(monkeypatch) -> Iterator[int]:
    """The other end of a terminal that is standard input; writing there is typing."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r", encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield ours
    os.close(ours)


def modes(descriptor: int) -> list[Any]:
    return termios.tcgetattr(descriptor)


def test_keys_that_are_pressed_early_become_messages(keyboard, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = modes(keyboard)
    os.write(keyboard, b"zero\nhalf")  # the terminal translates Enter, and shows what is typed
    with Terminal() as terminal:
        owned = modes(keyboard)
        assert not owned[3] & (termios.ECHO | termios.ICANON)
        assert owned[3] & termios.ISIG
        terminal.collect()
        prompt = Prompt(terminal, ["/help"])
        os.write(keyboard, b" one\r\x1b[200~two\nlines\n\x1b[201~\r" + b"x" * 5_000 + b"\r")
        wait_until(lambda: len(terminal._keys) > 5_000)
        assert [prompt.read(""), prompt.read(""), prompt.read("")] == ["zero", "half one", "two\nlines\n"]
        assert modes(keyboard) == owned
        collected = len(terminal._keys)
        os.write(keyboard, b"y")
        wait_until(lambda: len(terminal._keys) > collected)

        type_while_reading(keyboard, b"es\rnext\r")
        assert prompt.ask("sure?") == "es"  # the y was typed before the question
        assert prompt.read("") == "x" * 5_000
        assert prompt.read("") == "ynext"
    assert modes(keyboard) == before


def test_a_chat_that_was_started_in_the_background_owns_the_terminal(keyboard, monkeypatch):
    """Setting the modes there stops the process, and fails with EINTR once `fg` continues it."""
    before, once = modes(keyboard), termios.tcsetattr
    stopped = Mock(side_effect=lambda *_: monkeypatch.setattr(termios, "tcsetattr", once))

    def interrupted(*arguments: Any) -> None:
        stopped(*arguments)
        raise termios.error(errno.EINTR, "Interrupted system call")

    monkeypatch.setattr(termios, "tcsetattr", interrupted)
    with Terminal():
        assert not modes(keyboard)[3] & (termios.ECHO | termios.ICANON)
        monkeypatch.setattr(termios, "tcsetattr", interrupted)
    assert modes(keyboard) == before
    assert stopped.call_count == 2


def test_a_model_without_a_chat_template_is_refused_at_once(keyboard, monkeypatch):
    llm = Mock(**{"tokenizer.require_chat_template.side_effect": TemplateError("this checkpoint has no chat template")})
    llm.__enter__ = lambda self: self
    llm.__exit__ = lambda *_: None
    monkeypatch.setattr(cli, "_load", lambda *_, **__: llm)
    before = modes(keyboard)
    with pytest.raises(TemplateError):
        cli.app(["chat"], standalone_mode=False)
    assert modes(keyboard) == before


def type_while_reading(keyboard: int, keys: bytes) -> None:
    """Type keys once prompt_toolkit reads the keyboard, for which Ctrl-C is a key."""

    def type_them() -> None:
        wait_until(lambda: not modes(keyboard)[3] & termios.ISIG)
        os.write(keyboard, keys)

    threading.Thread(target=type_them).start()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (b"\x1b[200~/help\x1b[201~\r", "//help"),
        (b"\x1b[200~//x\x1b[201~\r", "///x"),
        (b"\x1b[200~// x\r\n/y\x1b[201~\r", "// x\n/y"),
        (b"a \x1b[200~/help\x1b[201~\r", "a /help"),
        (b"one\\\rtwo\r", "one\ntwo"),
        (b"\x1b[200~#define x \\\x1b[201~\r", "#define x \\"),  # the backslash was pasted
        (b"one\x1b\rtwo\r", "one\ntwo"),
        (b"caf\xe9\r", "caf\udce9"),
        ("na\u00efve \U0001f600\r".encode(), "na\u00efve \U0001f600"),
    ],
)
def test_keys(keyboard, monkeypatch, tmp_path, keys, message):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with Terminal() as terminal:
        prompt = Prompt(terminal, [])
        os.write(keyboard, keys)
        assert prompt.read("") == message


def test_ctrl_c_right_after_enter_stops_the_answer(keyboard, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with Terminal() as terminal:
        prompt = Prompt(terminal, [])
        type_while_reading(keyboard, b"one\r\x03two\r")
        assert prompt.read("") == "one"
        with pytest.raises(KeyboardInterrupt):
            terminal.check_interrupt()
        terminal.check_interrupt()
        assert prompt.read("") == "two"


READY = r"\[\?2004h"
"""What is sent when a message ends, and again when the next one can be typed."""


def terminal_environment() -> dict[str, str]:
    """The environment for a chat in a pseudo-terminal, without the COLUMNS that pytest-xdist sets."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DSV2_MODEL", "COLUMNS", "LINES")}
    return {**kept, "TERM": "xterm-256color", "NO_COLOR": "1"}


MAIN = "from dsv2_local.cli import main; main()"


def spawn(tmp_path: Path, *command: str) -> pexpect.spawn:
    environment = terminal_environment() | {"XDG_STATE_HOME": str(tmp_path)}
    return pexpect.spawn(
        command[0], list(command[1:]), env=environment, encoding="utf-8", timeout=90, dimensions=(30, 140), echo=False,
        preexec_fn=heed_signals,
    )  # fmt: skip


@pytest.fixture
def dsv2(tmp_path) -> Iterator[pexpect.spawn]:
    """The real chat, with the bundled model, in a pseudo-terminal."""
    child = spawn(tmp_path, sys.executable, "-c", MAIN, "chat", "--temperature", "0")
    child.expect("lists commands")
    child.expect(READY)
    yield child
    child.close(force=True)


def test_something_is_on_the_screen_before_torch_is_imported(tmp_path):
    child = spawn(tmp_path, sys.executable, "-c", f"import sys; sys.modules['torch'] = None; {MAIN}", "chat")
    child.expect("dsv2: using the bundled dsv2-nano")
    child.expect("dsv2: loading dsv2-nano")
    child.expect("torch")  # cannot be imported
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 1


@pytest.mark.slow
@pytest.mark.parametrize("end", ["\x04", "\x03", signal.SIGTERM])
def test_a_terminal_is_left_as_it_was(tmp_path, end):
    """However the chat ends, and while it is suspended; what is typed while it starts is not lost."""
    if shutil.which("bash") is None:
        pytest.skip("bash, for its control of jobs, is not here")
    child = spawn(tmp_path, "bash", "--norc", "-i")
    modes = "stty -a | tr ' ;' '\\n\\n' | grep -x -- '-*\\(echo\\|icanon\\|icrnl\\)' | tr '\\n' ' '; echo modes\r"
    child.send(f"PS1='§ '; dsv2() {{ {sys.executable} -c '{MAIN}' \"$@\"; }}; stty echo\r")
    child.send(modes)
    child.expect("icrnl icanon echo modes")
    child.send("dsv2 chat\r")
    child.expect("loading dsv2-nano")
    if end == "\x03":
        child.send("wasted\x03")
    else:
        child.send("/set seed 5\rhalf")
        child.expect("seed = 5")
        child.expect("half")
        child.send("\x1a")
        child.expect("Stopped")
        child.send(modes)
        child.expect("icrnl icanon echo modes")
        child.send("fg\r")
        child.expect("half")
        if end == signal.SIGTERM:
            child.send("\x15/system kill me\r")
            child.expect("system: kill me")
            group = os.tcgetpgrp(child.child_fd)
            os.kill(group, end)
        else:
            child.send("\x15" + end)
    child.expect("§ ")
    child.send(modes)
    child.expect("icrnl icanon echo modes")
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
