"""`dsv2 bench` on simulated devices. No test depends on a time, since the machine may be busy."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dsv2_local import cli, workstation
from dsv2_local.architectures import released
from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.families import parse_config
from dsv2_local.commands.bench import gpu_case, gpu_rates, gpu_timing
from dsv2_local.errors import InputError, PlanError
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.kernels.graphs import GraphMemory
from dsv2_local.machine import measurements
from dsv2_local.offload import calibration
from dsv2_local.offload.balance import Costs, Watch
from dsv2_local.offload.offloaded_experts import OffloadedExperts
from dsv2_local.offload.pinned import PinnedArena
from dsv2_local.offload.plan import CONTEXT_BYTES, make_plan
from dsv2_local.offload.plan_request import Machine, Mode, PlanRequest
from dsv2_local.offload.simulated_device import SimulatedDevice
from dsv2_local.offload.sizes import GIB
from dsv2_local.offload.trace import Trace
from dsv2_local.quant.convert import convert
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime import gpu_step, placement
from dsv2_local.runtime.random_weights import Builder, build, first_layers
from tests.models import TINY, save_random
from tests.test_bench import quick as quick
from tests.test_bench import write_config

LAYERS, EXPERTS, PER_TOKEN = 5, 8, 3
CONTEXT = 74
COUNTED = {"hit_rate", "link_bytes", "cpu_bytes", "fetch_seconds", "host_seconds", "streamed_layers", "retries"}
COMPARED = {"bound", "bound_seconds", "bound_fraction", "predicted_tok_s", "measured_over_predicted"}


def config(**changes: Any) -> ModelConfig:
    return parse_config({"model_type": "deepseek_v2", **TINY, "num_hidden_layers": LAYERS, **changes})


def request(
    mode: Mode = Mode.HYBRID,
    architecture: ModelConfig | None = None,
    context: int = CONTEXT,
    cache: CacheDtype = CacheDtype.BF16,
) -> PlanRequest:
    return PlanRequest(architecture or config(), Recipe.NF4, context, cache, mode)


def device(
    slots: int, layers: int = LAYERS, cache: CacheDtype = CacheDtype.BF16, context: int = CONTEXT
) -> SimulatedDevice:
    """A device with room for `slots` experts of the tiny model's first layers, and one byte more."""
    wanted = request(architecture=first_layers(config(), layers), context=context, cache=cache)
    plan = make_plan(wanted, Machine((2 * GIB,), 1 << 40))
    parts = plan.gpus[0].parts
    fixed = sum(size for name, size in parts.items() if name not in ("driver", "expert slots"))
    return SimulatedDevice(capacity=fixed + slots * plan.expert_bytes + 1)


def fp32_device(slots: int) -> SimulatedDevice:
    """The same with the KV cache of the torch reference."""
    return device(slots, cache=CacheDtype.FP32)


