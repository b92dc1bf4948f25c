"""How well the offload engine uses the PCIe link and the CPU, on a simulated device with set speeds of both.

    python benchmarks/offload.py [--json FILE]

Computing an expert is replaced by a pause as long as a CPU of that bandwidth needs, and the GPU takes no time; so the
times show only how long the parts wait for each other. Experts have V2-Lite's size.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout, Format
from dsv2_local.offload import offloaded_experts
from dsv2_local.offload.balance import Costs, divide
from dsv2_local.offload.device import Event
from dsv2_local.offload.expert_cache import ExpertCache
from dsv2_local.offload.expert_slots import ExpertSlots
from dsv2_local.offload.offloaded_experts import DeviceExperts, OffloadedExperts
from dsv2_local.offload.plan_request import Mode
from dsv2_local.offload.simulated_device import SimulatedDevice
from dsv2_local.offload.sizes import GB

LAYOUT = ExpertLayout(Format.NF4, 2048, 1408)
EXPERTS, PER_TOKEN, LAYERS = 64, 6, 4
TOKENS, PROMPT = 12, 512
REPEATS = 20  # measurements of the overhead; the best one counts
SPEEDS = [(0.5, 0.5), (0.5, 1.0), (1.0, 0.5), (0.25, 1.0), (2.0, 2.0)]  # GB/s of the PCIe link and of the CPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = {layer: torch.zeros(EXPERTS, LAYOUT.nbytes, dtype=torch.uint8) for layer in range(LAYERS)}
    result: dict[str, Any] = {
        "decode": [decode(records, link, cpu, slots) for link, cpu in SPEEDS for slots in (0, 64)]
    }
    result["prefill"] = [prefill(records, link, slots) for link in (2.0, 4.0) for slots in (0, 64)]
    result["overhead"] = [overhead(records, slots) for slots in (0, 64, EXPERTS * LAYERS)]
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


@contextmanager
def speeds(records: dict[int, Tensor], cpu: float) -> Iterator[None]:
    """Replace the kernels: an expert in RAM takes as long as reading it at `cpu` GB/s, one on a device no time."""
    in_ram = {layer.data_ptr() for layer in records.values()}

    def wait(x: Tensor, at: Tensor, layout: ExpertLayout, tokens: Tensor, slots: Tensor, out: Tensor) -> None:
        if at.data_ptr() in in_ram:
            time.sleep(len(set(slots.tolist())) * layout.nbytes / (cpu * GB))

    def alone(x: Tensor, at: Tensor, layout: ExpertLayout, ids: Tensor, weights: Tensor) -> Tensor:
        time.sleep(len(set(ids.flatten().tolist())) * layout.nbytes / (cpu * GB))
        return torch.zeros_like(x)

    with patch.object(ops, "expert_outputs", wait), patch.object(ops, "experts", alone):
        yield


def choices() -> list[list[Tensor]]:
    """The experts chosen by each token in each layer, with unequal popularity."""
    draw = random.Random(0)
    popularity = [[draw.expovariate(1) ** 2 for _ in range(EXPERTS)] for _ in range(LAYERS)]
    tokens = []
    for _ in range(TOKENS):
        layers = [[*dict.fromkeys(draw.choices(range(EXPERTS), weights, k=400))][:PER_TOKEN] for weights in popularity]
        tokens.append([torch.tensor([layer]) for layer in layers])
    return tokens


def decode(records: dict[int, Tensor], link: float, cpu: float, slots: int) -> dict[str, Any]:
    """Milliseconds per layer in each mode, and the least time for the missing experts of the last mode.

    `bound_ms` is the time of their bytes at the bandwidth of the link and the CPU together, `whole_ms` the time of the
    best split into whole experts.
    """
    fetch, read, whole = LAYOUT.nbytes / (link * GB), LAYOUT.nbytes / (cpu * GB), list[float]()

    def noted(counts: Sequence[int], costs: Costs) -> int:
        n = len(counts)
        whole.append(min(max(j * fetch, (n - j) * read) for j in range(n + 1)))
        return divide(counts, costs)

    result: dict[str, Any] = {"link_gb_s": link, "cpu_gb_s": cpu, "slots": slots}
    x, weights = torch.zeros(1, LAYOUT.hidden_size), torch.ones(1, PER_TOKEN)
    for mode in (Mode.CPU, Mode.STREAM, Mode.HYBRID):
        with speeds(records, cpu), patch.object(offloaded_experts, "divide", noted):
            experts = simulated_experts(records, mode, link, cpu, slots)
            start = time.perf_counter()
            for token in choices():
                for layer, ids in enumerate(token):
                    experts.start(layer, x, ids, weights)()
            result[f"{mode}_ms"] = (time.perf_counter() - start) / TOKENS / LAYERS * 1e3
            stats = experts.stats
            experts.close()
    missed = stats.misses * LAYOUT.nbytes / TOKENS / LAYERS
    result["bound_ms"] = missed / ((link + cpu) * GB) * 1e3
    result["whole_ms"] = sum(whole) / TOKENS / LAYERS * 1e3
    result["hit_rate"] = stats.hit_rate
    return result


def prefill(records: dict[int, Tensor], link: float, slots: int) -> dict[str, Any]:
    """Time of streamed layers, and what fraction of it their bytes need at the link's speed."""
    ids = torch.stack([torch.randperm(EXPERTS)[:PER_TOKEN] for _ in range(PROMPT)])
    x, weights = torch.zeros(PROMPT, LAYOUT.hidden_size), torch.ones(PROMPT, PER_TOKEN)
    with speeds(records, 1e-3):
        experts = simulated_experts(records, Mode.STREAM, link, 1.0, slots)
        before, start = experts.stats.fetched_bytes, time.perf_counter()
        for layer in records:
            experts.start(layer, x, ids, weights)()
        seconds = time.perf_counter() - start
        fetched = experts.stats.fetched_bytes - before
        assert experts.stats.streamed_layers == LAYERS
        experts.close()
    return {"link_gb_s": link, "slots": slots, "seconds": seconds, "of_bound": fetched / (link * GB) / seconds}


