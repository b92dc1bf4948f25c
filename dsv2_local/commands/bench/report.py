"""Turns measured times into the object that `--json` prints, and that object into tables."""

from dataclasses import asdict, replace
from statistics import harmonic_mean
from typing import Any

from rich.table import Table

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.commands.bench.parallel import ParallelRun, random_experts
from dsv2_local.commands.bench.settings import BenchPlan
from dsv2_local.commands.bench.subject import Subject
from dsv2_local.commands.bench.timing import DecodeRun, PrefillRun, layer_kind
from dsv2_local.commands.console import format_bytes, report_console
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.machine import measurements
from dsv2_local.offload.forecast import forecast
from dsv2_local.offload.plan import make_plan
from dsv2_local.offload.plan_request import RATES, Machine, PlanRequest, Rates

PARTS = ("attention", "dense", "shared", "routed", "head")


def machine_facts(decode: list[DecodeRun], matmul: float, threads: int) -> dict[str, Any]:
    """Facts about the machine; the bandwidth is the mean over all passes between the bursts of decoding."""
    read_gb_s = harmonic_mean([run.read_gb_s for run in decode])
    return {"read_gb_s": read_gb_s, "matmul_gflops": matmul, "threads": threads, "kernels": ops.variant()}


def model_facts(subject: Subject, cache_dtype: CacheDtype) -> dict[str, Any]:
    """Facts about the measured model."""
    return {
        "name": subject.name,
        "layers": subject.config.num_hidden_layers,
        "recipe": str(subject.recipe),
        "cache": str(cache_dtype),
        "parameters": sum(kind.parameters for kind in subject.kinds.values()),
        "active_weights_per_token": subject.active_weights,
        "weight_bytes": subject.weight_bytes,
    }


def prefill_facts(run: PrefillRun, subject: Subject) -> dict[str, Any]:
    """Speed of prefill. GFLOP/s count two operations per active weight and token, without attention's own products."""
    tok_s = run.tokens / run.seconds
    return {**asdict(run), "tok_s": tok_s, "gflops": 2 * subject.active_weights * tok_s / 1e9}


def decode_facts(run: DecodeRun, subject: Subject) -> dict[str, Any]:
    """Speed of decoding. GB/s count the weights, without the KV cache."""
    tok_s = run.steps / run.seconds
    gb_s = subject.bytes_per_token * tok_s / 1e9
    return {
        "context": run.context,
        "tok_s": tok_s,
        "bytes_per_token": subject.bytes_per_token,
        "gb_s": gb_s,
        "read_gb_s": run.read_gb_s,
        "read_fraction": gb_s / run.read_gb_s,
    }


def parallel_facts(run: ParallelRun, subject: Subject) -> dict[str, Any]:
    """Speed of decoding several sequences in common steps, of all of them together.

    `bound_tok_s` is what the memory bandwidth allows if experts were chosen at random. GB/s count the weights of the
    experts that were used, each once per step, without the KV cache.
    """
    tok_s, expected = run.sequences * run.steps / run.seconds, random_experts(subject.config, run.sequences)
    nbytes = subject.step_bytes(run.sequences, run.experts)
    gb_s = nbytes * run.steps / run.seconds / 1e9
    bound = run.sequences * run.read_gb_s * 1e9 / subject.step_bytes(run.sequences, expected)
    return {
        "sequences": run.sequences,
        "context": run.context,
        "tok_s": tok_s,
        "tok_s_each": tok_s / run.sequences,
        "experts_per_layer": run.experts,
        "random_experts_per_layer": expected,
        "bytes_per_step": nbytes,
        "gb_s": gb_s,
        "read_gb_s": run.read_gb_s,
        "read_fraction": gb_s / run.read_gb_s,
        "bound_tok_s": bound,
        "bound_fraction": tok_s / bound,
    }


def prediction(subject: Subject, context: int, machine: dict[str, Any]) -> dict[str, float]:
    """The speed that `dsv2 plan` predicts for this model, from the rates measured now and those known before."""
    known = {"cpu_gflops": machine["matmul_gflops"], **measurements.load(RATES), "ram": machine["read_gb_s"]}
    rates = replace(Rates(), **known)
    plan = make_plan(PlanRequest(subject.config, subject.recipe, context), Machine((), 1 << 50, rates=rates))
    expected = forecast(plan)
    return {"decode_tok_s": expected.decode_tok_s, "prefill_tok_s": expected.prefill_tok_s}


def part_facts(part_seconds: dict[str, float], steps: int) -> dict[str, float]:
    """Seconds per step of each part; "rest" is router, norms, embedding, rotation and choosing the token."""
    parts = {name: part_seconds[name] / steps for name in PARTS}
    whole = part_seconds["steps"]
    return {
        **parts,
        "rest": whole / steps - sum(parts.values()),
        "outside_kernels": 1 - part_seconds["kernels"] / whole,
    }


def cut_facts(plan: BenchPlan, seconds: float, part_seconds: dict[str, float]) -> dict[str, Any]:
    """Extrapolate from the layers of --layers to the whole model: a missing layer takes the mean time of its kind."""
    if plan.config == plan.whole:
        return {}
    steps = plan.lengths.decode
    step = seconds / steps
    for moe in (False, True):
        here, everywhere = (_layers_of_kind(config, moe) for config in (plan.config, plan.whole))
        if here:
            step += (everywhere - here) * part_seconds[layer_kind(moe)] / (here * steps)
    return {
        "layers": plan.config.num_hidden_layers,
        "total_layers": plan.whole.num_hidden_layers,
        "extrapolated": {"decode_tok_s": 1 / step},
    }


