"""The `dsv2` command as a user runs it, with the bundled model: pipes, exit codes, one-line errors."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv2_local.cli import GenerationOptions
from dsv2_local.commands.run import run
from dsv2_local.commands.run_options import RunOptions, gather_prompt
from dsv2_local.errors import InputError
from tests.models import heed_signals, save_random
from tests.test_chat import FakeLLM

DSV2 = [sys.executable, "-c", "from dsv2_local.cli import main; main()"]
QUESTION = "What is a dog?"


def environment(**extra: str) -> dict[str, str]:
    """The environment without settings that would change the output: the user's model and colours."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DSV2_MODEL", "FORCE_COLOR")}
    return {**kept, "COLUMNS": "100", **extra}


def dsv2(*args: object, stdin: bytes | None = b"", **extra: str) -> subprocess.CompletedProcess[bytes]:
    command = [*DSV2, *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=120, env=environment(**extra))


@pytest.fixture(scope="module")
def answer() -> str:
    """The bundled model's answer to QUESTION, from a plain `dsv2 run`."""
    done = dsv2("run", QUESTION, "--temperature", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == done.stdout.decode().strip() + "\n"
    return done.stdout.decode().strip()


class TerminalText(io.StringIO):
    """Text written to a terminal."""

    def isatty(self) -> bool:
        return True


def printed(answer: str, out: io.StringIO | None = None, **options: Any) -> str:
    """What `dsv2 run` prints if the model answers with `answer`, in a pipe unless `out` is a terminal."""
    out = out or io.StringIO()
    run(FakeLLM(list(answer)), RunOptions("question", **options), out)
    return out.getvalue()


def test_an_answer_ends_with_one_newline():
    assert printed("a") == printed("a\n") == printed("a", TerminalText()) == printed("a", stream=False) == "a\n"
    assert printed("") == "\n"
    assert printed("a", newline=False) == "a"
    assert printed("a", json=True).endswith("}\n")
    assert printed("a", json=True, newline=False).endswith("}")


def test_an_answer_does_not_control_the_terminal():
    hostile = "a\x1b]0;title\x07\x1b[2J\x9b2J\x7f\tb\n"
    shown = "a]0;title[2J2J\tb\n"
    assert printed(hostile, TerminalText()) == printed(hostile, TerminalText(), stream=False) == shown
    assert printed(hostile) == printed(hostile, stream=False) == hostile  # a pipe gets all of it
    line = printed(hostile, TerminalText(), json=True)
    assert line.removesuffix("\n").isprintable()
    assert json.loads(line)["text"] == hostile


def test_raw_keeps_every_character(tmp_path):
    def gathered(*files: str, prompt: str | None = None, raw: bool = True) -> str:
        paths = [tmp_path / str(number) for number in range(len(files))]
        for path, text in zip(paths, files, strict=True):
            path.write_bytes(text.encode())
        return gather_prompt(prompt, paths, TerminalText(), raw)

    assert gathered(prompt="def f():\n") == "def f():\n"
    assert gathered(prompt="def f():\n", raw=False) == "def f():"
    assert gathered("x\n\n\n") == "x\n\n\n"
    assert gathered(prompt=" \n") == " \n"
    assert gathered("one\n", "two", "", "three\r\n\r\n", "four\n\n\n", prompt="five\r\n") == (
        "one\n\ntwo\n\nthree\r\n\r\nfour\n\n\nfive\r\n"
    )
    with pytest.raises(InputError, match="there is no prompt"):
        gathered(prompt="")


def test_an_empty_system_message_is_none():
    llm = FakeLLM(["a"], ["b"])
    run(llm, RunOptions("question", system=""), io.StringIO())
    assert llm.asked[0] == [{"role": "user", "content": "question"}]
    RunOptions("text", raw=True, system="")  # and does not exclude --raw


def test_a_seed_is_drawn_and_shown(capsys):
    seeds = [GenerationOptions(seed=-1).given()["seed"] for _ in range(3)]
    assert len(set(seeds)) == 3
    assert capsys.readouterr().err.split() == [
        word for seed in seeds for word in ("dsv2:", "drew", "--seed", str(seed))
    ]
    assert GenerationOptions(seed=7).given() == {"seed": 7}
    assert capsys.readouterr().err == ""
    assert json.loads(printed("a", json=True, generation={"seed": 7}))["seed"] == 7


def test_stdout_is_the_answer_alone(answer):
    assert answer == answer.strip() != ""
    assert "dsv2" not in answer


@pytest.mark.slow
def test_the_bundled_model_is_announced_on_stderr_alone():
    done = dsv2("run", QUESTION, "--max-tokens", 1)
    assert done.stderr.decode() == "dsv2: using the bundled dsv2-nano; choose another model with -m or $DSV2_MODEL\n"


@pytest.mark.slow
def test_stdin_and_files_come_before_the_argument(answer, tmp_path):
    assert dsv2("run", stdin=QUESTION.encode() + b"\n").stdout.decode() == answer + "\n"
    (tmp_path / "first.txt").write_text("one\n")
    done = dsv2("run", "--raw", "--json", "-n", 1, "-f", tmp_path / "first.txt", "three", stdin=b"two\n")
    alone = dsv2("run", "--raw", "--json", "-n", 1, "one\n\ntwo\n\nthree")
    assert json.loads(done.stdout)["prompt_tokens"] == json.loads(alone.stdout)["prompt_tokens"]
    assert json.loads(done.stdout)["text"] == json.loads(alone.stdout)["text"]


@pytest.mark.slow
def test_not_streaming_prints_the_same(answer):
    assert dsv2("run", "--no-stream", QUESTION, "--temperature", 0).stdout.decode() == answer + "\n"


def test_json_is_one_object(answer):
    done = dsv2("run", "--json", "--logprobs", 2, "--temperature", 0, QUESTION)
    told = json.loads(done.stdout)
    assert told["text"] == answer
    assert told["model"] == "dsv2-nano"
    assert told["finish_reason"] == "stop"
    assert told["completion_tokens"] == len(told["logprobs"])
    assert all(len(step["top_logprobs"]) == 2 for step in told["logprobs"])
    assert told["logprobs"][0]["logprob"] == told["logprobs"][0]["top_logprobs"][0]["logprob"]


@pytest.mark.slow
def test_seeds_and_stop_strings(answer):
    def sampled(seed: int) -> bytes:
        return dsv2("run", QUESTION, "--temperature", 1.5, "--seed", seed, "-n", 12).stdout

    assert sampled(3) == sampled(3)
    word = answer.split()[2]
    assert (
        dsv2("run", QUESTION, "--temperature", 0, "--stop", word).stdout.decode() == answer[: answer.index(word)] + "\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "stdin", "code", "said"),
    [
        (["run"], b"", 2, "there is no prompt"),
        (["run"], b"y\n" * 50_000, 2, "the context holds 2,048"),
        (["run"], b"ab\xffcd", 2, "byte 2 is 0xff"),
        (["run", "a\udcffb"], b"", 2, "the prompt is not Unicode text: character 1 is byte 0xff"),
        (["run", "hi", "--system", "a\udcffb"], b"", 2, "--system is not Unicode text: character 1 is byte 0xff"),
        (["run", "hi", "--stop", "a\udcffb"], b"", 2, "--stop is not Unicode text: character 1 is byte 0xff"),
        (["run"], b"ab\0cd", 2, "byte 2 is NUL"),
        (["run", "hi", "--temperature", "-1"], b"", 2, "temperature must be at least 0"),
        (["run", "hi", "--context", "100000"], b"", 2, "between 2 and the model's 2,048"),
        (["run", "hi", "--dtype", "float16"], b"", 2, "float16 overflows"),
        (["run", "hi", "--cache-type", "fp8"], b"", 2, "cache type 'fp8' is not one of bf16, int8"),
        (["run", "hi", "-f", "no-such-file"], b"", 2, "no-such-file cannot be read"),
        (["run", "hi", "--raw", "--system", "x"], b"", 2, "drop one of them"),
        (["run", "hi", "-m", "no-such-model"], b"", 2, "neither a directory nor a hub repository"),
        (["run", "hi", "-m", "tests"], b"", 1, "dsv2 quantize"),
        (["inspect", "tests"], b"", 1, "no config.json"),
        (["inspect", "--verify", "tests"], b"", 1, "is not a converted checkpoint"),
        (["plan", "a" * 300], b"", 1, "cannot be read: File name too long"),
        (["quantize", "tests", "out"], b"", 1, "no config.json"),
        (["quantize", "tests", "out", "--recipe", "q4"], b"", 2, "--recipe 'q4' is not one of nf4, mixed, int8, bf16"),
    ],
)
def test_mistakes_are_one_line_and_a_code(args, stdin, code, said):
    done = dsv2(*args, stdin=stdin)
    errors = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (code, b"")
    assert said in errors[-1]
    assert errors[-1].startswith("dsv2: error: ")
    assert not any("Traceback" in line for line in errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["plan", "deepseek-v2-lite", "--ram", "64GiB"], ["inspect"], ["inspect", "--json", "--verify"]]
)
def test_tables_that_nobody_reads_are_no_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [*DSV2, *command], stdin=subprocess.DEVNULL, stdout=closed, stderr=subprocess.PIPE, check=False,
            env=environment(),
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -c 1; echo -n " ${PIPESTATUS[0]}"', "-", *DSV2, "run", QUESTION],
        capture_output=True, check=False, stdin=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    assert done.stdout.decode().split() == [done.stdout.decode()[0], "141"]
    assert "Traceback" not in done.stderr.decode()
    assert "Exception" not in done.stderr.decode()


