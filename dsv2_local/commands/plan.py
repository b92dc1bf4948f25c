"""`dsv2 plan`: where a model's bytes would lie on this machine or an imagined one, and how fast that would be."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

from rich.table import Table
from rich.text import Text

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.released import read_config, stored_recipe
from dsv2_local.commands.console import notice, report_console
from dsv2_local.errors import InputError
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.machine import measurements
from dsv2_local.machine.resources import lockable_memory, memory_available
from dsv2_local.offload import forecast
from dsv2_local.offload.plan import MemoryShare, Plan, make_plan
from dsv2_local.offload.plan_request import RATES, Machine, Mode, PlanRequest, Rates, default_context
from dsv2_local.offload.sizes import GIB, STAGING_BUFFERS
from dsv2_local.options import one_of, size
from dsv2_local.quant.schema import Recipe

BAR = 64  # characters of a memory's bar
MARKS = "█▓▒░▚▖◆"  # of its parts, in order


@dataclass(frozen=True)
class PlanOptions:
    """The options of `dsv2 plan` as given; None: this machine's, or the model's."""

    model: str
    recipe: str | None = None
    vram: str | None = None
    ram: str | None = None
    context: str | None = None
    cache_dtype: str = CacheDtype.BF16
    rates: str = ""
    experts: str = Mode.AUTO


def run(options: PlanOptions, as_json: bool) -> None:
    """Print the plan on stdout.

    Raises:
        PlanError: the model does not fit.
        InputError: an option cannot be read, or the model has no such context.
    """
    made = make_plan(_plan_request(options), _machine(options))
    if as_json:
        sys.stdout.write(json.dumps(facts(options, made), indent=2) + "\n")
    else:
        _show(options, made)
    for note in forecast.notes(made):
        notice(note)


def _plan_request(options: PlanOptions) -> PlanRequest:
    config = read_config(options.model)
    recipe = one_of("--recipe", options.recipe or stored_recipe(options.model) or Recipe.NF4, Recipe)
    cache_dtype = one_of("--cache-type", options.cache_dtype, CacheDtype)
    experts = one_of("--experts", options.experts, Mode)
    return PlanRequest(config, recipe, _context(options.context, config), cache_dtype, experts)


def _context(text: str | None, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    context = default_context(config) if text is None else size("--context", text)
    if not 1 <= context <= limit:
        raise InputError(f"--context {context:,} must lie between 1 and the model's {limit:,} tokens")
    return context


def _machine(options: PlanOptions) -> Machine:
    """The machine that was described, or this one where it was not."""
    imagined = options.ram is not None
    rates = replace(Rates(), **({} if imagined else measurements.load(RATES)))
    ram = memory_available() if options.ram is None else size("--ram", options.ram)
    vram = free_vram() if options.vram is None else [size("--vram", part) for part in options.vram.split(",")]
    lockable = None if imagined else lockable_memory()
    return Machine(tuple(part for part in vram if part), ram, lockable, not imagined, _rates(options.rates, rates))


def _rates(text: str, others: Rates) -> Rates:
    """Those of "ram=80,link=25" in place of `others`."""
    given = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            given[name.strip()] = float(value)
        except ValueError:
            given[name.strip()] = 0.0
        if name.strip() not in RATES or not 0 < given[name.strip()] < inf:
            raise InputError(f"--rates {part!r} is not NAME=NUMBER with one of {', '.join(RATES)}")
    return replace(others, **given)


def free_vram() -> list[int]:
    """Free bytes of each NVIDIA GPU as its driver tells; none without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return [int(line) << 20 for line in done.stdout.split() if line.isdecimal()]


def facts(options: PlanOptions, made: Plan) -> dict[str, Any]:
    """The plan as plain values: the object that --json prints."""
    request = made.request
    memories = [
        {**asdict(share), "used": share.used, "free": share.free, "layers": list(share.layers)}
        for share in (*made.gpus, made.ram)
    ]
    return {
        "model": options.model,
        "recipe": str(request.recipe),
        "context": request.context,
        "cache": str(request.cache_dtype),
        "memories": memories,
        "experts": {
            "all": made.experts, "slots": made.slots, "ram": made.ram_experts, "disk": made.disk_experts,
            "resident": made.resident, "locked": made.locked, "mode": str(made.mode),
            "staging_buffers": STAGING_BUFFERS if made.offloads else 0, "staging_experts": made.staging_experts,
        },
        "prefill_chunk": made.chunk,
        "forecast": asdict(forecast.forecast(made)),
        "rates": asdict(made.machine.rates),
        "notes": forecast.notes(made),
    }  # fmt: skip


def _show(options: PlanOptions, made: Plan) -> None:
    console = report_console()
    request = made.request
    what = f"{options.model}, {request.recipe}, context {request.context:,} tokens ({request.cache_dtype} cache)"
    console.print(f"{what}: {_regime(made)}", markup=False, soft_wrap=True)
    for share in (*made.gpus, made.ram):
        console.print(_table(share))
        console.print(_bar(share))
    for line in _forecast_lines(made):
        console.print(line, markup=False, soft_wrap=True)
    sys.stdout.flush()


def _regime(made: Plan) -> str:
    if not made.gpus:
        return "all on the CPU"
    if made.resident:
        return "all on the GPU" if len(made.gpus) == 1 else f"all on {len(made.gpus)} GPUs"
    if made.mode is Mode.CPU:
        return "routed experts in RAM, computed by the CPU"
    return (
        f"{made.slots:,} of {made.experts:,} routed experts have a slot in GPU memory, the others stay in RAM "
        f"(--experts {made.mode})"
    )


def _table(share: MemoryShare) -> Table:
    where = f", layers {share.layers[0]} to {share.layers[1] - 1}" if share.layers[1] else ""
    table = Table(title=f"{share.name}, {share.capacity / GIB:,.1f} GiB{where}", title_justify="left")
    table.add_column("")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for mark, (name, nbytes) in zip(MARKS, share.parts.items(), strict=False):
        count = f" ({share.slots:,})" if name == "expert slots" else ""
        table.add_row(mark, name + count, f"{nbytes / GIB:,.2f}")
    table.add_row("·", "free", f"{share.free / GIB:,.2f}")
    return table


def _bar(share: MemoryShare) -> Text:
    """The parts in their order, each as long as its share of the memory."""
    bar, done = "", 0
    for mark, nbytes in zip(MARKS, share.parts.values(), strict=False):
        done += nbytes
        bar += mark * (round(BAR * done / share.capacity) - len(bar))
    return Text(bar.ljust(BAR, "·"))


def _forecast_lines(made: Plan) -> list[str]:
    expected, rates = forecast.forecast(made), made.machine.rates
    hits = f"; {expected.hit_rate:.0%} of the experts of a token have a slot if routing is even" if made.gpus else ""
    gpu = f", link {rates.link:g}, GPU memory {rates.vram:g}" if made.gpus else ""
    disk = f", disk {rates.disk:g}" if made.disk_experts else ""
    return [
        f"decode about {expected.decode_tok_s:,.1f} tok/s, bound by {expected.bound}{hits}",
        f"prefill about {expected.prefill_tok_s:,.0f} tok/s of {expected.prefill_tokens:,} tokens",
        f"reckoned with RAM at {rates.ram:.3g} GB/s{gpu}{disk}; `dsv2 bench` measures RAM, --rates sets any",
    ]
