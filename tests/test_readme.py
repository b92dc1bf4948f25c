"""What README.md shows is true: its commands run, its Python runs, its conversation is what dsv2-nano says.

Every line of its sh blocks is in `RUN` or in `SKIPPED`, so that a new one cannot be forgotten.
"""

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import dsv2_local
from dsv2_local.commands.chat import Chat
from tests.models import save_random
from tests.serving import serving_nano
from tests.test_cli import environment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *(ROOT / "docs").glob("*.md")]

slow = pytest.mark.slow
# A command, and what its standard output matches.
RUN = [
    pytest.param(
        'dsv2 run "What is a violin?"', r"A violin is a bowed stringed instrument .+\.\n", id="run", marks=slow
    ),
    pytest.param('cat notes.txt | dsv2 run "Summarise this."', r".+", id="pipe", marks=slow),
    pytest.param('dsv2 run --json "Hello" | jq .decode_tok_s', r"\d+(\.\d+)?\n", id="json", marks=slow),
    pytest.param(
        'dsv2 run --json-schema person.json "Who made it?"', r'\{.*"name".*\}\n', id="json-schema", marks=slow
    ),
    pytest.param('dsv2 run --raw "Once upon a time"', r".+", id="raw", marks=slow),
    pytest.param('dsv2 run --cache book.cache -f book.txt "Who dies?"', r".+", id="cache", marks=slow),
    pytest.param("dsv2 run --batch questions.jsonl -o answers.jsonl", r"", id="batch", marks=slow),
    pytest.param(
        "dsv2 plan deepseek-v2 --vram 24GiB --ram 192GiB --context 128K",
        r"deepseek-v2, nf4, context 131,072 tokens .*GPU 0, 24\.0 GiB.*RAM, 192\.0 GiB.*decode about \d.*",
        id="plan",
    ),
    pytest.param("dsv2 inspect", r".*kv_lora_rank.*128.*", id="inspect", marks=slow),
    pytest.param("dsv2 quantize ./DeepSeek-V2-Chat v2 --verify", r".*", id="quantize", marks=slow),
]
SKIPPED = {
    "python3 -m venv .venv && . .venv/bin/activate && pip install . && dsv2 chat": "installs; tests/test_install.py",
    "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[test]' && tools/check": "runs these tests",
    "dsv2 chat": "interactive; tests/test_chat.py, and test_the_conversation_is_real",
    "dsv2 chat --session trip": "interactive; tests/test_sessions.py",
    "dsv2 chat -m v2-lite": "interactive",
    "dsv2 inspect --verify v2-lite": "has no v2-lite; tests/test_llm.py, tests/test_cli.py",
    "dsv2 bench --random-weights deepseek-v2": "takes the memory of a 236B model; tests/test_bench.py",
    "pip install '.[serve]'": "installs",
    "dsv2 serve -m v2-lite --context 32K": "does not end; tests/test_server_end.py",
    "export DSV2_HOST=http://127.0.0.1:8000": "tests/test_remote.py",
    "dsv2 quantize deepseek-ai/DeepSeek-V2-Lite-Chat v2-lite": "downloads; tests/test_hub.py",
}


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for found, text in fenced if found == language]


def commands() -> list[str]:
    """The lines of the sh blocks, without their comments."""
    lines = "".join(blocks("sh")).splitlines()
    return [line.split(" # ")[0].strip() for line in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the commands read."""
    (tmp_path / "notes.txt").write_text("A hammer is a hand tool. A river is a stream of water.\n")
    (tmp_path / "book.txt").write_text("The doctor went down to the river, and nobody saw him again.\n")
    (tmp_path / "questions.jsonl").write_text('{"prompt": "A dog is", "max_tokens": 4}\n')
    person = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"]}
    (tmp_path / "person.json").write_text(json.dumps(person | {"additionalProperties": False}))
    return tmp_path


def test_every_command_is_run_or_skipped_for_a_reason():
    run = [str(case.values[0]) for case in RUN]
    assert sorted(each for each in commands() if not each.startswith("curl ")) == sorted([*run, *SKIPPED])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_server_answers_curl():
    lines = [each for each in commands() if each.startswith("curl ")]
    with serving_nano() as (url, _):
        for line in lines:
            there = line.replace("http://127.0.0.1:8000", url)
            done = subprocess.run(["bash", "-c", there], capture_output=True, text=True, timeout=60)
            found = json.loads(done.stdout)
            assert not done.returncode, line
            assert "error" not in found, line
            assert any(found.get(name) for name in ("choices", "content", "message", "status")), line
    assert len(lines) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("command", "prints"), RUN)
def test_it_runs(command, prints, folder):
    if "jq" in command and shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    if "DeepSeek-V2-Chat" in command:
        save_random(folder / "DeepSeek-V2-Chat", hub_shape=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, check=False,
        text=True, cwd=folder, env=environment(PATH=path), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(prints, done.stdout, re.DOTALL), done.stdout
    if "--cache" in command:
        assert (folder / "book.cache").stat().st_mode & 0o777 == 0o600
    if "quantize" in command:
        assert json.loads((folder / "v2/manifest.json").read_text())


def test_the_python_runs():
    out = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(out):
        for code in blocks("python"):
            exec(compile(code, "README.md", "exec"), names)
    assert "A violin is a bowed stringed instrument" in out.getvalue()
    assert names["answer"].text, "of the last question of the batch"
    assert json.loads(names["call"].arguments)["city"] in ("Oslo", "Rome")
    assert tuple(names["logits"].shape) == (len(names["llm"].tokenizer.encode("Once upon")), 8192)


def test_the_call_in_a_comment_is_one_that_load_takes():
    (arguments,) = re.findall(r"load\(([^()]+)\)", "".join(blocks("python")))
    call = eval(f"lambda: signature.bind({arguments})", {"signature": inspect.signature(dsv2_local.load)})()
    assert call.arguments == {"model": "v2-lite", "context": 8192, "cache_dtype": "int8"}


def test_the_conversation_is_real():
    """Every line of the chat that README shows is what dsv2-nano prints; the speeds are another machine's."""
    (shown,) = blocks("")
    shown = shown.replace("dsv2: using the bundled dsv2-nano; choose another model with -m or $DSV2_MODEL\n", "")
    questions = iter(re.findall("^› (.*)$", shown, re.MULTILINE))
    out = io.StringIO()

    def read(prompt: str) -> str:
        question = next(questions, None)
        if question is None:
            raise EOFError
        out.write(f"{prompt}{question}\n")
        return question

    console = Console(file=out, width=120, highlight=False)
    Chat(dsv2_local.load(device="cpu"), None, {}, console, read).loop()
    speeds = re.compile(r"[\d,.]+ tok/s")
    printed = [line.rstrip() for line in speeds.sub("N tok/s", out.getvalue()).splitlines()]
    assert printed == speeds.sub("N tok/s", shown).splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent != ROOT / "examples" else "examples")
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)):
        if re.match(r"https?:", link):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            assert heading in {anchor(line) for line in target.read_text().splitlines() if line.startswith("#")}, link


def anchor(heading: str) -> str:
    """The fragment by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower()).replace(" ", "-")


def test_the_check_that_the_project_runs_is_the_one_of_the_readme():
    """`.ci/run` evaluates README's first line that names tools/check."""
    line = next(line for line in README.splitlines() if "tools/check" in line)
    assert line in SKIPPED
