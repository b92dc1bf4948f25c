"""Turns what was measured on GPUs into the object that `--json` prints, and that object into tables."""

from dataclasses import replace
from typing import Any

from rich.table import Table

from dsv2_local.commands.bench.gpu_case import Case
from dsv2_local.commands.bench.gpu_rates import MachineRates
from dsv2_local.commands.bench.gpu_timing import GpuRun
from dsv2_local.commands.bench.parallel import random_experts
from dsv2_local.commands.bench.report import heading, table_of
from dsv2_local.commands.console import format_bytes, report_console
from dsv2_local.offload.forecast import Forecast, forecast
from dsv2_local.offload.plan import Plan
from dsv2_local.offload.plan_request import Mode
from dsv2_local.offload.sizes import GB, GIB, sizes_of


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Where the model is stored."""
    return {
        "mode": str(plan.mode),
        "slots": plan.slots,
        "experts": plan.experts,
        "expert_bytes": plan.expert_bytes,
        "locked": plan.locked,
        "vram_bytes": [gpu.capacity for gpu in plan.gpus],
        "planned_bytes": [gpu.parts for gpu in plan.gpus],
    }


def prefill_facts(run: GpuRun, plan: Plan, rates: MachineRates) -> dict[str, Any]:
    """Speed of prefill, beside its bound and the forecast for a prompt of this length."""
    return {
        "tokens": run.tokens,
        "tok_s": run.tokens / run.seconds,
        "seconds": run.seconds,
        "first_token_seconds": run.first_token_seconds,
        "gflops": run.tokens / run.seconds * sizes_of(plan.request).flops / GB,
        **_expert_facts(run, plan, 1),
        **_bound_facts(run.seconds, *prefill_bound(run, plan, rates)),
        **_forecast_facts(run.tokens / run.seconds, _forecast(plan, rates, run.tokens).prefill_tok_s),
    }


def decode_facts(run: GpuRun, plan: Plan, rates: MachineRates) -> dict[str, Any]:
    """Speed of decoding, beside its bound and the forecast."""
    predicted, context = _forecast(plan, rates, plan.request.context), run.context
    return {
        "context": context,
        "tok_s": run.tokens / run.seconds,
        **_expert_facts(run, plan, run.tokens),
        **_bound_facts(run.seconds / run.tokens, *decode_bound(run, plan, rates)),
        **_forecast_facts(run.tokens / run.seconds, predicted.decode_tok_s),
        "predicted_hit_rate": predicted.hit_rate,
    }


def parallel_facts(run: GpuRun, plan: Plan, rates: MachineRates) -> dict[str, Any]:
    """Speed of decoding several sequences in common steps, of all of them together."""
    tok_s = run.tokens / run.seconds
    return {
        "sequences": run.sequences,
        "context": run.context,
        "tok_s": tok_s,
        "tok_s_each": tok_s / run.sequences,
        "random_experts_per_layer": random_experts(plan.request.config, run.sequences),
        **_expert_facts(run, plan, run.tokens),
        **_bound_facts(run.sequences * run.seconds / run.tokens, *parallel_bound(run, plan, rates)),
    }


def parallel_bound(run: GpuRun, plan: Plan, rates: MachineRates) -> tuple[float, str]:
    """The least seconds per step that memory and link allow, and which of them.

    If experts are offloaded: the bytes that were copied and those that the CPU computed, over the speeds that the mode
    uses. If they are resident: the bytes of dense weights and of as many experts as random choice takes.
    """
    sizes, config = sizes_of(plan.request), plan.request.config
    if run.experts is None:
        experts = len(config.moe_layers) * random_experts(config, run.sequences) * sizes.expert
        return (sum(sizes.layers) + sizes.head + experts) / (rates.gpu_gb_s * GB), "GPU memory"
    missed = (run.experts.fetched_bytes + run.experts.host_experts * sizes.expert) * run.sequences / run.tokens
    speed, limit = _missed_speed(plan, rates)
    return missed / speed, limit


def _missed_speed(plan: Plan, rates: MachineRates) -> tuple[float, str]:
    """Bytes per second at which experts without a slot can be used, and what limits it: RAM, the link, or both."""
    speeds = {"RAM": rates.read_gb_s, "link": rates.link_gb_s}
    used = {Mode.CPU: ["RAM"], Mode.STREAM: ["link"]}.get(plan.mode, ["RAM", "link"])
    return sum(speeds[name] for name in used) * GB, " and ".join(used)


def decode_bound(run: GpuRun, plan: Plan, rates: MachineRates) -> tuple[float, str]:
    """The least seconds per token that memory and link allow, and which of them.

    If experts are offloaded: the bytes that missed, over what the mode uses, RAM, the link or both. If they are
    resident: the bytes of all active weights over the speed of GPU memory.
    """
    sizes = sizes_of(plan.request)
    if run.experts is None:
        active = sum(sizes.layers) + sizes.head + sizes.experts_per_token
        return active / (rates.gpu_gb_s * GB), "GPU memory"
    missed = sizes.experts_per_token - run.experts.hits / run.tokens * sizes.expert
    speed, limit = _missed_speed(plan, rates)
    return missed / speed, limit


def prefill_bound(run: GpuRun, plan: Plan, rates: MachineRates) -> tuple[float, str]:
    """The least seconds of a prompt, and what limits it.

    If experts are streamed: the bytes of those without a slot, once per chunk, over the link. Else the operations of
    all tokens over the matrix product of the processor that computes the experts.
    """
    sizes = sizes_of(plan.request)
    if plan.offloads:
        chunks = -(-run.tokens // plan.chunk)
        return chunks * (plan.experts - plan.slots) * sizes.expert / (rates.link_gb_s * GB), "link"
    cpu = plan.mode is Mode.CPU
    speed = rates.matmul_gflops if cpu else rates.gpu_matmul_gflops
    return run.tokens * sizes.flops / (speed * GB), "CPU arithmetic" if cpu else "GPU arithmetic"


def _expert_facts(run: GpuRun, plan: Plan, tokens: int) -> dict[str, Any]:
    """What the routed experts did, divided by `tokens`; the seconds of copies and of the CPU overlap."""
    if run.experts is None:
        return {}
    experts = run.experts
    return {
        "hit_rate": experts.hit_rate,
        "link_bytes": experts.fetched_bytes / tokens,
        "cpu_bytes": experts.host_experts * plan.expert_bytes / tokens,
        "fetch_seconds": experts.fetch_seconds / tokens,
        "host_seconds": experts.host_seconds / tokens,
        "streamed_layers": experts.streamed_layers,
        "retries": experts.retries,
    }


def _bound_facts(seconds: float, least: float, bound: str) -> dict[str, Any]:
    return {"bound": bound, "bound_seconds": least, "bound_fraction": least / seconds}


def _forecast_facts(measured: float, predicted: float) -> dict[str, float]:
    return {"predicted_tok_s": predicted, "measured_over_predicted": measured / predicted}


def _forecast(plan: Plan, rates: MachineRates, prompt: int) -> Forecast:
    """The plan's forecast with the measured rates, for a prompt of this length."""
    machine = replace(plan.machine, rates=rates.known_to(plan.machine.rates))
    return forecast(replace(plan, machine=machine, request=replace(plan.request, context=prompt)))


