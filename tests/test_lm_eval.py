"""EleutherAI's evaluation harness against the server: its figures are those of the logits.

It brings pandas, pyarrow and scikit-learn, so no extra of this package asks for it: `pip install 'lm-eval[api]'`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsv2_local.llm import LLM
from tests.serving import serving_nano

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is not installed")]

KINDS = {
    "instrument": ["violin", "piano", "flute", "drum", "trumpet"], "animal": ["dog", "horse", "cow", "rabbit", "wolf"],
    "tree": ["oak", "birch", "maple", "pine", "willow"], "tool": ["hammer", "saw", "chisel", "file", "rake"],
    "vehicle": ["car", "bus", "truck", "bicycle", "tank"], "garment": ["coat", "shirt", "skirt", "sweater", "vest"],
}  # fmt: skip
CONTEXT = "<｜begin▁of▁sentence｜>User: What kind of thing is a {}?\n\nAssistant:"
CHOICES = [f"A {{}} is a kind of {kind}." for kind in KINDS]
COMMON = {
    "dataset_path": "json", "output_type": None, "test_split": "train", "doc_to_text": CONTEXT.format("{{word}}"),
    "metadata": {"version": 1},
}  # fmt: skip


def words() -> list[dict[str, Any]]:
    """One document for each word, with the answers to choose from and the number of the right one."""
    return [
        {"word": word, "answers": [choice.format(word) for choice in CHOICES], "kind": number}
        for number, words in enumerate(KINDS.values())
        for word in words
    ]


def write_tasks(folder: Path) -> list[str]:
    """Write a data set and a task of each type; returns their names."""
    data = folder / "words.json"
    data.write_text("\n".join(map(json.dumps, words())))
    types: dict[str, dict[str, Any]] = {
        "multiple_choice": {
            "doc_to_choice": "answers", "doc_to_target": "kind", "metric_list": [{"metric": "acc"}],
        },
        "loglikelihood_rolling": {
            "doc_to_target": CONTEXT.format("{{word}}") + " I do not know.",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "generate_until": {
            "doc_to_target": "{{word}}", "generation_kwargs": {"until": ["."], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, own in types.items():
        task = {**COMMON, "task": name, "output_type": name, "dataset_kwargs": {"data_files": str(data)}, **own}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return list(types)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Iterator[tuple[LLM, dict[str, Any], dict[str, list[dict[str, Any]]]]]:
    """The model, the results, and the samples of each task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tasks = write_tasks(folder)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "no_proxy": "127.0.0.1"}
    with serving_nano() as (url, service):
        httpx.get(f"{url}/tokenizer_info", timeout=60).raise_for_status()  # the model is loaded
        model = f"model=dsv2-nano,base_url={url}/v1/completions,num_concurrent=4,max_length=2048"
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model,
            "--tasks", ",".join(tasks), "--include_path", str(folder), "--output_path", str(folder / "out"),
            "--log_samples", "--batch_size", "5",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=os.environ | offline, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert "remote tokenizer" in done.stdout + done.stderr
        (results,) = (folder / "out").rglob("results_*.json")
        samples = {}
        for task in tasks:
            (file,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
            samples[task] = [json.loads(line) for line in file.read_text().splitlines()]
        assert service.loaded
        yield service.loaded, json.loads(results.read_text())["results"], samples


def likelihood(llm: LLM, context: str, continuation: str) -> tuple[float, bool]:
    """The log likelihood of a continuation, and whether it is the greedy one."""
    ids, start = llm.tokenizer.encode(context + continuation, bos=False), len(llm.tokenizer.encode(context, bos=False))
    rows = llm.logits(ids).log_softmax(-1)
    places = range(max(1, start), len(ids))
    values = [float(rows[at - 1, ids[at]]) for at in places]
    return sum(values), all(value == float(rows[at - 1].max()) for at, value in zip(places, values, strict=True))


def test_log_likelihoods_and_accuracy_are_those_of_the_logits(found):
    llm, results, samples = found
    right = 0
    for sample in samples["multiple_choice"]:
        word, kind = sample["doc"]["word"], sample["doc"]["kind"]
        wanted = [likelihood(llm, CONTEXT.format(word), " " + choice.format(word)) for choice in CHOICES]
        got = [(float(value), greedy == "True") for ((value, greedy),) in sample["resps"]]
        assert got == wanted
        right += max(range(len(CHOICES)), key=lambda number: wanted[number][0]) == kind
    assert len(samples["multiple_choice"]) == len(words())
    assert results["multiple_choice"]["acc,none"] == right / len(words())
    assert right > len(words()) / len(CHOICES)


def test_rolling_log_likelihoods_are_those_of_the_logits(found):
    llm, _, samples = found
    begin = llm.tokenizer.eos_token  # the harness takes a BOS whose id is 0 for none
    for sample in samples["loglikelihood_rolling"]:
        text = CONTEXT.format(sample["doc"]["word"]) + " I do not know."
        assert float(sample["resps"][0][0]) == likelihood(llm, begin, text)[0]


def test_generated_texts_are_those_of_the_python_api(found):
    llm, _, samples = found
    for sample in samples["generate_until"]:
        ids = llm.tokenizer.encode(CONTEXT.format(sample["doc"]["word"]), bos=False)
        generation = llm.generate(ids, temperature=0, max_tokens=12, stop=[".", llm.tokenizer.eos_token])
        list(generation)
        assert sample["resps"] == [[generation.text]]
