"""`dsv2 plan`: which memory would hold what of a model, here or on another machine, and how fast it would run."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.released import RELEASED, read_config, stored_recipe
from dsv2_local.commands.console import json_text, notice, report_console
from dsv2_local.commands.streams import is_unicode
from dsv2_local.errors import InputError
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.machine import measurements
from dsv2_local.machine.homes import expanded
from dsv2_local.machine.resources import lockable_memory, memory_available
from dsv2_local.offload import forecast
from dsv2_local.offload.plan import MemoryShare, Plan, make_plan
from dsv2_local.offload.plan_request import (
    DEFAULT_PARALLEL,
    RATES,
    Machine,
    Mode,
    PlanRequest,
    Rates,
    default_context,
)
from dsv2_local.offload.sizes import GIB, STAGING_BUFFERS
from dsv2_local.options import one_of, size, tokens
from dsv2_local.quant.schema import Recipe
from dsv2_local.values import Number, checked

RATE = Number(1e-3, 1e9)  # GB/s or GFLOP/s
BAR = 64  # width of a memory's bar in characters
MARKS = ("█▓▒░▚▖◆·", "#%=-+~@.")  # for its parts in order, at last for what is free; in Unicode, and in ASCII


@dataclass(frozen=True)
class PlanOptions:
    """The options of `dsv2 plan` as they were given; None: the value of this machine or of the model."""

    model: str
    recipe: str | None = None
    vram: str | None = None
    ram: str | None = None
    context: str | None = None
    cache_dtype: str = CacheDtype.BF16
    rates: str = ""
    experts: str = Mode.AUTO
    parallel: int | None = None


def run(options: PlanOptions, as_json: bool) -> None:
    """Print the plan on stdout.

    Raises:
        PlanError: the model does not fit.
        InputError: an option is not valid, or the model's context is shorter than requested.
    """
    plan = make_plan(_plan_request(options), _machine(options))
    if as_json:
        sys.stdout.write(json_text(facts(options, plan), indent=2) + "\n")
    else:
        _show(options, plan)
    for note in forecast.notes(plan):
        notice(note)


def _plan_request(options: PlanOptions) -> PlanRequest:
    model = _located(options.model)
    config = read_config(model)
    recipe = one_of("--recipe", options.recipe or stored_recipe(model) or Recipe.NF4, Recipe)
    cache_dtype = one_of("--cache-type", options.cache_dtype, CacheDtype)
    experts = one_of("--experts", options.experts, Mode)
    parallel = DEFAULT_PARALLEL if options.parallel is None else options.parallel
    parallel = checked("--parallel", parallel, Number(1, whole=True), InputError)
    return PlanRequest(config, recipe, _context(options.context, config), cache_dtype, experts, parallel)


def _located(model: str) -> str:
    """The model's name, or the path that it stands for.

    Raises:
        InputError: there is no such path, but one with a name like it.
        ConfigError: it is a directory without a config.json; the message says what it holds.
    """
    if model in RELEASED or not model:
        return model
    path = expanded(Path(model))
    directory = os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
    if os.path.lexists(path / "config.json" if directory else path):
        return str(path)
    from dsv2_local.quant.local import near, require_config  # imports torch, which a plan does not need

    if directory:
        require_config(path)
    if meant := near(path):
        raise InputError(f"there is no model {model}{meant}")
    return str(path)


def _context(text: str | None, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    context = default_context(config) if text is None else tokens("--context", text)
    if not 1 <= context <= limit:
        raise InputError(f"--context must be between 1 and the model's {limit:,} tokens, not {context:,}")
    return context


def _machine(options: PlanOptions) -> Machine:
    """The machine to plan for: this one, unless the options describe another (those with --ram do)."""
    other = options.ram is not None
    rates = replace(Rates(), **({} if other else measurements.load(RATES)))
    ram = memory_available() if options.ram is None else size("--ram", options.ram)
    vram = free_vram() if options.vram is None else [size("--vram", part) for part in options.vram.split(",")]
    lockable = None if other else lockable_memory()
    return Machine(tuple(part for part in vram if part), ram, lockable, not other, _rates(options.rates, rates))


def _rates(text: str, others: Rates) -> Rates:
    """Parse "ram=80,link=25"; rates that it does not name are those of `others`."""
    given = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        with suppress(ValueError):
            given[name.strip()] = RATE.read(float(value))
        if name.strip() not in RATES or name.strip() not in given:
            raise InputError(f"--rates {part!r} is not NAME=NUMBER with a name of {', '.join(RATES)}")
    return replace(others, **given)


def free_vram() -> list[int]:
    """Free memory of each NVIDIA GPU in bytes, from nvidia-smi; empty without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return [int(line) << 20 for line in done.stdout.split() if line.isdecimal()]