def part_facts(parts: dict[str, float], step: float, plan: Plan) -> dict[str, float]:
    """Seconds of each part of a decoded token; the last entry is what remains of the step.

    If experts are offloaded, nearly all that remains is routed experts: copies, the CPU, and waiting for both.
    """
    rest = "rest" if plan.resident else "routed experts (link, CPU, waiting) and rest"
    return {**parts, rest: step - sum(parts.values())}


def memory_facts(allocated: list[int], before: list[int], used: list[int], ram_peak: int, plan: Plan) -> dict[str, Any]:
    """Peaks of memory beside the plan.

    Args:
        allocated: of each GPU: peak of torch's tensors.
        before, used: of each GPU: bytes in use by anything, before the model was placed and after it was measured.
        ram_peak: peak of this process's RAM.
        plan: where the model is stored.
    """
    driver = [gpu.parts["driver"] + gpu.parts["kernels"] for gpu in plan.gpus]
    return {
        "gpu_peak_bytes": allocated,
        "gpu_planned_bytes": [gpu.used - part for gpu, part in zip(plan.gpus, driver, strict=True)],
        "gpu_used_before_bytes": before,
        "gpu_used_bytes": used,
        "gpu_planned_with_driver_bytes": [gpu.used for gpu in plan.gpus],
        "ram_peak_bytes": ram_peak,
        "ram_planned_bytes": plan.ram.used - plan.ram.parts["system"],
    }


