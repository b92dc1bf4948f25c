"""Plans add up, fit in the machine's memory, and every remedy of a refusal works."""

import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dsv2_local
from dsv2_local import workstation
from dsv2_local.architectures import released
from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.families import parse_config
from dsv2_local.architectures.tensors import Kind
from dsv2_local.commands import plan as plan_command
from dsv2_local.commands.inspect import summarise
from dsv2_local.errors import InputError, PlanError
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.machine import measurements
from dsv2_local.offload.forecast import forecast, notes
from dsv2_local.offload.plan import Plan, make_plan
from dsv2_local.offload.plan_request import RATES, Machine, Mode, PlanRequest, Rates
from dsv2_local.offload.sizes import GIB, STAGING_BUFFERS
from dsv2_local.options import size
from dsv2_local.quant.schema import Recipe
from tests.models import TINY
from tests.test_cli import dsv2

LARGE, LITE = released.read_config("deepseek-v2"), released.read_config("deepseek-v2-lite")
DENSE = parse_config({"model_type": "deepseek_v2", **TINY, "n_routed_experts": 0})


def random_case(seed: int) -> tuple[PlanRequest, Machine]:
    draw = random.Random(seed)
    config = draw.choice([LARGE, LITE, DENSE])
    context = draw.choice([1, 1000, 8192, 100_000]) if config is not DENSE else draw.choice([1, 1000])
    request = PlanRequest(
        config, draw.choice(list(Recipe)), context, draw.choice(list(CacheDtype)), draw.choice(list(Mode))
    )
    vram = tuple(int(draw.uniform(2, 48) * GIB) for _ in range(draw.choice([0, 1, 1, 2, 3])))
    return request, Machine(vram, int(draw.uniform(2, 300) * GIB), draw.choice([None, None, 64 << 10]))


@pytest.mark.parametrize("seed", range(150))
def test_a_plan_fits_or_is_refused_with_remedies_that_work(seed):
    request, machine = random_case(seed)
    try:
        plan = make_plan(request, machine)
    except PlanError as refusal:
        error = refusal
    else:
        check(plan)
        return
    assert error.shortfall > 0
    for remedy in error.remedies:
        check(make_plan(*apply(remedy, request, machine)))


def check(plan: Plan) -> None:
    for share in (*plan.gpus, plan.ram):
        assert share.free >= 0
        assert share.used == sum(share.parts.values()) <= share.capacity
        assert min(share.parts.values()) >= 0
    if plan.gpus:
        layers = plan.request.config.num_hidden_layers
        ranges = [gpu.layers for gpu in plan.gpus]
        assert (ranges[0][0], ranges[-1][1]) == (0, layers)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert plan.resident or plan.ram_experts + plan.disk_experts == plan.experts
    if plan.gpus and plan.request.experts is Mode.GPU:
        assert plan.resident
    if plan.request.experts is Mode.CPU:
        assert plan.slots == 0
    assert forecast(plan).decode_tok_s > 0
    assert forecast(plan).prefill_tok_s > 0
    assert 0 <= forecast(plan).hit_rate <= 1


def apply(remedy: str, request: PlanRequest, machine: Machine) -> tuple[PlanRequest, Machine]:
    """The request and machine with a remedy applied literally."""
    option, value = remedy.split()[:2]
    if option == "--cache-type":
        return replace(request, cache_dtype=CacheDtype(value)), machine
    if option == "--context":
        return replace(request, context=int(value)), machine
    if option == "--recipe":
        return replace(request, recipe=Recipe(value)), machine
    if option == "--ram":
        return request, replace(machine, ram=size(option, value))
    if option == "--experts":
        return replace(request, experts=Mode(value)), machine
    assert option == "--vram"
    return request, replace(machine, vram=tuple(nbytes for part in value.split(",") if (nbytes := size(option, part))))