class DoneEvent:
    """An event that is done at once."""

    done, seconds = True, LAYOUT.nbytes / GB

    def wait(self) -> None: ...


class NullDevice(SimulatedDevice):
    """A device that does nothing and reports every operation as done at once."""

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Event] = ()) -> Event:
        return DoneEvent()

    def compute(self, work: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        return DoneEvent()


def overhead(records: dict[int, Tensor], slots: int) -> dict[str, float]:
    """Microseconds of Python per decoded layer, without kernels and copies; the best of `REPEATS` rounds."""
    costs = Costs(LAYOUT.nbytes / GB, LAYOUT.nbytes / GB, 0.0)
    expert_slots = ExpertSlots(NullDevice(), LAYOUT, ExpertCache(slots, LAYERS, EXPERTS), EXPERTS)
    experts = OffloadedExperts([DeviceExperts(expert_slots, LAYOUT, records, Mode.HYBRID, costs)])
    x, weights, tokens = torch.zeros(1, LAYOUT.hidden_size), torch.ones(1, PER_TOKEN), choices()
    best = inf
    with patch.object(ops, "expert_outputs", lambda *arguments: None), torch.inference_mode():
        for _ in range(REPEATS):
            start = time.perf_counter()
            for token in tokens:
                for layer, ids in enumerate(token):
                    experts.start(layer, x, ids, weights)()
            best = min(best, (time.perf_counter() - start) / TOKENS / LAYERS * 1e6)
    return {"slots": slots, "hit_rate": experts.stats.hit_rate, "us": best}


def show(result: dict[str, Any]) -> None:
    console = Console(highlight=False, width=140)
    table = Table(
        "link", "CPU", "slots", "hits", "CPU only", "stream", "hybrid", "x better", "bytes", "of it", "whole", "of it"
    )
    for run in result["decode"]:
        cpu, stream, hybrid, bound = (run[name] for name in ("cpu_ms", "stream_ms", "hybrid_ms", "bound_ms"))
        table.add_row(
            f"{run['link_gb_s']:g} GB/s", f"{run['cpu_gb_s']:g} GB/s", f"{run['slots']}", f"{run['hit_rate']:.0%}",
            f"{cpu:.2f} ms", f"{stream:.2f} ms", f"{hybrid:.2f} ms", f"{min(cpu, stream) / hybrid:.2f} x",
            f"{bound:.2f} ms", f"{bound / hybrid:.0%}",
            f"{run['whole_ms']:.2f} ms", f"{run['whole_ms'] / hybrid:.0%}",
        )  # fmt: skip
    console.print(table)
    for run in result["prefill"]:
        speed, slots = f"{run['link_gb_s']:g} GB/s", run["slots"]
        console.print(f"streamed prefill at {speed}, {slots} slots: {run['of_bound']:.1%} of the link's speed")
    for run in result["overhead"]:
        console.print(f"host time per layer, {run['slots']} slots, {run['hit_rate']:.0%} hits: {run['us']:.0f} µs")


def simulated_experts(records: dict[int, Tensor], mode: Mode, link: float, cpu: float, slots: int) -> OffloadedExperts:
    """Experts on a simulated device, all of whose slots are free."""
    costs = Costs(LAYOUT.nbytes / (link * GB), LAYOUT.nbytes / (cpu * GB), 0.0)
    expert_slots = ExpertSlots(SimulatedDevice(link=link), LAYOUT, ExpertCache(slots, LAYERS, EXPERTS), EXPERTS)
    return OffloadedExperts([DeviceExperts(expert_slots, LAYOUT, records, mode, costs)])


if __name__ == "__main__":
    main()