@pytest.fixture
def small(quick, monkeypatch, tmp_path):
    """Short measurements, and fixed costs of an expert."""
    monkeypatch.setattr(gpu_rates, "LINK_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_rates, "MEMORY_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_rates, "MATRIX", 64)
    monkeypatch.setattr(gpu_rates, "CPU_MATRIX", 64)
    monkeypatch.setattr(calibration, "measure", lambda *_: Costs(fetch=1.0, read=1.0, token=0.1))
    monkeypatch.setattr(Watch, "correction", lambda self: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bench(small, monkeypatch, capsys) -> Callable[..., dict[str, Any]]:
    """Run the command on a simulated device in this process; returns the JSON object that it prints."""

    def run(on: SimulatedDevice, *arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(workstation, "find_devices", lambda names: [] if names == "cpu" else [on])
        cli.app(["bench", "--json", *map(str, arguments)], standalone_mode=False)
        printed = capsys.readouterr()
        result: dict[str, Any] = json.loads(printed.out)
        return {**result, "stderr": printed.err}

    return run


def options(tmp_path: Path, *more: object, **changes: Any) -> tuple[object, ...]:
    path = write_config(tmp_path / "small", num_hidden_layers=LAYERS, **changes)
    return ("--random-weights", path, "--prompt", "5,40", "--decode", 4, "--context", "0,70", "--parallel", 1, *more)


@pytest.mark.parametrize(("mode", "slots"), [("hybrid", 7), ("stream", 7), ("cpu", 7), ("auto", 32)])
def test_every_mode_is_measured(bench, tmp_path, mode, slots):
    on = device(slots)
    result = bench(on, *options(tmp_path, "--experts", mode))
    expected = "gpu" if mode == "auto" else mode
    assert result["plan"]["mode"] == expected
    assert result["plan"]["slots"] == (0 if mode == "cpu" else slots)
    assert (result["model"]["name"], result["device"], result["routing"]) == (
        "random small",
        "simulated",
        "random tokens",
    )
    offloaded = expected != "gpu"
    for runs in result["prefill"], result["decode"]:
        for run in runs:
            assert run.keys() >= COMPARED
            assert (run.keys() >= COUNTED) == offloaded
            assert min(run["tok_s"], run["bound_fraction"], run["predicted_tok_s"]) > 0
    assert [run["tokens"] for run in result["prefill"]] == [5, 40]
    assert [run["context"] for run in result["decode"]] == [0, 70]
    assert set(result["parts"]) >= {"attention", "dense", "router", "shared", "head"}
    assert ("routed" in result["parts"]) == (not offloaded)
    assert sum(result["parts"].values()) == pytest.approx(1 / result["decode"][0]["tok_s"])
    memory = result["memory"]
    assert memory["gpu_peak_bytes"][0] <= memory["gpu_planned_bytes"][0]
    assert "extrapolated" not in result
    assert on._threads[0].is_alive() is False  # closed


@pytest.mark.parametrize(("mode", "slots"), [("hybrid", 7), ("auto", 32)])
def test_several_sequences_are_decoded_in_a_step(bench, tmp_path, mode, slots):
    """With 16 sequences nearly all experts are used, so that a token needs fewer bytes than alone."""
    result = bench(device(slots, context=16 * 64), *options(tmp_path, "--experts", mode, "--parallel", "1,4,16"))
    assert [run["sequences"] for run in result["parallel"]] == [1, 4, 16]
    offloaded = mode != "auto"
    for run in result["parallel"]:
        assert run.keys() >= {"tok_s_each", "random_experts_per_layer", "bound", "bound_seconds", "bound_fraction"}
        assert run["tok_s_each"] == pytest.approx(run["tok_s"] / run["sequences"])
        assert run["bound_fraction"] == pytest.approx(run["bound_seconds"] * run["tok_s_each"])
        assert (run.keys() >= COUNTED) == offloaded
    if offloaded:
        moved = [run["link_bytes"] + run["cpu_bytes"] for run in result["parallel"]]
        assert moved[2] < moved[0]


@pytest.mark.parametrize(("mode", "fetched", "computed"), [("stream", 1, 0), ("cpu", 0, 1), ("hybrid", 0.5, 0.5)])
def test_bytes_over_the_link_and_by_the_cpu_are_the_bytes_that_miss(bench, tmp_path, mode, fetched, computed):
    result = bench(device(7), *options(tmp_path, "--experts", mode))
    whole = (LAYERS - 1) * PER_TOKEN * result["plan"]["expert_bytes"]
    rates = result["machine"]
    for run in result["decode"]:
        missed = run["link_bytes"] + run["cpu_bytes"]
        assert missed == pytest.approx((1 - run["hit_rate"]) * whole)
        assert (run["link_bytes"] > 0, run["cpu_bytes"] > 0) == (fetched > 0, computed > 0)
        speed = rates["link_gb_s"] * (mode != "cpu") + rates["read_gb_s"] * (mode != "stream")
        assert run["bound_seconds"] == pytest.approx(missed / speed / 1e9)
        assert run["bound_fraction"] == pytest.approx(run["bound_seconds"] * run["tok_s"])
        assert run["measured_over_predicted"] == pytest.approx(run["tok_s"] / run["predicted_tok_s"])
    if mode == "stream":
        assert result["prefill"][1]["streamed_layers"] == LAYERS - 1
        assert result["prefill"][1]["bound"] == "link"


def test_the_rates_are_stored_for_plans(bench, tmp_path):
    result = bench(device(7), *options(tmp_path, "--experts", "hybrid"))
    machine = result["machine"]
    expected = {"ram": machine["read_gb_s"], "link": machine["link_gb_s"], "vram": machine["gpu_gb_s"]}
    names = [*expected, "gpu_gflops"]
    assert measurements.load(names) == pytest.approx(expected)
    result = bench(device(32), *options(tmp_path))
    assert measurements.load(["gpu_gflops"])["gpu_gflops"] == max(run["gflops"] for run in result["prefill"])


def test_layers_are_cut_and_the_whole_is_extrapolated(bench, tmp_path, monkeypatch, capsys):
    result = bench(device(7, 3), *options(tmp_path, "--experts", "hybrid", "--layers", 3))
    assert (result["layers"], result["total_layers"], result["model"]["layers"]) == (3, 5, 3)
    assert 0 < result["extrapolated"]["decode_tok_s"] < result["decode"][0]["tok_s"]
    assert result["plan"]["experts"] == 2 * EXPERTS
    monkeypatch.setattr(workstation, "find_devices", lambda names: [device(7, 3)])
    arguments = options(tmp_path, "--experts", "hybrid", "--layers", 3)
    cli.app(["bench", *map(str, arguments)], standalone_mode=False)
    text = capsys.readouterr().out
    for words in ("3 of 5 layers", "EXTRAPOLATED from 3 layers", "of copies beside", "GPU 0: tensors", "planned"):
        assert words in text


def test_a_converted_model_is_measured_and_may_be_cut(bench, tmp_path):
    convert(save_random(tmp_path / "source", num_hidden_layers=LAYERS), tmp_path / "converted", recipe=Recipe.NF4)
    arguments = ("-m", tmp_path / "converted", "--prompt", 4, "--decode", 2, "--context", 3, "--parallel", 1)
    result = bench(device(7), *arguments, "--experts", "stream")
    assert (result["model"]["name"], result["plan"]["mode"]) == ("converted", "stream")
    result = bench(device(7), *arguments, "--experts", "hybrid", "--layers", 3)
    assert (result["layers"], result["total_layers"]) == (3, 5)
    assert not (tmp_path / "cache/dsv2-local/favourites").exists()  # random routing does not warm the user's slots


def test_a_gpu_that_is_too_small_is_not_used_unless_it_was_requested(bench, tmp_path):
    result = bench(SimulatedDevice(capacity=1000), *options(tmp_path))
    assert "plan" not in result
    assert "outside_kernels" in result["parts"]
    assert "the GPU is not used: the model does not fit" in result["stderr"]
    with pytest.raises(PlanError):
        bench(SimulatedDevice(capacity=1000), *options(tmp_path, "--experts", "stream"))


def write_trace(
    path: Path, choose: Callable[[int, int], list[int]], tokens: int = 12, layers: int = LAYERS - 1
) -> Path:
    routing = [[choose(token, layer) for layer in range(layers)] for token in range(tokens)]
    Trace("tiny", layers, EXPERTS, routing).save(path)
    return path


def even(token: int, layer: int) -> list[int]:
    """Every expert equally often."""
    return [(token * PER_TOKEN + i + layer) % EXPERTS for i in range(PER_TOKEN)]


@pytest.mark.parametrize("layers", [5, 3])
def test_a_trace_decides_the_hits(bench, tmp_path, layers):
    """There are slots for three experts of every layer: enough for a routing that never changes."""
    rates, slots, cut = {}, (layers - 1) * PER_TOKEN, ("--layers", layers)
    for name, choose in {"skewed": lambda token, layer: [2, 5, 7], "even": even}.items():
        file = write_trace(tmp_path / name, choose)
        result = bench(device(slots, layers), *options(tmp_path, "--experts", "stream", "--trace", file, *cut))
        rates[name] = [run["hit_rate"] for run in result["decode"]]
        assert result["routing"] == "trace of tiny"
    assert rates["skewed"] == [1.0, 1.0]
    assert max(rates["even"]) < 0.9
    random = bench(device(slots, layers), *options(tmp_path, "--experts", "stream", *cut))
    assert max(run["hit_rate"] for run in random["decode"]) < 1.0


@pytest.mark.parametrize(
    ("trace", "more", "message"),
    [
        ({"layers": 3}, (), "has 3 layers of 8 experts, and this model has 4 of 8"),
        ({"tokens": 0}, (), "has no tokens"),
        ({"choose": lambda token, layer: [1, 2]}, (), "does not have 3 different experts"),
        ({"choose": lambda token, layer: [1, 2, 2]}, (), "does not have 3 different experts"),
        ({}, ("--parallel", "2"), "--parallel cannot be used with --trace"),
        ({}, ("--experts", "cpu"), "--trace needs offloaded experts"),
        ({}, ("--experts", "auto", "--device", "cpu"), "--trace needs offloaded experts"),
    ],
)
def test_a_trace_that_cannot_be_replayed_is_refused(bench, tmp_path, trace, more, message):
    file = write_trace(tmp_path / "trace", **{"choose": even, **trace})
    with pytest.raises(InputError, match=message):
        bench(device(7), *options(tmp_path, "--experts", "stream", "--trace", file, *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--experts", "hybrid", "--device", "cpu"), "--experts hybrid needs a GPU"),
        (("--vram", "8GiB", "--device", "cpu"), "--vram needs a GPU"),
        (("--vram", "8GiB,8GiB"), "--vram has 2 sizes for 1 GPUs"),
        (("--vram", "much"), "--vram 'much' is not a size"),
        (("--experts", "some"), "--experts 'some' is not one of auto, gpu"),
        (("--prompt", "9000"), "--prompt must be between 1 and 8,191"),
        (("--layers", "9"), "--layers must be between 2"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(bench, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(Builder, "__init__", lambda *_: pytest.fail("built"))
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        bench(device(7), *options(tmp_path, *more))


def test_experts_that_do_not_fit_in_ram_are_refused_with_the_layers_that_fit():
    whole = released.read_config("deepseek-v2")
    machine = Machine((24 * GIB,), 64 * GIB, available=True)
    with pytest.raises(InputError, match=r"60 layers need 12\d\.\d\d GB of RAM") as error:
        gpu_case.plan_of_random_weights(request(Mode.HYBRID, whole, 4096), machine)
    layers = int(str(error.value).rsplit("--layers ", 1)[1].split()[0])
    fits = request(Mode.HYBRID, first_layers(whole, layers), 4096)
    assert gpu_case.plan_of_random_weights(fits, machine).disk_experts == 0
    with pytest.raises(InputError, match=f"--layers {layers} fits"):
        gpu_case.plan_of_random_weights(replace(fits, config=first_layers(whole, layers + 1)), machine)
    with pytest.raises(InputError, match="free memory"):
        gpu_case.plan_of_random_weights(
            replace(fits, config=first_layers(whole, 2)), replace(machine, vram=(4 * GIB,), ram=4 * GIB)
        )


def test_records_built_in_the_arena_are_locked_in_place_and_equal_those_of_one_thread(quick):
    expected = build(config(), Recipe.NF4)
    locked: list[int] = []
    on = SimulatedDevice()
    on.lock = lambda memory: locked.append(memory.data_ptr()) is None  # type: ignore[method-assign]
    on.unlock = lambda memory: locked.remove(memory.data_ptr())  # type: ignore[method-assign]
    done: list[tuple[int, int]] = []
    with Builder(config(), Recipe.NF4, threads=3) as builder:
        arena = PinnedArena(on)
        builder.fill(arena, lambda *progress: done.append(progress))
        on_demand = builder.on_demand()
        for name, weight in expected.weights.items():
            parts = (getattr(w, "parts", (w,)) for w in (weight, on_demand.weights[name]))
            assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True)), name
        for layer, records in expected.records.items():
            assert torch.equal(arena.records[layer], records)
            assert torch.equal(on_demand.records[layer], records)
            assert arena.records[layer].data_ptr() % 4096 == 0
    assert locked == [records.data_ptr() for records in arena.records.values()]
    assert arena.locked == arena.nbytes == sum(records.nbytes for records in expected.records.values())
    assert (done[0], done[-1]) == ((0, arena.nbytes), (arena.nbytes, arena.nbytes))
    arena.close()
    assert (locked, arena.locked) == ([], 0)


def test_memory_to_lock_is_private_and_not_copied_for_forked_processes():
    memory = PinnedArena.allocate(4 << 20)
    flags, inside = None, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= memory.data_ptr() < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    assert flags is not None
    assert "dc" in flags  # do not copy when forking
    assert "sh" not in flags  # shared


def test_a_refusal_to_lock_leaves_the_records_where_they_are(bench, tmp_path, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(SimulatedDevice, "lock", lambda self, memory: bool(calls.append(memory.nbytes)))
    result = bench(device(7), *options(tmp_path, "--experts", "hybrid"))
    assert len(calls) == 1
    assert result["plan"]["locked"] is False
    assert "ulimit -l" in result["stderr"]


def test_weights_outlive_a_model_that_was_placed_from_them(small):
    """One set of weights in page-locked RAM serves several models, and is unlocked once, at the end."""
    on, unlocked = SimulatedDevice(), list[int]()
    on.unlock = lambda memory: unlocked.append(memory.nbytes)  # type: ignore[method-assign]
    with (
        Builder(config(), Recipe.NF4) as builder,
        gpu_case.random_weights(builder, on, lambda done, total: None, in_ram=True) as weights,
    ):
        for _ in range(2):
            vram = device(7).free + CONTEXT_BYTES
            plan = make_plan(request(Mode.STREAM), Machine((vram,), 1 << 40))
            placed = placement.place_on_devices(weights, plan, [SimulatedDevice()], torch.float32)
            assert placed.experts.devices[0].records[1] is weights.records[1]
            placed.close()
        assert unlocked == []
    assert len(unlocked) == LAYERS - 1


def test_no_thread_is_left_behind(bench, tmp_path):
    before = threading.active_count()
    bench(device(7), *options(tmp_path))
    assert threading.active_count() <= before


class Again:
    """A simulated graph: a replay runs the captured step again, with the functions between its graphs."""

    made: ClassVar[list["Again"]] = []

    def __init__(self, memory: GraphMemory | None = None) -> None:
        self.fully_captured, self.replays = True, 0
        self.made.append(self)

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        self._step, self._result = step, step()
        return self._result

    def call_between(self, *work: Callable[[], object]) -> None:
        self.fully_captured = False
        for each in work:
            each()

    def replay(self) -> None:
        self.replays += 1
        self._result.copy_(self._step())


class Event:
    """A simulated event of a stream that has always ended."""

    def __init__(self, enable_timing: bool) -> None: ...
    def record(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: "Event") -> float:
        return 250.0


@pytest.fixture
def captured(monkeypatch, reference_kernels) -> list[Again]:
    """Steps and parts run as on a GPU with CUDA graphs, which are simulated; returns the graphs.

    On the torch reference, because the native kernels do not skip negative slots.
    """
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **given: empty(*shape, **given))
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(ops, "capturable", lambda device: True)
    monkeypatch.setattr(gpu_case, "DTYPE", torch.float32)
    monkeypatch.setattr(Again, "made", [])
    for module in gpu_step, gpu_timing:
        monkeypatch.setattr(module, "PiecewiseGraph", Again)
    return Again.made


@pytest.mark.parametrize("mode", ["hybrid", "stream", "cpu", "gpu"])
def test_captured_steps_and_parts_are_measured(bench, captured, tmp_path, mode):
    result = bench(fp32_device(32 if mode == "gpu" else 12), *options(tmp_path, "--experts", mode))
    step, parts = captured[0], captured[1 + (mode == "gpu") :]  # resident experts: steps with drafts are captured too
    assert step.replays >= 2 * (4 + gpu_timing.WARM_UP_STEPS)
    assert step.fully_captured == (mode == "gpu")
    assert len(parts) == len(result["parts"]) - 1
    assert {graph.replays for graph in parts} == {gpu_timing.PART_REPEATS}
    if mode != "gpu":
        whole = (LAYERS - 1) * PER_TOKEN * result["plan"]["expert_bytes"]
        for run in result["decode"]:
            assert run["link_bytes"] + run["cpu_bytes"] == pytest.approx((1 - run["hit_rate"]) * whole)


def test_captured_steps_replay_a_trace(bench, captured, tmp_path):
    rates = {}
    for name, choose in {"skewed": lambda token, layer: [2, 5, 7], "even": even}.items():
        file = write_trace(tmp_path / name, choose)
        result = bench(fp32_device(12), *options(tmp_path, "--experts", "stream", "--trace", file))
        rates[name] = [run["hit_rate"] for run in result["decode"]]
    assert rates["skewed"] == [1.0, 1.0]
    assert max(rates["even"]) < 0.9


def test_the_replayed_choice_is_the_traces_token_by_token(bench, captured, tmp_path, monkeypatch):
    seen: list[list[list[int]]] = []
    start = OffloadedExperts.start

    def watched(self: Any, layer: int, x: Tensor, ids: Tensor, *rest: Any) -> Any:
        if len(ids) == 1:
            seen.append((layer, ids[0].tolist()))
        return start(self, layer, x, ids, *rest)

    monkeypatch.setattr(OffloadedExperts, "start", watched)
    file = write_trace(tmp_path / "trace", even)
    bench(fp32_device(12), *options(tmp_path, "--experts", "stream", "--trace", file))
    steps = 6 + 2 * (gpu_timing.WARM_UP_STEPS + 4)  # half the trace warms the slots, then two measurements
    expected = [(1 + layer, even(step % 12, layer)) for step in range(steps) for layer in range(LAYERS - 1)]
    assert seen[-len(expected) :] == expected
