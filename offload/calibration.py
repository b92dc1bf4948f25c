"""What fetching and computing an expert take on this machine, measured while both happen at once.

That is how they happen: link and CPU share the bandwidth of RAM.
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

SECONDS = 1.0  # of each measurement
MANY = 32  # tokens of the second measurement of the CPU
AHEAD = 4  # copies that the link always has waiting


def costs(slots: ExpertSlots, layout: ExpertLayout, records: dict[int, Tensor]) -> Costs:
    """Those kept for this machine, GPU and size of experts, or newly measured and kept."""
    names = _names(slots.device, layout)
    known = measurements.load(names.values())
    if len(known) == len(names):
        return Costs(**{name: known[key] for name, key in names.items()})
    found = measure(slots, layout, records)
    keep(found, slots.device, layout)
    return found


def keep(costs: Costs, device: Device, layout: ExpertLayout) -> None:
    """Keep costs for the next run."""
    names = _names(device, layout)
    measurements.save({names[name]: value for name, value in asdict(costs).items()})


def measure(slots: ExpertSlots, layout: ExpertLayout, records: dict[int, Tensor], seconds: float = SECONDS) -> Costs:
    """Copy experts to a staging buffer for a while, and compute others on the CPU meanwhile, for one token and many."""
    every = [(layer, expert) for layer in records for expert in range(len(records[layer]))]
    target, fetches = slots.records[-1], list[float]()
    pending = [slots.device.copy([target], [records[layer][expert]]) for layer, expert in every[:AHEAD]]
    taken, at = {1: [0.0, 0], MANY: [0.0, 0]}, 0
    for tokens in taken:
        x = torch.randn(tokens, layout.hidden_size)
        rows = torch.arange(tokens)
        until = perf_counter() + seconds
        while perf_counter() < until:
            while pending[0].done:
                fetches.append(pending.pop(0).seconds)
                layer, expert = every[(at + len(fetches)) % len(every)]
                pending.append(slots.device.copy([target], [records[layer][expert]]))
            # From the other end, so that the caches hold nothing of it.
            layer, expert = every[-1 - at % len(every)]
            start = perf_counter()
            ops.expert_outputs(x, records[layer], layout, rows, torch.full_like(rows, expert), torch.empty_like(x))
            taken[tokens][0] += perf_counter() - start
            taken[tokens][1] += 1
            at += 1
    for event in pending:
        event.wait()
        fetches.append(event.seconds)
    one, many = (spent / count for spent, count in taken.values())
    return Costs(sum(fetches) / len(fetches), one, max(1e-9, many - one) / (MANY - 1))


def _names(device: Device, layout: ExpertLayout) -> dict[str, str]:
    size = f"{layout.hidden_size}x{layout.moe_intermediate_size} {layout.format}"
    return {name: f"{name} an expert of {size}, {device.kind}" for name in Costs.__dataclass_fields__}