def _layers_of_kind(config: ModelConfig, moe: bool) -> int:
    return sum(config.is_moe(layer) == moe for layer in range(config.num_hidden_layers))


def rates(result: dict[str, Any], cache_bytes: int) -> dict[str, float]:
    """The rates to store for `dsv2 plan`.

    `cpu_gflops` only from a model that is larger than the CPU's caches, since a smaller one says nothing about others.
    """
    found = {"ram": result["machine"]["read_gb_s"]}
    if result["prefill"] and result["weight_bytes"] > 2 * cache_bytes:
        found["cpu_gflops"] = max(run["gflops"] for run in result["prefill"])
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


def heading(result: dict[str, Any]) -> str:
    """One line on the measured model."""
    model = result["model"]
    layers = f"{model['layers']} of {result['total_layers']}" if "total_layers" in result else f"{model['layers']}"
    return (
        f"{model['name']}, {model['recipe']}, {model['cache']} cache: {layers} layers, "
        f"{_millions(model['parameters'])} weights in {format_bytes(model['weight_bytes'])}; "
        f"{_millions(model['active_weights_per_token'])} active per token"
    )


def _heading(result: dict[str, Any]) -> tuple[str, str]:
    machine = result["machine"]
    return (
        heading(result),
        f"machine: {machine['threads']} threads, {machine['kernels']} kernels, reads {machine['read_gb_s']:,.1f} GB/s, "
        f"fp32 matrix product {machine['matmul_gflops']:,.0f} GFLOP/s",
    )


def _millions(count: int) -> str:
    return f"{count / 1e9:,.2f} billion" if count >= 1e9 else f"{count / 1e6:,.1f} million"


def _closing(result: dict[str, Any]) -> list[str]:
    predicted, decode = result["predicted"], result["decode"][0]
    lines = [
        f"peak memory {format_bytes(result['peak_rss_bytes'])}",
        f"decode: `dsv2 plan` predicts {predicted['decode_tok_s']:,.1f} tok/s at this bandwidth; measured "
        f"{decode['tok_s']:,.1f} at context {decode['context']:,}",
    ]
    if result["prefill"]:
        fastest = max(run["tok_s"] for run in result["prefill"])
        lines.append(f"prefill: predicted {predicted['prefill_tok_s']:,.1f} tok/s; measured {fastest:,.1f}")
    if "extrapolated" in result:
        lines.append(
            f"whole model of {result['total_layers']} layers: {result['extrapolated']['decode_tok_s']:,.2f} tok/s at "
            f"context {result['decode'][0]['context']:,}, EXTRAPOLATED from {result['layers']} layers, not measured"
        )
    return lines


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _prefill_table(result: dict[str, Any]) -> Table:
    table = table_of("Prefill", "tokens", "tok/s", "seconds", "first token", "GFLOP/s")
    for run in result["prefill"]:
        first = f"{run['first_token_seconds']:,.3f} s"
        table.add_row(
            f"{run['tokens']:,}", f"{run['tok_s']:,.2f}", f"{run['seconds']:,.3f}", first, f"{run['gflops']:,.1f}"
        )
    return table


def _decode_table(result: dict[str, Any]) -> Table:
    table = table_of("Decode", "context", "tok/s", "read per token", "GB/s", "of read bandwidth")
    for run in result["decode"]:
        table.add_row(
            f"{run['context']:,}",
            f"{run['tok_s']:,.2f}",
            format_bytes(run["bytes_per_token"]),
            f"{run['gb_s']:,.2f}",
            f"{run['read_fraction']:.0%}",
        )
    return table


def _parallel_table(result: dict[str, Any]) -> Table:
    runs = result["parallel"]
    table = table_of(
        f"Decode of several sequences in a step, at context {runs[0]['context']:,} (experts: in a layer and step)",
        "sequences", "tok/s", "each", "experts", "random", "read", "bound", "reached",
    )  # fmt: skip
    for run in runs:
        table.add_row(
            f"{run['sequences']}", f"{run['tok_s']:,.2f}", f"{run['tok_s_each']:,.2f}",
            f"{run['experts_per_layer']:,.1f}", f"{run['random_experts_per_layer']:,.1f}",
            format_bytes(run["bytes_per_step"]), f"{run['bound_tok_s']:,.2f}", f"{run['bound_fraction']:.0%}",
        )  # fmt: skip
    return table


def _parts_table(result: dict[str, Any]) -> Table:
    parts, context = dict(result["parts"]), result["decode"][0]["context"]
    outside, step = parts.pop("outside_kernels"), sum(parts.values())
    table = table_of(f"One decoded token at context {context:,}", "part", "ms", "share")
    table.columns[0].justify = "left"
    for name, seconds in parts.items():
        table.add_row(name, f"{seconds * 1e3:,.2f}", f"{seconds / step:.0%}")
    table.add_section()
    table.add_row("outside matrix kernels", f"{outside * step * 1e3:,.2f}", f"{outside:.0%}")
    return table