@pytest.mark.slow
def test_ctrl_c_keeps_what_came_and_ends_quietly():
    command = [*DSV2, "run", QUESTION, "--temperature", "100", "--seed", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                          env=environment(), preexec_fn=heed_signals) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert first + rest
    assert process.returncode in (130, 0)  # 0: the answer had ended before the signal arrived
    assert b"Traceback" not in errors


@pytest.mark.slow
def test_chat_without_a_terminal_answers_like_run(answer):
    done = dsv2("chat", "--temperature", 0, stdin=QUESTION.encode())
    assert done.stdout.decode() == answer + "\n"
    assert "not a terminal" in done.stderr.decode()


@pytest.mark.slow
def test_the_model_comes_from_the_environment(tmp_path):
    assert b"no-such" in dsv2("run", "hi", DSV2_MODEL="no-such").stderr


@pytest.mark.slow
def test_quantize_inspect_and_verify(tmp_path):
    source, out = save_random(tmp_path / "source"), tmp_path / "out"
    done = dsv2("quantize", source, out, "--verify")
    assert done.returncode == 0, done.stderr
    assert b"routed experts" in done.stdout
    assert b"bits per weight" in done.stderr
    again = dsv2("quantize", source, out)
    assert again.returncode == 1
    assert b"--force" in again.stderr
    told = json.loads(dsv2("inspect", out, "--json").stdout)
    assert told["converted"]
    assert told["recipe"] == "nf4"
    assert told["bytes"] == told["recipes"]["nf4"]
    before = json.loads(dsv2("inspect", source, "--json").stdout)
    assert not before["converted"]
    assert before["kinds"] == told["kinds"]
    stored = sum(path.stat().st_size for path in Path(out).glob("*.safetensors"))
    headers = sum(1 for _ in Path(out).glob("*.safetensors")) * 4096 * 2
    assert told["bytes"] <= stored <= told["bytes"] + headers
    assert "not converted" in dsv2("inspect", source).stdout.decode()