def in_memory(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of all loaded weights; norms and routers are 16-bit in the files and fp32 in memory."""
    kinds = summarise(config, recipe)
    return sum(kind.bytes * (2 if name in (Kind.NORM, Kind.ROUTER) else 1) for name, kind in kinds.items())


@pytest.mark.parametrize("recipe", Recipe)
@pytest.mark.parametrize("config", [LARGE, LITE, DENSE])
def test_every_weight_is_counted_once(config, recipe):
    on_cpu = make_plan(PlanRequest(config, recipe, 64), Machine((), 10**12))
    weights = in_memory(config, recipe)
    assert on_cpu.ram.parts["dense weights"] + on_cpu.ram.parts["experts (mapped)"] == weights
    on_gpus = make_plan(PlanRequest(config, recipe, 64), Machine((400 * GIB, 200 * GIB), 10**12))
    assert on_gpus.resident
    placed = sum(gpu.parts["dense weights"] + gpu.parts["expert slots"] for gpu in on_gpus.gpus)
    assert placed + on_gpus.ram.parts["embedding"] == weights


def test_the_plan_of_nano_is_what_loading_takes():
    loaded = dsv2_local.load(context=1000)
    ram = loaded.plan.ram
    assert ram.parts["KV cache"] == loaded.engine.cache.nbytes
    assert ram.parts["experts (mapped)"] == loaded.experts.nbytes
    assert ram.parts["dense weights"] == in_memory(loaded.config, loaded.recipe) - loaded.experts.nbytes


def test_loading_refuses_what_does_not_fit_and_reports_experts_on_disk(monkeypatch):
    request = dsv2_local.load().plan.request
    limit = request.config.max_position_embeddings
    half = make_plan(replace(request, context=limit // 2), Machine((), 10**12, available=True)).ram
    needed = half.used - half.parts["system"] - half.parts["experts (mapped)"]
    monkeypatch.setattr(workstation, "memory_available", lambda: int(needed * 1.022))
    with pytest.raises(PlanError, match="RAM lacks") as error:
        dsv2_local.load(context=limit)
    (remedy,) = error.value.remedies
    assert remedy.startswith("--context ")
    shorter = dsv2_local.load(context=int(remedy.split()[1]))
    assert shorter.plan.disk_experts > 0
    assert "do not fit in RAM" in notes(shorter.plan)[0]
    assert [*shorter.generate([5, 6], max_tokens=2)]


def test_the_large_model_beside_128k_of_context_on_one_card():
    bf16 = make_plan(PlanRequest(LARGE, Recipe.NF4, 131072), Machine((24 * GIB,), 192 * GIB))
    assert bf16.gpus[0].parts["KV cache"] == 131072 * 60 * 1152
    assert bf16.gpus[0].slots > 400
    assert bf16.locked
    assert bf16.disk_experts == 0
    int8 = make_plan(PlanRequest(LARGE, Recipe.NF4, 131072, CacheDtype.INT8), Machine((24 * GIB,), 192 * GIB))
    assert int8.gpus[0].parts["KV cache"] == 131072 * 39_360
    assert int8.slots > bf16.slots


def test_more_memory_and_faster_memory_never_make_it_slower():
    request, last = PlanRequest(LITE, Recipe.NF4, 8192), 0.0
    for vram in (4, 6, 8, 12, 16, 24):
        speed = forecast(make_plan(request, Machine((vram * GIB,), 64 * GIB))).decode_tok_s
        assert speed >= last
        last = speed
    slow, fast = (
        forecast(make_plan(request, Machine((), 64 * GIB, rates=Rates(ram=ram)))).decode_tok_s for ram in (30, 60)
    )
    assert fast == pytest.approx(2 * slow)


def test_experts_that_do_not_fit_in_ram_are_read_from_disk_and_reported():
    plan = make_plan(PlanRequest(LITE, Recipe.NF4, 4096), Machine((), 6 * GIB))
    assert 0 < plan.ram_experts < plan.experts
    assert forecast(plan).bound == "disk"
    assert "do not fit in RAM" in notes(plan)[0]


def test_too_little_lockable_memory_is_reported_with_the_remedy():
    plan = make_plan(PlanRequest(LITE, Recipe.NF4, 4096), Machine((6 * GIB,), 64 * GIB, lockable=8 << 20))
    assert not plan.locked
    assert "ulimit -l" in notes(plan)[-1]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GiB", 24 << 30), ("24G", 24 << 30), ("24gb", 24 * 10**9), ("1.5TiB", 3 << 39), ("128K", 131072), ("7", 7)],
)
def test_sizes(text, nbytes):
    assert size("--ram", text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "24 apples", "-1G", "1.2.3G", "24GiBs", "nan"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(InputError, match="--ram"):
        size("--ram", text)


def test_the_mode_is_decided_by_the_plan():
    """AUTO comes to what the memory allows; nothing that is decided is AUTO."""
    for vram, mode in (((), Mode.CPU), ((4 * GIB,), Mode.HYBRID), ((64 * GIB,), Mode.GPU)):
        assert make_plan(PlanRequest(LITE, Recipe.NF4, 8192), Machine(vram, 64 * GIB)).mode is mode
    request = PlanRequest(LITE, Recipe.NF4, 8192, experts=Mode.STREAM)
    streamed = make_plan(request, Machine((4 * GIB,), 64 * GIB))
    assert (streamed.mode, streamed.offloads) == (Mode.STREAM, True)
    assert streamed.gpus[0].parts["staging"] == STAGING_BUFFERS * streamed.staging_experts * streamed.expert_bytes


def test_the_old_spelling_of_the_cache_type_still_works():
    options = ["plan", "deepseek-v2-lite", "--ram", "64GiB", "--vram", "0", "--json"]
    old, new = dsv2(*options, "--cache", "int8"), dsv2(*options, "--cache-type", "int8")
    assert json.loads(old.stdout) == json.loads(new.stdout)
    assert json.loads(new.stdout)["cache"] == "int8"
    assert b"--cache-type" in old.stderr


@pytest.mark.slow
def test_the_command_prints_json_tables_and_errors(tmp_path):
    options = ["plan", "deepseek-v2", "--vram", "24GiB,24GiB", "--ram", "192GiB", "--context", "128K"]
    done = dsv2(*options, "--json")
    printed = json.loads(done.stdout)
    assert [memory["name"] for memory in printed["memories"]] == ["GPU 0", "GPU 1", "RAM"]
    assert printed["experts"]["all"] == 9440
    decided = {name: printed["experts"][name] for name in ("mode", "staging_buffers", "staging_experts")}
    assert decided == {"mode": "hybrid", "staging_buffers": 3, "staging_experts": 26}
    assert printed["prefill_chunk"] == 8192
    text = dsv2(*options).stdout.decode()
    assert "layers 30 to 59" in text
    assert "expert slots" in text
    refused = dsv2("plan", "deepseek-v2", "--vram", "0", "--ram", "8GiB")
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert b"RAM lacks" in refused.stderr
    assert b"--ram 1" in refused.stderr
    for wrong in (
        ["--context", "1T"],
        ["--cache-type", "fp8"],
        ["--recipe", "q4"],
        ["--rates", "ram=fast"],
        ["--vram", "x"],
    ):
        failed = dsv2("plan", "deepseek-v2-lite", *wrong)
        assert (failed.returncode, failed.stdout) == (2, b""), wrong
    assert dsv2("plan", "nothing").returncode == 2


def test_a_converted_model_is_planned_in_its_own_recipe(tmp_path):
    raw = {"model_type": "deepseek_v2", **TINY, "quantization_config": {"quant_method": "dsv2", "recipe": "int8"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    printed = json.loads(dsv2("plan", tmp_path, "--ram", "4GiB", "--json").stdout)
    assert printed["recipe"] == "int8"


def test_gpus_are_those_that_the_driver_reports(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 24000\necho 12000\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert plan_command.free_vram() == [24000 << 20, 12000 << 20]
    program.write_text("#!/bin/sh\necho driver is broken; exit 9\n")
    assert plan_command.free_vram() == []
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert plan_command.free_vram() == []


def test_rates_that_bench_measured_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measurements.load(RATES) == {}
    options = plan_command.PlanOptions("deepseek-v2-lite")
    assumed = plan_command._machine(options).rates
    measurements.save({"ram": 20.0, "later": 1.0})
    measurements.save({"cpu_gflops": 77.0})
    assert plan_command._machine(options).rates == replace(assumed, ram=20.0, cpu_gflops=77.0)
    given = plan_command.PlanOptions("deepseek-v2-lite", rates="ram=33")
    assert plan_command._machine(given).rates == replace(assumed, ram=33.0, cpu_gflops=77.0)
    imagined = plan_command.PlanOptions("deepseek-v2-lite", ram="64GiB")
    assert plan_command._machine(imagined).rates == assumed
    for damaged in ("", "[]", "{", '{"a": 3}', '{"a": {"ram": "fast"}}'):
        measurements.file().write_text(damaged)
        assert measurements.load(RATES) == {}
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    measurements.save({"ram": 1.0})  # does not fail


def test_planning_needs_no_torch():
    code = (
        "import sys\n"
        "from dsv2_local.commands import plan\n"
        "plan.run(plan.PlanOptions('deepseek-v2', ram='192GiB', vram='24GiB'), True)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False, cwd=Path(__file__).parent
    )
    assert done.returncode == 0


@pytest.mark.parametrize(("vram", "where"), [((), "RAM"), ((24 << 30,), "GPU 0")])
def test_the_rows_of_decode_steps_are_part_of_the_plan(vram, where):
    """Each recorded or captured step has logits of its own."""
    config = parse_config(released.RELEASED["deepseek-v2-lite"])
    machine = Machine(vram, 64 << 30)
    workspace = {}
    for parallel in (1, 16):
        made = make_plan(PlanRequest(config, Recipe.NF4, 8192, parallel=parallel), machine)
        share = made.gpus[0] if vram else made.ram
        assert share.name == where
        workspace[parallel] = share.parts["workspace"]
    rows = sum(range(2, 17)) if not vram else 2 + 4 + 8 + 16
    assert workspace[16] - workspace[1] == 4 * config.vocab_size * rows
