"""How fast a plan would run, from the rates of its machine. Pure, no torch."""

from dataclasses import dataclass

from dsv2_local.offload.plan import CPU_CHUNK, Plan
from dsv2_local.offload.plan_request import Mode
from dsv2_local.offload.sizes import GB, GIB, sizes_of

# Shares of a memory's bandwidth that kernels reach; docs/log.md has the CPU's, the GPU's is a target.
CPU_EFFICIENCY, GPU_EFFICIENCY, LINK_EFFICIENCY = 0.85, 0.8, 0.9
UNLOCKED = 0.5  # of the link's speed, where RAM is not page-locked and every copy goes through the driver's buffer


@dataclass(frozen=True)
class Forecast:
    """Tokens per second that the machine's rates allow, and what they rest on.

    Attributes:
        prefill_tokens: tokens of the prompt that `prefill_tok_s` is for.
        hit_rate: that of even routing, slots over experts; `expert_cache` does better on every trace so far.
        bound: what takes most of a decoded token's time.
    """

    decode_tok_s: float
    prefill_tok_s: float
    prefill_tokens: int
    hit_rate: float
    bound: str


def notes(plan: Plan) -> list[str]:
    """What slows it down, and what to do about it."""
    found = []
    if plan.disk_experts:
        size = plan.disk_experts * plan.expert_bytes
        found.append(
            f"{plan.disk_experts:,} of {plan.experts:,} experts ({size / GB:,.1f} GB) do not fit in RAM and are "
            f"read from disk when they are needed: expect about {forecast(plan).decode_tok_s:,.2g} tok/s, if the "
            f"disk reads {plan.machine.rates.disk:g} GB/s"
        )
    if plan.offloads and not plan.locked:
        locked = (plan.machine.lockable or 0) / GIB
        found.append(
            f"only {locked:,.1f} GiB of RAM may be page-locked (ulimit -l), so that copies to the GPU run at about "
            "half of the link's speed; raise memlock in /etc/security/limits.conf"
        )
    return found


def forecast(plan: Plan) -> Forecast:
    """What the plan's machine would reach."""
    return _gpu_forecast(plan) if plan.gpus else _cpu_forecast(plan)


def _cpu_forecast(plan: Plan) -> Forecast:
    sizes, rates = sizes_of(plan.request), plan.machine.rates
    from_disk = plan.disk_experts / max(1, plan.experts)
    dense = sum(sizes.layers) + sizes.head
    seconds = {
        "RAM": (dense + (1 - from_disk) * sizes.experts_per_token) / (rates.ram * GB * CPU_EFFICIENCY),
        "disk": from_disk * sizes.experts_per_token / (rates.disk * GB),
    }
    tokens = min(CPU_CHUNK, plan.request.context)
    prefill = max(tokens * sizes.flops / (rates.cpu_gflops * GB), plan.disk_experts * sizes.expert / (rates.disk * GB))
    return _figures(seconds, tokens / prefill, tokens, 0.0)


def _gpu_forecast(plan: Plan) -> Forecast:
    """Misses are shared between the link and the CPU, which together read no faster than RAM gives."""
    mode = plan.mode
    sizes, rates = sizes_of(plan.request), plan.machine.rates
    hits = plan.slots / plan.experts if plan.experts else 1.0
    missed = (1 - hits) * sizes.experts_per_token
    from_disk = plan.disk_experts / max(1, plan.experts)
    link = rates.link * LINK_EFFICIENCY * (1 if plan.locked else UNLOCKED)
    cpu = 0.0 if mode is Mode.STREAM else rates.ram * CPU_EFFICIENCY
    both = min(rates.ram, cpu + (0.0 if mode is Mode.CPU else link))
    on_gpus = sum(sizes.layers) + sizes.head + hits * sizes.experts_per_token
    seconds = {
        "GPU memory": on_gpus / (rates.vram * GB * GPU_EFFICIENCY),
        "RAM and link": (1 - from_disk) * missed / (both * GB),
        "disk": from_disk * missed / (rates.disk * GB),
    }
    tokens = min(plan.chunk, plan.request.context)
    streamed = plan.ram_experts * (1 - hits) * sizes.expert if plan.offloads else 0
    flops = tokens * sizes.flops
    prefill = max(
        # Where the CPU computes the experts, most of the work is its own.
        flops / ((rates.cpu_gflops if mode is Mode.CPU else rates.gpu_gflops) * GB),
        streamed / (link * GB),
        plan.disk_experts * sizes.expert / (rates.disk * GB),
    )
    return _figures(seconds, tokens / prefill, tokens, hits)


def _figures(seconds: dict[str, float], prefill: float, tokens: int, hits: float) -> Forecast:
    slowest = max(seconds, key=lambda name: seconds[name])
    return Forecast(1 / sum(seconds.values()), prefill, tokens, hits, slowest)
