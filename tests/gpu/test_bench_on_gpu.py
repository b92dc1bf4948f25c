"""`dsv2 bench` of dsv2-nano on a GPU: every mode, captured parts, and a replayed trace."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv2_local import cli, llm
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.offload.plan import CONTEXT_BYTES, make_plan
from dsv2_local.offload.plan_request import Machine, Mode
from dsv2_local.offload.trace import Trace

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytest.importorskip("triton")

LAYERS, EXPERTS, PER_TOKEN = 5, 24, 4
LENGTHS = ("--prompt", "20,200", "--decode", "8", "--context", "0,300")


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys) -> Callable[..., dict[str, Any]]:
    """Run the command on GPU 0 with room for `slots` experts; returns the JSON object that it prints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DSV2_MODEL", raising=False)

    def run(slots: int, *arguments: object) -> dict[str, Any]:
        request = replace(llm.load(device="cpu", context=512).plan.request, context=308, experts=Mode.STREAM)
        made = make_plan(replace(request, cache_dtype=CacheDtype.BF16), Machine((1 << 34,), 1 << 40))
        fixed = sum(size for name, size in made.gpus[0].parts.items() if name not in ("driver", "expert slots"))
        vram = CONTEXT_BYTES + fixed + slots * made.expert_bytes + 1
        arguments = ("--json", "--device", "cuda:0", "--vram", vram, *LENGTHS, *arguments)
        cli.app(["bench", *map(str, arguments)], standalone_mode=False)
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


@pytest.mark.parametrize("mode", ["hybrid", "stream", "cpu", "gpu"])
def test_every_mode_is_measured(bench, mode):
    result = bench(120 if mode == "gpu" else 20, "--experts", mode)
    assert (result["plan"]["mode"], result["plan"]["slots"]) == (mode, {"gpu": 120, "cpu": 0}.get(mode, 20))
    assert ("routed" in result["parts"]) == (mode == "gpu")
    assert min(result["parts"][name] for name in ("attention", "dense", "router", "shared", "head")) > 0
    whole = LAYERS * PER_TOKEN * result["plan"]["expert_bytes"]
    for run in result["decode"]:
        assert run["tok_s"] > 0
        if mode != "gpu":
            assert run["retries"] == 0
            assert run["link_bytes"] + run["cpu_bytes"] == pytest.approx((1 - run["hit_rate"]) * whole)
    memory = result["memory"]
    assert memory["gpu_peak_bytes"][0] > 1 << 20
    assert memory["gpu_used_bytes"][0] >= memory["gpu_used_before_bytes"][0]


def test_a_trace_decides_the_hits_of_captured_steps(bench, tmp_path):
    file = tmp_path / "skewed.trace"
    Trace("nano", LAYERS, EXPERTS, [[[1, 5, 9, 13]] * LAYERS] * 20).save(file)
    result = bench(LAYERS * PER_TOKEN, "--experts", "stream", "--trace", file)
    assert [run["hit_rate"] for run in result["decode"]] == [1.0, 1.0]
    random = bench(LAYERS * PER_TOKEN, "--experts", "stream")
    assert max(run["hit_rate"] for run in random["decode"]) < 1.0
