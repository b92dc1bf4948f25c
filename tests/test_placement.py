"""dsv2-nano on simulated devices: same tokens wherever weights are stored, planned bytes, and all memory released."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv2_local import llm, workstation
from dsv2_local.commands.console import describe_experts
from dsv2_local.errors import DeviceError, DeviceMemoryError, InputError, PlanError
from dsv2_local.llm import LLM, bundled_model
from dsv2_local.machine import measurements
from dsv2_local.offload import warm_experts
from dsv2_local.offload.balance import Costs, Watch
from dsv2_local.offload.offloaded_experts import OffloadedExperts
from dsv2_local.offload.plan import make_plan
from dsv2_local.offload.plan_request import Machine, Mode
from dsv2_local.offload.simulated_device import SimulatedDevice
from tests.models import heed_signals

EVEN = Costs(fetch=1.0, read=1.0, token=0.1)
PROMPT = "A violin is a string instrument that is played with a bow. " * 6


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def devices(slots: int, number: int = 1, hook: Callable[[str], None] = lambda step: None) -> list[SimulatedDevice]:
    """Devices with the memory that nano needs for `slots` experts on each, and one byte more."""
    request = replace(llm.load(context=512).plan.request, experts=Mode.STREAM)
    plan = make_plan(request, Machine((2 << 30,) * number, 1 << 40))
    fixed = [
        sum(size for name, size in gpu.parts.items() if name not in ("driver", "expert slots")) for gpu in plan.gpus
    ]
    return [
        SimulatedDevice(gpu, capacity=size + slots * plan.expert_bytes + 1, hook=hook) for gpu, size in enumerate(fixed)
    ]


def loaded(mode: Mode = Mode.HYBRID, *, costs: Costs | None = EVEN, on: list[SimulatedDevice]) -> LLM:
    return LLM(
        bundled_model(), dtype=torch.float32, context=512, threads=None, experts=mode, devices=on, costs=costs
    )  # fmt: skip


def answer(model: LLM, tokens: int = 24) -> list[int | None]:
    never_end = dict.fromkeys(model._end_tokens, -100.0)
    return [c.token_id for c in model.generate(PROMPT, max_tokens=tokens, temperature=0, logit_bias=never_end)]


@pytest.fixture(scope="module")
def expected() -> list[int | None]:
    return answer(llm.load(context=512))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("slots", [0, 7, 40])
@pytest.mark.parametrize("mode", [Mode.AUTO, Mode.HYBRID, Mode.STREAM, Mode.CPU])
def test_the_same_tokens_wherever_experts_are_stored(expected, monkeypatch, mode, slots, number):
    monkeypatch.setattr(Watch, "correction", lambda self: None)  # costs must not depend on how busy the machine is
    with loaded(mode, on=devices(slots, number)) as model:
        for chunk in (model.engine.chunk, 17):
            model.engine.chunk = model.engine.scheduler.chunk = chunk
            model.engine.clear()
            assert answer(model) == expected
        for device, gpu in zip(model._placed.devices, model.plan.gpus, strict=True):
            parts = {name: size for name, size in gpu.parts.items() if name not in ("driver", "kernels", "workspace")}
            assert device.allocated == sum(parts.values()), gpu
        if mode in (Mode.HYBRID, Mode.STREAM):
            assert isinstance(model.experts, OffloadedExperts)
            stats = model.experts.stats
            assert stats.streamed_layers > 0
            assert (stats.hits > 0) == (slots > 0)
            assert (stats.host_experts > 0) == (mode is Mode.HYBRID)
            assert stats.retries == 0
            description = "\n".join(describe_experts(model))
            assert f"{number * slots:,} of 120 experts" in description
            assert "hit rate" in description


def test_a_model_that_fits_needs_no_expert_cache(expected):
    with loaded(Mode.GPU, on=[SimulatedDevice(capacity=2 << 30)]) as model:
        assert answer(model) == expected
        assert not isinstance(model.experts, OffloadedExperts)
        assert "all in GPU memory" in describe_experts(model)[0]


def test_a_model_that_does_not_fit_is_refused_before_anything_is_allocated():
    (gpu,) = make_plan(replace(llm.load(context=512).plan.request, experts=Mode.GPU), Machine((2 << 30,), 1 << 40)).gpus
    device = SimulatedDevice(capacity=gpu.used - gpu.parts["driver"] - 1)
    with pytest.raises(PlanError) as error:
        loaded(Mode.GPU, on=[device])
    assert (error.value.where, error.value.shortfall) == ("GPU 0", 1)
    assert device.allocated == 0


def test_a_gpu_that_is_too_small_is_not_used_unless_it_was_requested(expected, monkeypatch):
    monkeypatch.setattr(workstation, "find_devices", lambda names: [SimulatedDevice(capacity=1000)])
    model = llm.load(context=512)
    assert model._placed.devices == []
    assert model.notes[-1].startswith("the GPU is not used: the model does not fit")
    assert answer(model) == expected
    for options in ({"device": "cuda"}, {"vram": [1000]}, {"experts": "stream"}):
        with pytest.raises(PlanError):
            llm.load(context=512, **options)


def test_experts_that_were_used_start_in_slots(expected):
    with loaded(on=devices(20)) as model:
        answer(model)
        cold = model.experts.stats.hit_rate
        used = model.experts.devices[0].slots.cache.warmest()
    warm = warm_experts.load(next(warm_experts.file("x").parent.glob("*.json")).stem, [1, 2, 3, 4, 5], 24)
    assert warm[: len(used)] == used
    assert sorted(warm) == [(layer, expert) for layer in range(1, 6) for expert in range(24)]
    with loaded(on=devices(20)) as model:
        assert answer(model) == expected
        assert model.experts.stats.hit_rate > cold


@pytest.mark.parametrize("damage", ["", "[", "[3]", '{"a": 1}', "[[99, 99]]"])
def test_a_damaged_file_of_warm_experts_is_ignored(damage):
    path = warm_experts.file("f")
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    assert warm_experts.load("f", [1], 2) == [(1, 0), (1, 1)]


@pytest.mark.slow
def test_costs_are_measured_once_and_stored():
    with loaded(costs=None, on=devices(7)) as model:
        first = model.experts.devices[0].costs
        assert min(first.fetch, first.read, first.token) > 0
    assert len(measurements._read(measurements.file())) == 1
    with loaded(costs=None, on=devices(7)) as model:
        assert model.experts.devices[0].costs == first


def locked_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmLck"))
    return int(line.split()[1]) << 10


def test_page_locked_memory_is_released(monkeypatch):
    monkeypatch.setattr(workstation, "lockable_memory", lambda: None)
    before = locked_bytes()
    try:
        with loaded(on=devices(7)) as model:
            if not model._placed.notes:
                assert locked_bytes() - before >= 120 * model.plan.expert_bytes
            answer(model, 2)
    finally:
        assert locked_bytes() == before


def test_a_refusal_to_lock_memory_is_reported_and_changes_no_token(expected, monkeypatch):
    monkeypatch.setattr(workstation, "lockable_memory", lambda: None)
    monkeypatch.setattr(SimulatedDevice, "lock", lambda self, memory: False)
    with loaded(on=devices(7)) as model:
        assert answer(model) == expected
        (note,) = model.notes
        assert "ulimit -l" in note


def test_memory_that_another_program_took_is_a_typed_error():
    (device,) = devices(7)

    def taken(step: str) -> None:
        if step == "allocate" and device.allocated > 5_000_000:
            device.capacity = device.allocated

    device.hook = taken
    with pytest.raises(DeviceMemoryError, match="--vram"):
        loaded(on=[device])


def test_a_failed_copy_changes_no_token(expected):
    calls = iter(range(1 << 30))

    def faulty(step: str) -> None:
        if step == "copy" and next(calls) % 50 == 49:
            raise DeviceError("the link is loose")

    with loaded(Mode.STREAM, on=devices(40, hook=faulty)) as model:
        assert answer(model) == expected
        assert model.experts.stats.retries > 0
        assert "computed again" in "\n".join(describe_experts(model))


def test_a_device_that_keeps_failing_is_a_typed_error():
    (device,) = devices(7)
    with loaded(Mode.STREAM, on=[device]) as model:

        def dead(step: str) -> None:
            if step == "copy":
                raise DeviceError("the link is cut")

        device.hook = dead
        with pytest.raises(DeviceError, match="the link is cut"):
            answer(model)


@pytest.mark.parametrize(
    "raised", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), torch.AcceleratorError("lost")]
)
def test_errors_of_torch_about_gpus_are_typed_and_the_model_stays_usable(expected, raised, monkeypatch):
    model = llm.load(context=512)
    with monkeypatch.context() as patched:

        def fail(*arguments: object) -> None:
            raise raised

        patched.setattr(model.engine.model, "embed", fail)
        with pytest.raises(DeviceError, match=str(raised).splitlines()[0]):
            answer(model)
    assert answer(model) == expected


@pytest.mark.slow
def test_ctrl_c_during_a_copy_leaves_a_model_that_answers(tmp_path, expected):
    """In a separate process, with copies that are slow enough to be interrupted."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, threading, time
            from tests.test_placement import *

            def slow(step):
                time.sleep(0.002)

            with loaded(Mode.STREAM, on=devices(7, hook=slow)) as model:
                for delay in (0.05, 0.2, 0.4):
                    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
                    try:
                        answer(model)
                    except KeyboardInterrupt:
                        print("interrupted", flush=True)
                print(answer(model) == answer(llm.load(context=512)))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=120, preexec_fn=heed_signals,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["interrupted"] * 3 + ["True"], done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "hybrid"}, "needs a GPU"),
        ({"experts": "some"}, "is not one of auto, gpu"),
        ({"device": "tpu"}, "is not cpu, cuda"),
        ({"device": "cuda:0,cuda:0"}, "is not cpu, cuda"),
        ({"device": "cuda:63"}, "there is no cuda:63"),
        ({"vram": [1 << 30]}, "--vram"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(InputError, match=message):
        llm.load(**options)