def facts(options: PlanOptions, plan: Plan) -> dict[str, Any]:
    """The plan as plain values: the object that --json prints."""
    request = plan.request
    memories = [
        {**asdict(share), "used": share.used, "free": share.free, "layers": list(share.layers)}
        for share in (*plan.gpus, plan.ram)
    ]
    return {
        "model": options.model,
        "recipe": str(request.recipe),
        "context": request.context,
        "cache": str(request.cache_dtype),
        "memories": memories,
        "experts": {
            "all": plan.experts, "slots": plan.slots, "ram": plan.ram_experts, "disk": plan.disk_experts,
            "resident": plan.resident, "locked": plan.locked, "mode": str(plan.mode),
            "staging_buffers": STAGING_BUFFERS if plan.offloads else 0, "staging_experts": plan.staging_experts,
        },
        "prefill_chunk": plan.chunk,
        "forecast": asdict(forecast.forecast(plan)),
        "rates": asdict(plan.machine.rates),
        "notes": forecast.notes(plan),
    }  # fmt: skip


def _show(options: PlanOptions, plan: Plan) -> None:
    console = report_console()
    request = plan.request
    what = f"{options.model}, {request.recipe}, context {request.context:,} tokens ({request.cache_dtype} cache)"
    console.print(f"{what}: {_regime(plan)}", markup=False, soft_wrap=True)
    marks = MARKS[0 if is_unicode(sys.stdout) else 1]
    for share in (*plan.gpus, plan.ram):
        console.print(_table(share, marks))
        console.print(_bar(share, marks))
    for line in _forecast_lines(plan):
        console.print(line, markup=False, soft_wrap=True)
    sys.stdout.flush()


def _regime(plan: Plan) -> str:
    if not plan.gpus:
        return "all on the CPU"
    if plan.resident:
        return "all on the GPU" if len(plan.gpus) == 1 else f"all on {len(plan.gpus)} GPUs"
    if plan.mode is Mode.CPU:
        return "routed experts in RAM and computed by the CPU"
    return (
        f"{plan.slots:,} of {plan.experts:,} routed experts have a slot in GPU memory, the others stay in RAM "
        f"(--experts {plan.mode})"
    )


def _table(share: MemoryShare, marks: str) -> Table:
    where = f", layers {share.layers[0]} to {share.layers[1] - 1}" if share.layers[1] else ""
    table = Table(title=f"{share.name}, {share.capacity / GIB:,.1f} GiB{where}", title_justify="left")
    table.add_column("")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for mark, (name, nbytes) in zip(marks, share.parts.items(), strict=False):
        count = f" ({share.slots:,})" if name == "expert slots" else ""
        table.add_row(mark, name + count, f"{nbytes / GIB:,.2f}")
    table.add_row(marks[-1], "free", f"{share.free / GIB:,.2f}")
    return table


def _bar(share: MemoryShare, marks: str) -> Text:
    """A bar of the memory's parts, in order, each with a length in proportion to its bytes."""
    bar, done = "", 0
    for mark, nbytes in zip(marks, share.parts.values(), strict=False):
        done += nbytes
        bar += mark * (round(BAR * done / share.capacity) - len(bar))
    return Text(bar.ljust(BAR, marks[-1]))


def _forecast_lines(plan: Plan) -> list[str]:
    expected, rates = forecast.forecast(plan), plan.machine.rates
    hits = f"; {expected.hit_rate:.0%} of a token's experts have a slot if routing is even" if plan.gpus else ""
    gpu = f", PCIe link {rates.link:g}, GPU memory {rates.vram:g}" if plan.gpus else ""
    disk = f", disk {rates.disk:g}" if plan.disk_experts else ""
    return [
        f"decode about {expected.decode_tok_s:,.1f} tok/s, bound by {expected.bound}{hits}",
        f"prefill about {expected.prefill_tok_s:,.0f} tok/s for {expected.prefill_tokens:,} tokens",
        f"assuming RAM at {rates.ram:.3g} GB/s{gpu}{disk}; `dsv2 bench` measures RAM, --rates sets any rate",
    ]
