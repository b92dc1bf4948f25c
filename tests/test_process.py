"""What the `dsv2` command inherits: streams that are closed, full or silent, signals, no home; how any of it ends."""

import io
import os
import pwd
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv2_local import llm
from dsv2_local.commands import process, streams
from dsv2_local.commands.run_options import gather_prompt
from dsv2_local.errors import InputError, OutputError
from dsv2_local.machine import homes, measurements
from tests.models import heed_signals, save_random
from tests.test_cli import DSV2, QUESTION, dsv2, environment

PLAN = ["plan", "deepseek-v2-lite", "--ram", "64GiB"]
NANO = b"dsv2: using the bundled dsv2-nano; choose another model with -m or $DSV2_MODEL\n"


def shell(script: str, *words: str, **extra: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which "$@" is the command."""
    command = ["bash", "-c", script, "-", *DSV2, *words]
    return subprocess.run(command, capture_output=True, check=False, timeout=120, env=environment(**extra))


@pytest.mark.slow
def test_a_closed_standard_input_is_empty():
    done = shell('"$@" <&-', "run", QUESTION, "--temperature", "0")
    assert (done.returncode, done.stderr) == (0, NANO)
    assert done.stdout == dsv2("run", QUESTION, "--temperature", 0).stdout != b""
    assert shell('"$@" 0>/dev/null', "run", QUESTION, "--temperature", "0").stdout == done.stdout  # as of nohup


def test_a_width_of_no_columns_is_none():
    done = dsv2(*PLAN, COLUMNS="0")
    assert (done.returncode, done.stdout) == (0, dsv2(*PLAN).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], PLAN, ["run", "--json", QUESTION], ["run", QUESTION]])
@pytest.mark.parametrize(("place", "why"), [("/dev/full", "No space left on device"), ("&-", "Bad file descriptor")])
def test_standard_output_that_cannot_be_written_is_one_line(words, place, why):
    done = shell(f'"$@" >{place} </dev/null', *words)
    assert done.returncode == 1
    assert done.stderr.removeprefix(NANO).decode() == f"dsv2: error: standard output cannot be written: {why}\n"


@pytest.mark.slow
def test_standard_error_that_cannot_be_written_changes_nothing():
    for place in ("/dev/full", "&-"):
        done = shell(f'"$@" 2>{place} </dev/null', "run", QUESTION, "--temperature", "0")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout


@pytest.mark.slow
def test_a_narrow_encoding_gets_escapes_and_a_line():
    done = dsv2(*PLAN, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, b"")  # marks of ASCII
    done = dsv2("run", "--json", "-n", 1, "☺", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, NANO)
    done = dsv2("inspect", "/no-such-☺", PYTHONIOENCODING="ascii")
    assert b"/no-such-\\u263a" in done.stderr


def test_characters_that_the_encoding_lacks(monkeypatch, capfd):
    monkeypatch.setattr(streams, "_escaped_before", [])
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    read, write = os.pipe()
    with open(write, "w", encoding="latin-1", closefd=False) as narrow:
        monkeypatch.setattr(sys, "stdout", narrow)
        streams.repair()
        print("Größe ☺ \ud83d 😀", flush=True)
        print("☺", flush=True)
        assert not streams.is_unicode(sys.stdout)
    os.close(write)
    with open(read, "rb") as written:  # noqa: PTH123
        assert written.read() == b"Gr\xf6\xdfe \\u263a \\ud83d \\U0001f600\n\\u263a\n"
    assert capfd.readouterr().err.count("standard output is") == 1


def test_a_stream_that_does_not_block_is_written_completely():
    read, write = os.pipe()
    os.set_blocking(write, False)
    received = bytearray()

    def drain():
        time.sleep(0.05)
        while part := os.read(read, 100_000):
            received.extend(part)

    reader = threading.Thread(target=drain)
    reader.start()
    with open(write, "w", closefd=False) as stream:
        text = streams._text(stream, os.O_RDONLY, streams._stdout_failed, "strict")
        text.write("x" * 1_000_000)
        text.flush()
    os.close(write)
    reader.join()
    os.close(read)
    assert received == b"x" * 1_000_000


def test_a_failed_stream_says_so_once():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with open(descriptor, "w") as stream:  # noqa: PTH123
        full = streams._text(stream, os.O_RDONLY, streams._stdout_failed, "strict")
        full.write("lost")
        with pytest.raises(OutputError, match="No space left"):
            full.flush()
        full.write("dropped")
        full.flush()


def piped(data: bytes) -> io.TextIOWrapper:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return open(read)  # noqa: PTH123


def test_standard_input_beside_a_prompt_is_told(capsys):
    with piped(b"notes\n") as stdin:
        assert gather_prompt("ask", [], stdin) == "notes\n\nask"
    assert "standard input was read" in capsys.readouterr().err
    with piped(b"notes\n") as stdin:
        assert gather_prompt("ask", [], stdin, read_stdin=True) == "notes\n\nask"
    with piped(b"notes\n") as stdin:
        assert gather_prompt("ask", [], stdin, read_stdin=False) == "ask"
    with piped(b"\xef\xbb\xbfnotes\r\n") as stdin:
        assert gather_prompt(None, [], stdin) == "notes"
    with piped(b"") as stdin:
        assert gather_prompt("ask", [], stdin) == "ask"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("prompt", "read", "found"), [("ask", None, "ask"), (None, None, "two"), ("ask", True, "two\n\nask")]
)
def test_a_file_that_a_loop_reads_is_left_to_it(tmp_path, capsys, prompt, read, found):
    (tmp_path / "lines").write_text("one\ntwo\n")
    with (tmp_path / "lines").open() as lines:
        os.lseek(lines.fileno(), 4, os.SEEK_SET)
        assert gather_prompt(prompt, [], lines, read_stdin=read) == found
        assert os.lseek(lines.fileno(), 0, os.SEEK_CUR) == (4 if found == "ask" else 8)
    assert ("at byte 4 of 8" in capsys.readouterr().err) == (found == "ask")
    with (tmp_path / "lines").open() as lines:
        assert gather_prompt("ask", [], lines) == "one\ntwo\n\nask"


def test_a_silent_standard_input_is_told(monkeypatch, capsys):
    monkeypatch.setattr(streams, "PATIENCE", 0.01)
    read, write = os.pipe()
    os.set_blocking(read, False)
    threading.Timer(0.1, lambda: (os.write(write, b"late"), os.close(write))).start()
    with open(read) as stdin:  # noqa: PTH123
        assert gather_prompt("ask", [], stdin, read_stdin=True) == "late\n\nask"
    assert capsys.readouterr().err == "dsv2: waiting for standard input; --no-stdin answers without it\n"


def test_an_endless_input_is_refused(monkeypatch):
    monkeypatch.setattr(streams, "LARGEST", 1 << 21)
    with pytest.raises(InputError, match="/dev/zero has more than 2 MiB"):
        gather_prompt("ask", [Path("/dev/zero")], io.StringIO(), read_stdin=False)
    with pytest.raises(InputError, match="/ cannot be read: Is a directory"):
        gather_prompt("ask", [Path("/")], io.StringIO(), read_stdin=False)


def test_a_descriptor_above_those_of_select_is_read(tmp_path):
    (tmp_path / "notes").write_text("notes")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert gather_prompt("ask", [tmp_path / "notes"], io.StringIO(), read_stdin=False) == "notes\n\nask"
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.slow
def test_a_loop_asks_every_question(tmp_path):
    (tmp_path / "questions").write_text("one\ntwo\n")
    loop = f'while read -r q; do "$@" "$q" || exit; done < {tmp_path}/questions'
    done = shell(loop, "run", "--json", "-n", "1")
    assert done.stdout.count(b"\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_keep_what_was_read(tmp_path, number):
    kept = tmp_path / "kept"
    command = [*DSV2, "run", "--cache", str(kept), "What is a dog? " * 60, "--temperature", "50", "-n", "1500"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=environment(), preexec_fn=heed_signals) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.read(1)
        child.send_signal(number)
        errors = child.communicate(timeout=60)[1]
    assert (child.returncode, errors) == (128 + number, NANO)
    assert kept.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_while_it_starts_end_it_without_a_traceback(number):
    command = [sys.executable, "-m", "dsv2_local", "run", QUESTION]
    for delay in (0.05, 0.08, 0.12, 0.2, 0.3, 0.4):
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=environment(), preexec_fn=heed_signals) as child:  # fmt: skip
            time.sleep(delay)
            child.send_signal(number)
            output, errors = child.communicate(timeout=60)
        assert child.returncode in (-number, 128 + number)
        assert (output, errors.removeprefix(NANO)) == (b"", b"")


@pytest.mark.slow
def test_a_reader_that_leaves_keeps_what_was_read(tmp_path):
    done = shell(
        '"$@" </dev/null | head -c 1 >&2; exit ${PIPESTATUS[0]}', "run", "--cache", str(tmp_path / "kept"), QUESTION
    )
    assert done.returncode == 141
    assert (tmp_path / "kept").stat().st_size


@pytest.mark.slow
def test_without_a_home_it_answers_and_sessions_say_why(tmp_path):
    nobody = ["unshare", "-U", "--map-user=12345", "--map-group=12345", "env", "-u", "HOME"]
    if subprocess.run([*nobody, "true"], capture_output=True, check=False).returncode:
        pytest.skip("user namespaces are not allowed here")
    kept = {name: value for name, value in environment().items() if not name.startswith("XDG_")}
    done = subprocess.run([*nobody, *DSV2, "run", QUESTION], env=kept, stdin=subprocess.DEVNULL, capture_output=True,
                          check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, NANO)
    done = subprocess.run([*nobody, *DSV2, "sessions"], env=kept, capture_output=True, check=False)
    said = b"dsv2: error: there is no home directory; set $HOME or $XDG_STATE_HOME\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_homes(monkeypatch, tmp_path):
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, "relative")  # which the standard says to ignore
    monkeypatch.setenv("HOME", str(tmp_path))
    assert homes.cache() == tmp_path / ".cache" / "dsv2-local"
    assert homes.state() == tmp_path / ".local" / "state" / "dsv2-local"
    measurements.save({"ram": 2.0})
    assert measurements.load(["ram"]) == {"ram": 2.0}
    monkeypatch.setenv("HOME", "also/relative")
    with pytest.raises(InputError, match=r"set \$HOME or \$XDG_STATE_HOME"):
        homes.state()
    measurements.save({"ram": 3.0})  # is no error, and keeps nothing
    assert measurements.load(["ram"]) == {}
    monkeypatch.setenv("HOME", "")
    assert homes.state() == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".local" / "state" / "dsv2-local"


@pytest.mark.slow
def test_a_directory_that_is_gone_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = shell(f'cd {gone} && rmdir {gone} && "$@" 2>&1 | tail -1', "run", QUESTION)
    assert done.stdout == b"dsv2: error: the current directory no longer exists; change to another one\n"


def ended(command, capsys) -> tuple[object, str]:
    with pytest.raises(SystemExit) as end:
        process.run(command)
    return end.value.code, capsys.readouterr().err


@pytest.fixture
def restored(monkeypatch):
    """`process.run` is for the whole process: streams, hooks and handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(streams, "repair", lambda: None)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_any_exception_is_one_line(restored, capsys, monkeypatch):
    def broken():
        raise KeyError("rope\ntheta")

    code, shown = ended(broken, capsys)
    assert code == 1
    assert shown.startswith("dsv2: error: KeyError: 'rope\\ntheta' in test_process.py:")
    assert "DSV2_TRACEBACK=1" in shown
    assert shown.count("\n") == 1

    def failing(error):
        def fail():
            raise error

        return ended(fail, capsys)

    assert failing(OSError(28, "No space left on device", "file")) == (
        1, "dsv2: error: No space left on device (file); DSV2_TRACEBACK=1 shows where\n"
    )  # fmt: skip
    assert "not enough memory" in failing(MemoryError())[1]
    for text in (
        "unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)",
        "can't allocate memory: you tried",
    ):
        assert "not enough memory" in failing(RuntimeError(text))[1]
    assert "RecursionError" in failing(RecursionError("too deep"))[1]
    assert failing(KeyboardInterrupt()) == (130, "")
    assert failing(SystemExit(5)) == (5, "")
    assert failing(InputError("no")) == (2, "dsv2: error: no\n")
    monkeypatch.setenv("DSV2_TRACEBACK", "1")
    assert "Traceback" in ended(broken, capsys)[1]


def test_an_exception_in_a_thread_is_one_line(restored, capsys):
    def broken():
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()

    code, shown = ended(broken, capsys)
    assert code == 0
    assert shown.startswith("dsv2: error: ZeroDivisionError")
    assert shown.count("\n") == 1


@pytest.mark.slow
def test_a_file_of_the_model_that_becomes_shorter_is_one_line(tmp_path):
    model = shutil.copytree(llm.bundled_model(), tmp_path / "model")
    code = (
        "import os, pathlib, sys\nfrom dsv2_local.commands import process\nfrom dsv2_local.llm import load\n"
        "def answer():\n    process.explain_lost_files()\n    model = load(sys.argv[1])\n"
        "    for path in pathlib.Path(sys.argv[1]).glob('*.safetensors'):\n        os.truncate(path, 4096)\n"
        "    list(model.generate('What is a dog?'))\n"
        "process.run(answer)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, check=False, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", process.LOST_FILE.encode())


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="the limit of processes does not hold for root")
def test_without_any_further_thread_it_answers(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

    def limited(*words: object) -> subprocess.CompletedProcess[bytes]:
        command = [*DSV2, *map(str, words)]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, preexec_fn=limit,
                              env=environment(OPENBLAS_NUM_THREADS="1"))  # fmt: skip

    done = limited("run", QUESTION, "--temperature", "0", "--threads", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == dsv2("run", QUESTION, "--temperature", 0).stdout
    assert b"only 1 thread of 3 can be started here" in done.stderr
    source = save_random(tmp_path / "source")
    done = limited("quantize", source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
