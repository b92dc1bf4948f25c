"""Measures how long copying and computing an expert take on this machine, while both happen at once.

So they do when a model runs, and the PCIe link and the CPU share the bandwidth of RAM.
"""

from dataclasses import asdict
from time import perf_counter

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.machine import measurements
from dsv2_local.offload.balance import Costs
from dsv2_local.offload.device import Device
from dsv2_local.offload.expert_slots import ExpertSlots

SECONDS = 1.0  # duration of each measurement
SEVERAL = 4  # experts of one call in the second measurement of the CPU
MANY = 32  # tokens per expert in the third
AHEAD = 4  # copies that are queued at any time


def costs(slots: ExpertSlots, layout: ExpertLayout, records: dict[int, Tensor]) -> Costs:
    """The costs stored for this machine, GPU and expert size; measured and stored if there are none."""
    keys = _keys(slots.device, layout)
    known = measurements.load(keys.values())
    if len(known) == len(keys):
        return Costs(**{name: known[key] for name, key in keys.items()})
    measured = measure(slots, layout, records)
    keep(measured, slots.device, layout)
    return measured


def keep(costs: Costs, device: Device, layout: ExpertLayout) -> None:
    """Store costs for the next run."""
    keys = _keys(device, layout)
    measurements.save({keys[name]: value for name, value in asdict(costs).items()})


def measure(slots: ExpertSlots, layout: ExpertLayout, records: dict[int, Tensor], seconds: float = SECONDS) -> Costs:
    """Copy experts to a staging buffer while the CPU computes others.

    The CPU computes one expert for one token, then `SEVERAL` in one call, which shows what a call costs besides, then
    one for `MANY` tokens.

    Args:
        slots: owner of the staging buffers; its cache slots are not touched.
        layout: layout of one expert's record.
        records: uint8 [E, layout.nbytes] in RAM, by layer.
        seconds: duration of each of the three measurements.
    """
    keys = [(layer, expert) for layer in records for expert in range(len(records[layer]))]
    target, fetches = slots.records[-1], list[float]()
    pending = [slots.device.copy([target], [records[layer][expert]]) for layer, expert in keys[:AHEAD]]
    several = min(SEVERAL, min(map(len, records.values())))
    means, computed = [], 0
    for experts, tokens in ((1, 1), (several, 1), (1, MANY)):
        x, pairs = torch.randn(tokens, layout.hidden_size), experts * tokens
        rows, out = torch.arange(tokens).repeat(experts), torch.empty(pairs, layout.hidden_size)
        until, times = perf_counter() + seconds, list[float]()
        while not times or perf_counter() < until:
            while pending[0].done:
                fetches.append(pending.pop(0).seconds)
                layer, expert = keys[(computed + len(fetches)) % len(keys)]
                pending.append(slots.device.copy([target], [records[layer][expert]]))
            # From the other end of the list, so that the experts are not in the CPU's caches because of a copy.
            layer, expert = keys[-1 - computed % len(keys)]
            chosen = (expert + torch.arange(experts)) % len(records[layer])
            start = perf_counter()
            ops.expert_outputs(x, records[layer], layout, rows, chosen.repeat_interleave(tokens), out)
            times.append(perf_counter() - start)
            computed += experts
        means.append(sum(times) / len(times))
    for event in pending:
        event.wait()
        fetches.append(event.seconds)
    one, more, many = means
    read = min(one, max(more - one, 0.0) / (several - 1)) if several > 1 else one
    return Costs(sum(fetches) / len(fetches), max(read, 1e-9), max(1e-9, many - one) / (MANY - 1), one - read)


def _keys(device: Device, layout: ExpertLayout) -> dict[str, str]:
    """The key under which each field of `Costs` is stored."""
    size = f"{layout.hidden_size}x{layout.moe_intermediate_size} {layout.format}"
    return {name: f"{name} an expert of {size}, {device.kind}" for name in Costs.__dataclass_fields__}