@pytest.mark.slow
def test_inspect_shows_the_bundled_model():
    table = dsv2("inspect").stdout.decode()
    for word in ("kv_lora_rank", "routed experts", "KV cache per token", "group_limited_greedy"):
        assert word in table


def test_version_and_completion():
    assert dsv2("--version").stdout.startswith(b"dsv2-local 0.")
    shown = dsv2("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", SHELL="/bin/bash")
    assert b"complete" in shown.stdout


def test_an_answer_is_json_that_a_schema_describes(tmp_path):
    schema, bad, missing = tmp_path / "schema.json", tmp_path / "bad.json", tmp_path / "missing.json"
    schema.write_text(
        '{"type": "object", "properties": {"dog": {"enum": ["big"]}}, "required": ["dog"], '
        '"additionalProperties": false}'
    )
    bad.write_text('{"uniqueItems": true}')
    done = dsv2("run", QUESTION, "--json-schema", schema)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"dog": "big"}
    for path, named in ((bad, "uses uniqueItems"), (missing, "cannot be read"), (tmp_path, "cannot be read")):
        done = dsv2("run", QUESTION, "--json-schema", path)
        assert done.returncode == 2
        assert named in done.stderr.decode().splitlines()[-1]
        assert str(path) in done.stderr.decode()
        assert len(done.stderr.splitlines()) == 1