def cut_facts(case: Case, result: dict[str, Any]) -> dict[str, Any]:
    """Scale from the layers of --layers to the whole model; empty if nothing was cut.

    A missing layer takes the mean time of the measured MoE layers, with their hit rate.
    """
    here, everywhere = case.config.num_hidden_layers, case.whole.num_hidden_layers
    if here == everywhere:
        return {}
    moe, more = len(case.config.moe_layers), len(case.whole.moe_layers) - len(case.config.moe_layers)
    parts, step = result["parts"], 1 / result["decode"][0]["tok_s"]
    dense = parts.get("dense", 0.0) + parts["attention"] * (here - moe) / here
    seconds = step + max(0.0, step - parts["head"] - dense) / max(1, moe) * more
    return {
        "layers": here,
        "total_layers": everywhere,
        "extrapolated": {
            "decode_tok_s": 1 / seconds,
            "prefill_tok_s": max((run["tok_s"] for run in result["prefill"]), default=0.0) * here / everywhere,
        },
    }


def rates(result: dict[str, Any]) -> dict[str, float]:
    """The rates to store for `dsv2 plan`; the GPU's arithmetic only if no copies slowed the prefill."""
    machine = result["machine"]
    found = {"ram": machine["read_gb_s"], "link": machine["link_gb_s"], "vram": machine["gpu_gb_s"]}
    if result["plan"]["mode"] == Mode.GPU and result["prefill"]:
        found["gpu_gflops"] = max(run["gflops"] for run in result["prefill"])
    return found


