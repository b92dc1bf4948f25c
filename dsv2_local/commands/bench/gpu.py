"""`dsv2 bench` on GPUs: places a model as `dsv2 run` would, and measures it beside the machine's limits."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch

from dsv2_local.commands.bench import gpu_report, gpu_timing
from dsv2_local.commands.bench.gpu_case import Case, settle, weights_of
from dsv2_local.commands.bench.gpu_rates import MachineRates, free_cached, measure
from dsv2_local.commands.bench.hardware import forget_peak, peak_bytes
from dsv2_local.commands.bench.replay import ReplayedRouting
from dsv2_local.commands.bench.report import model_facts
from dsv2_local.commands.bench.settings import BenchOptions, read_bytes, use_threads
from dsv2_local.commands.bench.subject import Subject
from dsv2_local.commands.bench.timing import Status
from dsv2_local.commands.console import notice
from dsv2_local.commands.inspect import summarise
from dsv2_local.kernels import ops
from dsv2_local.offload import forecast
from dsv2_local.offload.device import Device, typed_errors
from dsv2_local.runtime import placement
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.placement import ModelWeights, PlacedModel


class Phases:
    """How long each phase took, and what is being done now.

    Attributes:
        seconds: by phase.
        status: shows what is being done.
    """

    def __init__(self, status: Status, ended: Callable[[str, float], object] = lambda name, seconds: None) -> None:
        """`ended` is called with each phase's name and seconds."""
        self.seconds: dict[str, float] = {}
        self.status, self._ended = status, ended

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.status(name)
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = perf_counter() - start
            self._ended(name, self.seconds[name])


def run(options: BenchOptions, devices: list[Device], status: Status) -> dict[str, Any]:
    """Measure what the options ask for on these GPUs: the object that --json prints.

    Raises:
        InputError, PlanError, CheckpointError: see `gpu_case.settle`.
        DeviceError: a kernel failed, or another program took GPU memory after the plan was made.
    """
    case, checkpoint = settle(options, devices)
    threads, phases = use_threads(options.threads, case.recipe), Phases(status)
    with ExitStack() as stack, typed_errors():
        with phases("building"):
            weights = stack.enter_context(weights_of(case, checkpoint, devices[0], threads, status))
        with phases("measuring the machine"):
            machine = machine_rates(weights, devices[0], threads)
        result = measure_case(case, weights, devices, machine, phases)
    return {**result, "phases": phases.seconds}


def machine_rates(weights: ModelWeights, device: Device, threads: int) -> MachineRates:
    """Measure the machine, with the experts that are in page-locked RAM, if they are; before a model is placed."""
    records = list(weights.arena.records.values()) if weights.arena else []
    locked = bool(records) and weights.arena is not None and not weights.arena.refused
    return measure(device, threads, records, locked, read_bytes())


def measure_case(
    case: Case, weights: ModelWeights, devices: list[Device], machine: MachineRates, phases: Phases
) -> dict[str, Any]:
    """Place the model, measure it, and free the GPUs: the object that --json prints."""
    if weights.arena and weights.arena.refused:
        case = replace(case, plan=replace(case.plan, locked=False))
    try:
        return _measure(case, weights, devices, machine, phases)
    finally:
        gc.collect()
        for device in devices:
            free_cached(device)


def _measure(
    case: Case, weights: ModelWeights, devices: list[Device], machine: MachineRates, phases: Phases
) -> dict[str, Any]:
    forget_peak()
    before = [_gpu_memory(device, device.free)[1] for device in devices]
    free = [device.free for device in devices]
    for device in devices:
        if device.torch_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device.torch_device)
    with phases("placing"):
        placed = placement.place_on_devices(weights, case.plan, devices, case.dtype)
    try:
        planned = [] if weights.arena else forecast.notes(case.plan)
        for note in filter(None, [ops.gpu_notice(devices[0].torch_device), *planned, *placed.notes]):
            notice(note)
        result = _measure_placed(case, placed, machine, phases)
        memory = [_gpu_memory(device, nbytes) for device, nbytes in zip(devices, free, strict=True)]
        allocated, used = ([pair[i] for pair in memory] for i in (0, 1))
        result["memory"] = gpu_report.memory_facts(allocated, before, used, peak_bytes(), case.plan)
        return {**result, **gpu_report.cut_facts(case, result)}
    finally:
        placed.close()


def _measure_placed(case: Case, placed: PlacedModel, machine: MachineRates, phases: Phases) -> dict[str, Any]:
    plan, status = case.plan, phases.status
    replay = ReplayedRouting(placed.model, case.trace) if case.trace else None
    engine = Engine(placed.model, plan.request.context, plan.request.cache_dtype, plan.chunk)
    with phases("warming up"):
        engine.warm_up(partial(_compiling, status))
    prefill, decode = [], []
    for tokens in case.lengths.prompts:
        with phases(f"prefill of {tokens:,} tokens, twice"):
            run = gpu_timing.measure_prefill(engine, placed, tokens, status)
        prefill.append(gpu_report.prefill_facts(run, plan, machine))
    if replay:
        with phases("warming the slots"):
            warm = gpu_timing.warm_up_length(replay.tokens)
            gpu_timing.warm_up_slots(engine, replay, warm, status)
    for context in case.lengths.contexts:
        with phases(f"decoding at context {context:,}"):
            run = gpu_timing.measure_decode(engine, placed, context, case.lengths.decode, replay, status)
        decode.append(gpu_report.decode_facts(run, plan, machine))
    parallel, together = case.lengths.parallel, []
    if parallel:
        with phases("decoding several sequences"):
            together = gpu_timing.measure_parallel(
                engine, placed, parallel, case.lengths.contexts[0], case.lengths.parallel_steps, status
            )
    with phases("parts of a token"):
        parts = gpu_timing.measure_parts(engine, placed, case.lengths.contexts[0])
    subject = Subject(case.name, case.recipe, placed.model, summarise(case.config, case.recipe), [])
    return {
        "device": placed.devices[0].kind,
        "machine": asdict(machine),
        "model": model_facts(subject, plan.request.cache_dtype),
        "routing": f"trace of {case.trace.model}" if case.trace else "random tokens",
        "plan": gpu_report.plan_facts(plan),
        "prefill": prefill,
        "decode": decode,
        "parallel": [gpu_report.parallel_facts(run, plan, machine) for run in together],
        "parts": gpu_report.part_facts(parts, 1 / decode[0]["tok_s"], plan),
    }


def _compiling(status: Status, done: int, total: int) -> None:
    status(f"compiling GPU kernels: {done}/{total} steps")


def _gpu_memory(device: Device, free: int) -> tuple[int, int]:
    """Peak bytes of tensors since the last reset, and bytes in use: on a GPU of all that uses it, the driver included.

    `free`: what was free before the model was placed.
    """
    if device.torch_device.type != "cuda":
        return free - device.free, free - device.free
    now, total = torch.cuda.mem_get_info(device.torch_device)
    return torch.cuda.max_memory_allocated(device.torch_device), total - now
