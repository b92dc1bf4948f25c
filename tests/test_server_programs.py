"""Programs that are not Python libraries of the tests: simonw's `llm`, and Vercel's AI SDK on Node.

They run if `DSV2_CLIENTS` names a folder with them. To make one:

    python -m venv clients && clients/bin/pip install llm
    npm install --prefix clients ai@6 @ai-sdk/openai-compatible@2
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dsv2_local.generation import Chunk
from dsv2_local.server.service import Service
from tests.serving import WrittenAnswer, call, serving_written

CLIENTS = Path(os.environ.get("DSV2_CLIENTS", "clients-are-not-installed")).absolute()
LLM = CLIENTS / "bin" / "llm"
NODE_MODULES = CLIENTS / "node_modules"
NODE = shutil.which("node")
QUESTION = "What is a violin?"

pytestmark = pytest.mark.slow
needs_llm = pytest.mark.skipif(not LLM.exists(), reason="no `llm` in $DSV2_CLIENTS")
needs_node = pytest.mark.skipif(not (NODE and NODE_MODULES.exists()), reason="no Node, or no packages in $DSV2_CLIENTS")


def expected(service: Service, **options: object) -> str:
    assert service.loaded
    generation = service.loaded.chat([{"role": "user", "content": QUESTION}], **options)
    list(generation)
    return generation.text


def ask(home: Path, url: str, api: str, *arguments: str) -> str:
    """What `llm` prints; `api` is a line of its file of models, besides the usual ones."""
    lines = [
        "model_id: dsv2", "model_name: any", f"api_base: {url}/v1", "supports_tools: true",
        "supports_schema: true", api,
    ]  # fmt: skip
    (home / "extra-openai-models.yaml").write_text("- " + "\n  ".join(filter(None, lines)) + "\n")
    command = [LLM, "-m", "dsv2", "--key", "none", *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LLM_USER_PATH": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


APIS = pytest.mark.parametrize("api", ["", "responses: true"])


@needs_llm
@APIS
def test_llm_streams_an_answer_and_goes_on(server: tuple[str, Service], tmp_path: Path, api: str) -> None:
    url, service = server
    assert ask(tmp_path, url, api, QUESTION, "-o", "temperature", "0") == expected(service, temperature=0)
    assert ask(tmp_path, url, api, "-c", "And a viola?", "-o", "max_tokens", "5")


@needs_llm
@APIS
def test_llm_gets_an_object_of_a_schema(server: tuple[str, Service], tmp_path: Path, api: str) -> None:
    schema = {
        "type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"],
        "additionalProperties": False,
    }  # fmt: skip
    answer = ask(tmp_path, server[0], api, "--schema", json.dumps(schema), "Which colour?")
    assert json.loads(answer)["colour"] in ("red", "blue")


@needs_llm
@APIS
def test_llm_runs_a_tool(tmp_path: Path, api: str) -> None:
    answers = WrittenAnswer(call(0, "llm_version", "{}")), WrittenAnswer([Chunk("It is "), Chunk("new.")])
    with serving_written(*answers) as (url, written):
        assert ask(tmp_path, url, api, "-T", "llm_version", "Which version?") == "It is new."
    assert [each["function"]["name"] for each in written.asked[0][1]["tools"]] == ["llm_version"]
    question, made, result = written.asked[1][0]
    assert question["role"] == "user"
    assert made["tool_calls"][0]["id"] == result["tool_call_id"] == "call_0"
    assert result["role"] == "tool"
    assert result["content"]


@needs_node
def test_the_ai_sdk(server: tuple[str, Service], tmp_path: Path) -> None:
    url, service = server
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    script = shutil.copy(Path(__file__).parent / "ai_sdk.mjs", tmp_path)
    done = subprocess.run([str(NODE), script, url], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    text = expected(service, temperature=0, max_tokens=8)
    (city,) = set(found["cities"])
    assert found == {
        "text": text, "reason": "length", "streamed": text, "streamedReason": "length", "tokens": 8,
        "cities": found["cities"], "results": [f"rain in {city}"] * len(found["cities"]), "callReason": "tool-calls",
        "structured": {"colour": found["structured"]["colour"]},
    }  # fmt: skip