def show(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    console = report_console()
    console.print(*_heading(result), sep="\n", markup=False, soft_wrap=True)
    tables = [_prefill_table(result), _decode_table(result), _parts_table(result)]
    if result["parallel"]:
        tables.insert(2, _parallel_table(result))
    for table in tables:
        console.print(table)
    console.print(*_closing(result), sep="\n", markup=False, soft_wrap=True)


def _heading(result: dict[str, Any]) -> tuple[str, ...]:
    machine, plan = result["machine"], result["plan"]
    gpus = ", ".join(f"{size / GIB:,.1f} GiB" for size in plan["vram_bytes"])
    return (
        heading(result),
        f"{result['device']}, {gpus} of memory: --experts {plan['mode']}, {plan['slots']:,} of {plan['experts']:,} "
        f"experts of {format_bytes(plan['expert_bytes'])} have a slot"
        + (
            "; experts in RAM are not page-locked"
            if plan["mode"] in ("hybrid", "stream") and not plan["locked"]
            else ""
        ),
        f"machine: {machine['threads']} threads, {machine['kernels']} kernels, RAM {machine['read_gb_s']:,.1f} GB/s, "
        f"link {machine['link_gb_s']:,.1f} GB/s, GPU memory {machine['gpu_gb_s']:,.0f} GB/s, matrix products "
        f"{machine['matmul_gflops']:,.0f} GFLOP/s (CPU, nf4) and {machine['gpu_matmul_gflops']:,.0f} (GPU, bf16)",
    )


def _prefill_table(result: dict[str, Any]) -> Table:
    table = table_of("Prefill", "tokens", "tok/s", "seconds", "link", "CPU", _bound(result["prefill"]), "forecast")
    for run in result["prefill"]:
        table.add_row(
            f"{run['tokens']:,}", f"{run['tok_s']:,.1f}", f"{run['seconds']:,.3f}", *_moved(run),
            f"{run['bound_fraction']:.0%}", f"{run['predicted_tok_s']:,.1f}",
        )  # fmt: skip
    return table


def _decode_table(result: dict[str, Any]) -> Table:
    table = table_of(
        "Decode, per token", "context", "tok/s", "hits", "link", "CPU", _bound(result["decode"]), "forecast"
    )
    for run in result["decode"]:
        table.add_row(
            f"{run['context']:,}", f"{run['tok_s']:,.2f}", f"{run['hit_rate']:.1%}" if "hit_rate" in run else "",
            *_moved(run), f"{run['bound_fraction']:.0%}", f"{run['predicted_tok_s']:,.2f}",
        )  # fmt: skip
    return table


def _parallel_table(result: dict[str, Any]) -> Table:
    runs = result["parallel"]
    table = table_of(
        f"Decode of several sequences in a step, at context {runs[0]['context']:,}", "sequences", "tok/s", "each",
        "random experts", "hits", "link", "CPU", _bound(runs),
    )  # fmt: skip
    for run in runs:
        table.add_row(
            f"{run['sequences']}", f"{run['tok_s']:,.2f}", f"{run['tok_s_each']:,.2f}",
            f"{run['random_experts_per_layer']:,.1f}", f"{run['hit_rate']:.1%}" if "hit_rate" in run else "",
            *_moved(run), f"{run['bound_fraction']:.0%}",
        )  # fmt: skip
    return table


def _bound(runs: list[dict[str, Any]]) -> str:
    """The heading of the column that says which fraction of the bound was reached."""
    return f"of {runs[0]['bound']}" if runs else "of bound"


def _moved(run: dict[str, Any]) -> tuple[str, str]:
    """Bytes that were copied over the link, and bytes of the experts that the CPU computed."""
    return (format_bytes(run["link_bytes"]), format_bytes(run["cpu_bytes"])) if "link_bytes" in run else ("", "")


def _parts_table(result: dict[str, Any]) -> Table:
    parts = result["parts"]
    table = table_of(f"One decoded token at context {result['decode'][0]['context']:,}", "part", "ms", "share")
    table.columns[0].justify = "left"
    step = sum(parts.values())
    for name, seconds in parts.items():
        table.add_row(name, f"{seconds * 1e3:,.3f}", f"{seconds / step:.0%}")
    return table


def _closing(result: dict[str, Any]) -> list[str]:
    memory = result["memory"]
    names = ("gpu_peak_bytes", "gpu_planned_bytes", "gpu_used_bytes", "gpu_planned_with_driver_bytes")
    lines = [
        f"GPU {number}: tensors {format_bytes(peak)} at most (planned {format_bytes(planned)}); memory in use "
        f"{format_bytes(used)} (planned with the driver's {format_bytes(with_driver)})"
        for number, (peak, planned, used, with_driver) in enumerate(zip(*(memory[name] for name in names), strict=True))
    ]
    lines.append(
        f"RAM: {format_bytes(memory['ram_peak_bytes'])} at most (planned {format_bytes(memory['ram_planned_bytes'])})"
    )
    if "host_seconds" in result["decode"][0]:
        first = result["decode"][0]
        lines.append(
            f"per token at context {first['context']:,}: {first['fetch_seconds'] * 1e3:,.2f} ms of copies beside "
            f"{first['host_seconds'] * 1e3:,.2f} ms of experts on the CPU; routing of {result['routing']}"
        )
    if "extrapolated" in result:
        whole = result["extrapolated"]
        lines.append(
            f"whole model of {result['total_layers']} layers: decode {whole['decode_tok_s']:,.2f} tok/s at context "
            f"{result['decode'][0]['context']:,}, prefill {whole['prefill_tok_s']:,.1f}, EXTRAPOLATED from "
            f"{result['layers']} layers with their hit rate, not measured"
        )
    return lines
