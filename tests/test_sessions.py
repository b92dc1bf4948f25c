"""Sessions: a continued chat answers as if it had never stopped, and no failure or wrong file damages a session."""

import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv2_local import llm
from dsv2_local.commands import sessions
from dsv2_local.commands.chat import Chat
from dsv2_local.commands.conversation import Conversation
from dsv2_local.errors import InputError, SavedCacheError
from dsv2_local.runtime import saved_cache
from tests.models import heed_signals, kill_half_way
from tests.test_chat import READY, terminal_environment
from tests.test_cli import dsv2

QUESTIONS = ("What is a violin?", "What is a river?", "Write me a poem.", "What is a dog?")


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    """The directory of sessions in a test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "dsv2-local" / "sessions"


@pytest.fixture(scope="module")
def nano() -> llm.LLM:
    return llm.load()


def talk(model: llm.LLM, *lines: str, session: str | None = None, ask: str = "") -> tuple[Chat, str]:
    """A chat with the bundled model in which the user types `lines` and then Ctrl-D."""
    typed, out, asked = iter(lines), io.StringIO(), iter(ask)

    def read(_: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    console = Console(file=out, width=200)
    chat = Chat(model, None, {"temperature": 0}, console, read, lambda _: next(asked), session=session)
    chat.loop()
    return chat, out.getvalue()


def answers(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.conversation.messages if message["role"] == "assistant"]


def test_a_resumed_chat_answers_the_same_and_reads_nothing_again(state):
    whole, _ = talk(llm.load(), *QUESTIONS)
    _, shown = talk(llm.load(), *QUESTIONS[:2], session="trip")
    assert "new session trip" in shown
    assert "saved session trip: 2 turns" in shown
    assert sorted(path.name for path in state.iterdir()) == [".trip.lock", "trip.safetensors"]
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE((state / "trip.safetensors").stat().st_mode) == 0o600
    held = llm.load()
    chat, shown = talk(held, QUESTIONS[2], session="trip")
    assert "session trip: 2 turns" in shown
    assert chat._last is not None
    stats = chat._last.stats
    # everything is reused but the end token of the last answer, which never ran, and the new question
    assert stats.prompt_tokens - stats.reused_tokens <= held.count_tokens([{"role": "user", "content": QUESTIONS[2]}])
    assert f"reused {stats.reused_tokens}" in shown
    chat, _ = talk(llm.load(), QUESTIONS[3], session="trip")
    assert answers(chat) == answers(whole)


def test_save_and_load_in_a_chat(nano, state):
    chat, shown = talk(nano, "/system Be brief.", "/set seed 4", QUESTIONS[0], "/save a", QUESTIONS[1])
    assert "saved session a: 1 turn" in shown
    again, _ = talk(nano, "/load a")
    assert again.conversation == chat.conversation  # the turn after /save is saved too
    assert len(again.conversation.messages) == 4
    refused, shown = talk(nano, QUESTIONS[2], "/save a", "/load a", "/load b", ask="nny")
    assert "not saved; session a is unchanged" in shown
    assert "there is no session b; the sessions are a" in shown
    assert refused.conversation.turns == 1
    other, _ = talk(nano, QUESTIONS[2], "/save b", "/load a", "/undo")
    assert other.conversation.turns == 1
    assert sessions.load("b", nano).messages[0]["content"] == QUESTIONS[2]
    assert sessions.load("a", nano) == other.conversation
    replaced, _ = talk(nano, QUESTIONS[3], "/save b", ask="y")
    assert sessions.load("b", nano) == replaced.conversation


def test_what_was_given_goes_before_what_was_saved(nano):
    talk(nano, "/system Be brief.", "/set top_k 3", "/set temperature 0.5", QUESTIONS[0], session="s")
    given: tuple[str | None, dict[str, Any]]
    for given in ((None, {}), ("Be long.", {"temperature": 0.0, "max_tokens": 5})):
        chat = Chat(nano, *given, Console(file=io.StringIO()), lambda _: "/exit", str, session="s")
        chat.loop()
        assert chat.conversation.system == (given[0] or "Be brief.")
        assert chat.conversation.settings == {"temperature": 0.5, "top_k": 3} | given[1]


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "a/b", "/etc/passwd", "a\\b", "-x", "a\nb", "a\0b", "本" * 67, "\ud800"]
)
def test_rubbish_names_are_refused(nano, name):
    for use in (sessions.file, lambda name: sessions.load(name, nano), lambda name: sessions.check([name])):
        with pytest.raises(InputError, match="cannot name a session"):
            use(name)


@pytest.mark.parametrize("name", ["a", "My trip 2026-11", "a.b", "x" * 200, "книга", "本" * 66, "me@home+1"])
def test_names_that_are_fine(nano, name):
    talk(nano, QUESTIONS[0], session=name)
    assert sessions.load(name, nano).turns == 1


def rewrite(path: Path, conversation: object, **metadata: str) -> None:
    """Replace the conversation in a session's file and its checksum, without updating that of the whole."""
    with safe_open(path, framework="np") as file:
        kept = file.metadata()
    import torch

    text = conversation if isinstance(conversation, bytes) else json.dumps(conversation).encode()
    tensors = load_file(path) | {"conversation": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    save_file(tensors, path, kept | {"conversation_sha256": hashlib.sha256(text).hexdigest()} | metadata)


WHOLE = {"model": "dsv2-nano", "system": None, "settings": {}, "messages": []}


@pytest.mark.parametrize(
    "damaged",
    [
        b"\xff\xfe",
        b"{",
        b"[" * 100_000,
        3,
        {**WHOLE, "messages": [{"role": "judge", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {**WHOLE, "messages": [{"role": "user", "content": "x"}]},
        {**WHOLE, "messages": 3},
        {**WHOLE, "system": 3},
        {**WHOLE, "settings": {"temperature": "-5"}},
        {**WHOLE, "settings": {"evil": "1"}},
        {**WHOLE, "model": None},
    ],
)
def test_a_damaged_conversation_changes_nothing(nano, state, damaged):
    chat, _ = talk(nano, QUESTIONS[0], session="s")
    rewrite(state / "s.safetensors", damaged)
    held, before = nano.engine.tokens, (state / "s.safetensors").read_bytes()
    again, shown = talk(nano, "/load s", session="mine")
    assert "error:" in shown
    assert "is damaged" in shown
    assert nano.engine.tokens == held
    assert again.conversation == Conversation(None, {"temperature": 0})
    assert (state / "s.safetensors").read_bytes() == before
    assert chat.conversation.turns == 1


def flip(path: Path, name: str) -> None:
    """Change one bit in the middle of a tensor."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + (start + end) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["layer.001", "tokens"])
def test_a_flipped_bit_in_the_rows_costs_time_and_not_the_conversation(nano, state, capsys, name):
    chat, _ = talk(nano, QUESTIONS[0], session="s")
    whole, _ = talk(llm.load(), *QUESTIONS[:2])
    flip(state / "s.safetensors", name)
    fresh = llm.load()
    again, _ = talk(fresh, QUESTIONS[1], session="s")
    assert "the conversation is whole, and will be read again" in capsys.readouterr().err
    assert again.conversation == whole.conversation
    assert chat.conversation.turns == 1
    assert sessions.load("s", nano) == again.conversation  # saved whole again
    assert capsys.readouterr().err == ""


def test_a_flipped_bit_in_the_conversation_is_found(nano, state):
    talk(nano, QUESTIONS[0], session="s")
    flip(state / "s.safetensors", "conversation")
    with pytest.raises(SavedCacheError, match="its conversation does not match its checksum"):
        sessions.load("s", nano)


def test_without_a_checksum_of_its_own_a_damaged_session_is_refused(nano, state):
    talk(nano, QUESTIONS[0], session="s")
    path = state / "s.safetensors"
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    del metadata["conversation_sha256"]  # as older versions saved it
    save_file(load_file(path), path, metadata)
    assert sessions.load("s", nano).turns == 1
    flip(path, "layer.001")
    with pytest.raises(SavedCacheError, match="do not match its checksum"):
        sessions.load("s", nano)


def test_what_is_no_session_of_this_model_is_refused(nano, state):
    talk(nano, QUESTIONS[0], session="s")
    path = state / "s.safetensors"
    whole, held = path.read_bytes(), nano.engine.tokens

    def refused(match: str) -> None:
        with pytest.raises(SavedCacheError, match=match) as caught:
            sessions.load("s", nano)
        assert "\n" not in str(caught.value)
        assert nano.engine.tokens == held

    text = Conversation().to_text("big\x1b[2J-model")
    rewrite(path, text.encode(), model="of another")
    refused(r"another model, .* \(the session's model is big\[2J-model, not dsv2-nano; choose it with -m\)")
    path.write_bytes(whole)
    rewrite(path, json.loads(text), format="dsv2 cache 3")
    refused("newer version")
    for rubbish in (b"", b"GGUF", whole[:-1], whole[:100], b"\xff" * 100, b"\x80\x04K\x01."):
        path.write_bytes(rubbish)
        refused("not a saved cache")
    nano.save_cache(path)
    refused("not a session: it has no conversation")


@pytest.mark.slow
def test_a_session_is_not_replaced_by_a_cache(nano, state):
    talk(nano, QUESTIONS[0], session="s")
    before = (state / "s.safetensors").read_bytes()
    done = dsv2("run", "--cache", state / "s.safetensors", "hello")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"is a session" in done.stderr
    assert (state / "s.safetensors").read_bytes() == before


@pytest.mark.slow
def test_sessions_are_listed_and_deleted(nano, state):
    done = dsv2("sessions")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"there are no sessions" in done.stderr
    talk(nano, QUESTIONS[0], session="old")
    talk(nano, QUESTIONS[0], QUESTIONS[1], session="new one")
    os.utime(state / "old.safetensors", (0, 0))
    (state / "broken.safetensors").write_bytes(b"GGUF")
    os.utime(state / "broken.safetensors", (1, 1))
    (state / ".hidden.safetensors").write_bytes(b"")
    (state / "notes.txt").write_bytes(b"")
    lines = [line.split("\t") for line in dsv2("sessions").stdout.decode().splitlines()]
    assert [line[0] for line in lines] == ["new one", "broken", "old"]
    assert lines[2][1:3] == ["dsv2-nano", "1"]
    assert lines[0][2] == "2"
    assert 0 < int(lines[2][3]) < int(lines[0][3])
    assert int(lines[0][4]) == (state / "new one.safetensors").stat().st_size
    assert lines[2][5].startswith("1970-01-01T") or lines[2][5].startswith("1969-12-31T")
    assert "not a saved cache" in lines[1][1]
    for arguments, said in (
        (["new one", "none"], b"there is no session none"),
        (["../x", "--yes"], b"cannot name a session"),
        (["old"], b"add --yes"),
    ):
        done = dsv2("sessions", "delete", *arguments)
        assert (done.returncode, done.stdout) == (2, b"")
        assert said in done.stderr
        assert len(list(state.glob("[a-z]*.safetensors"))) == 3
    assert dsv2("sessions", "delete", "broken", "old", "--yes").returncode == 0
    assert {path.name for path in state.iterdir()} == {
        "new one.safetensors", ".new one.lock", ".hidden.safetensors", "notes.txt"
    }  # fmt: skip


def test_what_is_no_session_hides_no_other(state, monkeypatch):
    state.mkdir(parents=True, exist_ok=True)
    (state / "link.safetensors").symlink_to("nowhere")
    os.mkfifo(state / "pipe.safetensors")
    (state / "gone.safetensors").touch()

    read = saved_cache.read_header

    def delete_meanwhile(path):
        if path.name == "gone.safetensors":
            path.unlink()
        return read(path)

    monkeypatch.setattr(saved_cache, "read_header", delete_meanwhile)
    assert {session.name: session.contents[0] for session in sessions._all()} == {
        "link": "cannot be read: No such file or directory",
        "pipe": "cannot be read: it is not a file (a directory, a pipe or a device)",
    }
    sessions.check(["link", "pipe"])
    sessions.delete(["link", "pipe"])
    assert not list(state.glob("*.safetensors"))


@pytest.mark.slow
def test_killed_while_it_saves_the_old_session_stays(nano, state):
    chat, _ = talk(nano, QUESTIONS[0], session="s")
    path = state / "s.safetensors"
    before = path.read_bytes()
    script = textwrap.dedent(
        """
        import time
        from rich.console import Console
        from dsv2_local import llm
        from dsv2_local.runtime import saved_cache
        from dsv2_local.commands.chat import Chat
        real, lines = saved_cache.save_file, iter(["What is a cat?"])
        def slow(*arguments):
            real(*arguments)
            print("half way", flush=True)
            time.sleep(60)
        saved_cache.save_file = slow
        Chat(llm.load(), None, {}, Console(stderr=True), lambda _: next(lines), str, session="s").loop()
        """
    )
    kill_half_way(script)
    assert path.read_bytes() == before
    assert sessions.load("s", nano) == chat.conversation


def test_a_failed_save_is_reported_and_the_chat_continues(nano, state):
    state.parent.mkdir(parents=True)
    state.write_text("a file where the directory should be")
    chat, shown = talk(nano, QUESTIONS[0], "/save s", QUESTIONS[1])
    assert "cannot be written" in shown
    assert chat.conversation.turns == 2


def test_two_chats_cannot_have_one_session(nano, state):
    with sessions.claim("s"):
        chat, shown = talk(nano, QUESTIONS[0], "/save s", "/save t")
        assert "session s is open in another chat" in shown
        assert "saved session t: 1 turn" in shown
        with pytest.raises(InputError, match="open in another chat"):
            talk(nano, session="s")
    talk(nano, QUESTIONS[1], session="s")
    with sessions.claim("t"):
        again, shown = talk(nano, "/load t", session="s")
        assert "session t is open in another chat" in shown
        assert again.conversation.messages[0]["content"] == QUESTIONS[1]
        assert chat.conversation.messages[0]["content"] == QUESTIONS[0]


def test_an_open_session_is_not_deleted(nano, state):
    talk(nano, QUESTIONS[0], session="s")
    talk(nano, QUESTIONS[0], session="t")
    with sessions.claim("s"):
        with pytest.raises(InputError, match="session s is open in another chat"):
            sessions.delete(["t", "s"])
        assert sorted(path.name for path in state.glob("*.safetensors")) == ["s.safetensors", "t.safetensors"]
    sessions.delete(["t", "s", "s"])
    assert list(state.iterdir()) == []


def test_what_a_killed_save_left_goes_when_the_session_is_opened(nano, state):
    talk(nano, QUESTIONS[0], session="s")
    left = state / ".s.safetensors.partial"
    left.mkdir(mode=0o700)
    (left / "new").write_text("half")
    talk(nano, session="s")
    assert not left.exists()


def spawn(*options: str, code: str = "") -> pexpect.spawn:
    """`dsv2 chat` in a pseudo-terminal; `code` runs before it."""
    command = ["-c", f"{code}\nfrom dsv2_local.cli import main; main()", "chat", "--temperature", "0", *options]
    return pexpect.spawn(
        sys.executable, command, env=terminal_environment(), encoding="utf-8", timeout=90, dimensions=(30, 140),
        echo=False, preexec_fn=heed_signals,
    )  # fmt: skip


@pytest.fixture
def terminals() -> Iterator[list[pexpect.spawn]]:
    """A list of terminals that are closed at the end of the test."""
    opened: list[pexpect.spawn] = []
    yield opened
    for child in opened:
        child.close(force=True)


@pytest.mark.slow
@pytest.mark.parametrize(("leave", "code"), [("\x04", 0), (signal.SIGTERM, 128 + 15), (signal.SIGHUP, 128 + 1)])
def test_a_session_is_saved_however_the_chat_ends(nano, terminals, leave, code):
    child = spawn("--session", "s")
    terminals.append(child)
    child.expect("new session s")
    child.expect(READY)
    child.send("What is a river?\r")
    child.expect("context [0-9]+/2,048")
    child.expect(READY)
    child.send("/set top_k 7\r")  # only the end of the chat saves this change, since no turn follows
    child.expect("top_k = 7")
    child.expect(READY)
    if isinstance(leave, str):
        child.send(leave)
    else:
        child.kill(leave)
    if leave != signal.SIGHUP:  # after which nothing can be printed
        child.expect("saved session s: 1 turn")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == code
    conversation = sessions.load("s", nano)
    assert conversation.settings["top_k"] == 7
    assert conversation.turns == 1
    again = spawn("--session", "s")
    terminals.append(again)
    again.expect("session s: 1 turn")
    again.expect(READY)
    again.send("What is a dog?\r")
    again.expect("reused [1-9][0-9]*,")


def test_a_closed_terminal_fails_first_and_signals_later(nano, monkeypatch):
    def save(*arguments: object) -> None:
        signal.raise_signal(signal.SIGHUP)  # a shell forwards it to its children
        signal.raise_signal(signal.SIGTERM)
        real(*arguments)

    def read(_: str) -> str:
        if not chat.conversation.messages:
            return QUESTIONS[0]
        chat.conversation.system = "S"
        monkeypatch.setattr(sessions, "save", save)
        raise OSError("the terminal is gone")

    real, before = sessions.save, signal.getsignal(signal.SIGHUP)
    chat = Chat(nano, None, {}, Console(file=io.StringIO()), read, str, session="s")
    with pytest.raises(OSError, match="the terminal is gone"):
        chat.loop()
    assert sessions.load("s", nano).system == "S"
    assert signal.getsignal(signal.SIGHUP) == before


SLOW = """
import time
from dsv2_local.runtime.engine import Engine
made, ended = Engine.__init__, Engine._end_pass
def short(self, *args, **options):
    made(self, *args, **options)
    self.chunk = 64
def slow(self, hidden):
    ended(self, hidden)
    time.sleep(0.3)
Engine.__init__, Engine._end_pass = short, slow
"""


@pytest.mark.slow
def test_ctrl_c_while_a_prompt_is_read_keeps_what_was_read(terminals):
    child = spawn(code=SLOW)
    terminals.append(child)
    child.expect("lists commands")
    child.expect(READY)
    text = "A violin is a bowed instrument. " * 100 + "What is a violin?"
    child.send(f"\x1b[200~{text}\x1b[201~\r")
    child.expect(r"reading the prompt.*[0-9]+/([0-9]+|[0-9],[0-9]{3}) · [0-9,]+ tokens/s · 0:00:[0-9]{2} left")
    child.send("\x03")
    child.expect(r"read ([0-9]+) of ([0-9,]+) tokens; they stay in the cache: send the message again")
    read = child.match[1]
    assert int(read) % 64 == 0
    assert int(read) > 0
    child.expect(READY)
    child.send(f"\x1b[200~{text}\x1b[201~\r")
    child.expect(rf"prompt [0-9,]+ tokens, reused {read},")


@pytest.mark.slow
def test_a_script_stopped_while_it_reads_keeps_what_was_read(tmp_path):
    book, cache = tmp_path / "book", tmp_path / "cache"
    book.write_text("A violin is a bowed instrument. " * 100)
    arguments = ["run", "-n", "4", "--temperature", "0", "-f", str(book), "What is it?", "--json"]
    plain = json.loads(dsv2(*arguments).stdout)
    code = SLOW.replace("    ended(self, hidden)\n", "    ended(self, hidden)\n    print('chunk', flush=True)\n")

    def stopped(*more: str) -> tuple[int, str]:
        with subprocess.Popen(
            [sys.executable, "-c", f"{code}\nfrom dsv2_local.cli import main; main()", *arguments, *more],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_signals,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for _ in range(4):
                process.stdout.readline()
            process.send_signal(signal.SIGINT)
            return process.wait(), process.stderr.read().decode().splitlines()[-1]

    returned, said = stopped()
    assert returned == 130
    assert said == f"dsv2: read 256 of {plain['prompt_tokens']:,} tokens; --cache FILE would save them"
    returned, said = stopped("--cache", str(cache))
    assert returned == 130
    assert said.endswith(f"tokens; saved in {cache}: the same command continues from there")
    done = json.loads(dsv2(*arguments, "--cache", cache).stdout)
    assert done["reused_tokens"] == 256
    assert done["text"] == plain["text"]
    assert json.loads(dsv2(*arguments, "--cache", cache).stdout)["reused_tokens"] == plain["prompt_tokens"] - 1


@pytest.mark.slow
def test_a_session_needs_a_terminal_and_a_name():
    for options, said in ((["--session", "s"], b"needs a terminal"), (["--session", "a/b"], b"cannot name a session")):
        done = dsv2("chat", *options, stdin=b"hello")
        assert (done.returncode, done.stdout) == (2, b"")
        assert said in done.stderr


@pytest.mark.slow
def test_in_a_terminal_a_full_context_offers_and_a_refused_session_is_one_line(terminals, state):
    child = spawn("--context", "60", "--max-tokens", "30")
    terminals.append(child)
    for question in QUESTIONS:
        child.expect(READY)
        child.send(f"{question}\r")
        if child.expect(["context [0-9]+/60", r"take this question \[b\]ack\?"]):
            child.send("d\r")
            child.expect("dropped [1-9] turns?, the oldest")
            break
    else:
        pytest.fail("the context never filled up")
    child.expect("context [0-9]+/60")
    state.mkdir(parents=True)
    (state / "s.safetensors").write_bytes(b"GGUF")
    child = spawn("--session", "s")
    terminals.append(child)
    child.expect("dsv2: error: .*not a saved cache")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 1
    assert "Traceback" not in child.before
