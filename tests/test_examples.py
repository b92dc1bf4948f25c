"""Every script in examples/ runs as it stands, says what it is about, and is listed for the reader.

A new script is tested by being there; add what it prints to `PRINTS`.
"""

import ast
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
# Patterns that the output of each script has, in this order.
PRINTS = {
    "chat": [
        r"> What is a hammer\?\nA hammer is a hand tool",
        r"> What is a river\?\nA river is a large natural stream of water\.\n",
        r"  \[\d+ prompt tokens, [1-9]\d* of them reused\]",
    ],
    "logprobs": [
        r"' A' +\d+\.\d%   ' A' \d+\.\d%, '",
        r"'\(end\)' ",
        r"answer: A .+\.\n",
        r"perplexity: \d\.\d\d per token, over \d+ tokens",
    ],
    "plan": [
        r"GPU 0: 2[34]\.\d of 24 GiB",
        r"RAM: \d+\.\d of 192 GiB",
        r"[\d,]+ of 9,440 have a slot in GPU memory, mode hybrid",
        r"decode: about \d+\.\d tok/s",
        r"8 GiB of RAM and no GPU: .*--ram 11GiB",
    ],
    "sessions": [
        r"A hammer is a hand tool.*\n  prompt (\d+) tokens, 0 of them from the cache",
        r"cache of (\d+) tokens and continues",
        r"A violin is a bowed stringed instrument.*\n  prompt \d+ tokens, [1-9]\d* of them from the cache",
        r"A river is a large natural stream.*\n  prompt \d+ tokens, [1-9]\d* of them from the cache",
    ],
    "stream": [
        r"A violin is a bowed stringed instrument\n",
        r"prefill: \d+ tokens at [\d,]+ tok/s\ndecode: \d+ tokens at [\d,]+ tok/s\nfinish reason: stop\n",
        r"stopped after \d+ tokens: 'A river",
    ],
}


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_it_runs_and_prints_what_it_should(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    out, err = capsys.readouterr()
    assert out.strip()
    assert err == ""
    position = 0
    for pattern in PRINTS.get(example.stem, []):
        found = re.compile(pattern).search(out, position)
        assert found, f"{pattern!r} is not in what follows:\n{out[position:]}"
        position = found.end()


def test_it_says_in_its_first_line_what_it_shows(example):
    docstring = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")))
    assert docstring
    assert docstring.splitlines()[0].endswith(".")


def test_it_is_listed(example):
    assert f"| [{example.name}]({example.name}) | " in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_expectations_belong_to_scripts_that_exist():
    assert set(PRINTS) <= {path.stem for path in EXAMPLES}
