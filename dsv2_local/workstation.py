"""The GPUs and the memory of this machine: which of them a model is loaded into, and whether it fits."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from dsv2_local.errors import InputError, PlanError
from dsv2_local.kernels import ops
from dsv2_local.machine import measurements
from dsv2_local.machine.resources import lockable_memory, memory_available
from dsv2_local.offload.device import Device
from dsv2_local.offload.plan import CONTEXT_BYTES, Plan, make_plan
from dsv2_local.offload.plan_request import RATES, Machine, Mode, PlanRequest, Rates

COMPUTE_CAPABILITY = (8, 0)  # the lowest that has bf16 tensor cores, which the GPU kernels need


def find_devices(names: str) -> list[Device]:
    """The GPUs that `names` asks for; for "auto" all GPUs if they are suitable, else none.

    Raises:
        InputError: `names` is not a valid choice, or names a GPU that this machine lacks.
    """
    if names == "cpu" or (names == "auto" and (not torch.cuda.is_available() or passed_over())):
        return []
    count = torch.cuda.device_count()
    every = names in ("auto", "cuda")
    wanted = [f"cuda:{index}" for index in range(max(1, count))] if every else names.split(",")
    numbers = [re.fullmatch(r"cuda:(\d+)", name.strip()) for name in wanted]
    if not all(numbers) or len(set(wanted)) < len(wanted):
        raise InputError(f"device {names!r} is not cpu, cuda, or some of cuda:0,cuda:1")
    indices = [int(number[1]) for number in numbers if number]
    if missing := [index for index in indices if index >= count]:
        found = "finds no GPU" if count == 0 else f"finds {count}"
        raise InputError(
            f"there is no cuda:{missing[0]} on this machine: torch {torch.__version__} {found}; use --device cpu"
        )
    from dsv2_local.offload.cuda_device import CudaDevice

    return [CudaDevice(index) for index in indices]


def passed_over() -> str | None:
    """Why `--device auto` does not use the GPUs of this machine; None if it uses them, or there are none."""
    if not torch.cuda.is_available():
        return None
    least = min(torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count()))
    if least < COMPUTE_CAPABILITY:
        return f"its compute capability is {least[0]}.{least[1]}, and the kernels need 8.0 or later"
    return None if ops.capturable(torch.device("cuda")) else "Triton is not installed"


def this_machine(devices: Sequence[Device], vram: Sequence[int] | None, experts: Mode = Mode.AUTO) -> Machine:
    """What this machine has free for a model on these GPUs; `vram` limits the memory to use on each.

    Raises:
        InputError: an option needs a GPU and there is none, or `vram` is not one size per GPU.
    """
    if not devices and experts not in (Mode.AUTO, Mode.CPU):
        raise InputError(f"--experts {experts} needs a GPU (--device cuda); on the CPU leave it out")
    if not devices and vram is not None:
        raise InputError("--vram needs a GPU (--device cuda)")
    limits = list(vram) if vram is not None else [device.free + CONTEXT_BYTES for device in devices]
    if len(limits) != len(devices):
        raise InputError(f"--vram has {len(limits)} sizes for {len(devices)} GPUs; give one size per GPU")
    # The CUDA contexts exist already, so that their memory is no longer free; the plan counts it again.
    free = tuple(min(limit, device.free + CONTEXT_BYTES) for limit, device in zip(limits, devices, strict=True))
    rates = replace(Rates(), **measurements.load(RATES))
    return Machine(free, memory_available(), lockable_memory(), available=True, rates=rates)


def plan_for(request: PlanRequest, machine: Machine) -> Plan:
    """Plan the memory of this machine for a model that exists as it is.

    Raises:
        PlanError: the model does not fit; only with remedies that apply to it.
    """
    try:
        return make_plan(request, machine)
    except PlanError as error:
        options = ("--cache-type", "--context", "--experts", "--parallel")
        remedies = tuple(remedy for remedy in error.remedies if remedy.startswith(options))
        raise PlanError(error.where, error.shortfall, remedies) from None
