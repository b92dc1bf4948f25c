"""Predicts how fast a plan would run, from the rates of its machine. Pure, no torch."""

from dataclasses import dataclass

from dsv2_local.offload.plan import CPU_CHUNK, Plan
from dsv2_local.offload.plan_request import Mode
from dsv2_local.offload.sizes import GB, GIB, sizes_of

# Fraction of a rate that kernels reach, measured (docs/log.md): of RAM by a model on the CPU and by the CPU's share of
# offloaded experts, of GPU memory and of the link in decoding, of the GPU's matrix products in prefill.
CPU_EFFICIENCY, SHARE_EFFICIENCY, GPU_EFFICIENCY, LINK_EFFICIENCY, PREFILL_EFFICIENCY = 0.85, 0.95, 0.5, 0.9, 0.21
# Seconds of a decode step on a GPU that do not depend on bytes: for the step, for each layer (kernels that wait for one
# another), and for each layer of offloaded experts (the GPU and the host wait for each other).
STEP_SECONDS, LAYER_SECONDS, OFFLOAD_SECONDS = 250e-6, 45e-6, 50e-6
LAUNCH_SECONDS = 3e-3  # that the host takes to launch a layer's kernels in prefill
# Fraction of the PCIe link's speed if RAM is not page-locked: every copy passes through a buffer of the driver.
UNLOCKED = 0.5


@dataclass(frozen=True)
class Forecast:
    """Predicted tokens per second, and the assumptions behind them.

    Attributes:
        decode_tok_s, prefill_tok_s: tokens per second that the machine's rates allow.
        prefill_tokens: length of the prompt that `prefill_tok_s` is for.
        hit_rate: hit rate of even routing, slots over experts; the expert cache beats it on every trace so far.
        bound: what takes most of the time of a decoded token.
    """

    decode_tok_s: float
    prefill_tok_s: float
    prefill_tokens: int
    hit_rate: float
    bound: str


def notes(plan: Plan) -> list[str]:
    """What makes the plan slow, and what to do about it: one line each."""
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
            f"only {locked:,.1f} GiB of RAM may be page-locked (ulimit -l), so copies to the GPU run at about half "
            "the speed of the PCIe link; raise memlock in /etc/security/limits.conf"
        )
    return found


def forecast(plan: Plan) -> Forecast:
    """Predict the speed of a plan on its machine."""
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
    return _summarise(seconds, tokens / prefill, tokens, 0.0)


def _gpu_forecast(plan: Plan) -> Forecast:
    """Missing experts are split between PCIe copies and the CPU, which together read no faster than RAM allows."""
    mode = plan.mode
    sizes, rates = sizes_of(plan.request), plan.machine.rates
    hits = plan.slots / plan.experts if plan.experts else 1.0
    missed = (1 - hits) * sizes.experts_per_token
    from_disk = plan.disk_experts / max(1, plan.experts)
    link = rates.link * LINK_EFFICIENCY * (1 if plan.locked else UNLOCKED)
    cpu = 0.0 if mode is Mode.STREAM else rates.ram * SHARE_EFFICIENCY
    both = min(rates.ram, cpu + (0.0 if mode is Mode.CPU else link))
    on_gpus = sum(sizes.layers) + sizes.head + hits * sizes.experts_per_token
    layers, waiting = len(sizes.layers), 0 if plan.resident else len(plan.request.config.moe_layers)
    seconds = {
        "GPU memory": on_gpus / (rates.vram * GB * GPU_EFFICIENCY),
        "GPU latency": STEP_SECONDS + layers * LAYER_SECONDS + waiting * OFFLOAD_SECONDS,
        "RAM and link": (1 - from_disk) * missed / (both * GB),
        "disk": from_disk * missed / (rates.disk * GB),
    }
    tokens = min(plan.chunk, plan.request.context)
    streamed = plan.ram_experts * (1 - hits) * sizes.expert if plan.offloads else 0
    flops = tokens * sizes.flops
    prefill = max(
        # If the CPU computes the experts, it does most of the work.
        flops / ((rates.cpu_gflops if mode is Mode.CPU else rates.gpu_gflops * PREFILL_EFFICIENCY) * GB),
        layers * LAUNCH_SECONDS,
        plan.ram_experts * sizes.expert / (rates.ram * GB) if mode is Mode.CPU else 0.0,  # read once per chunk
        streamed / (link * GB),
        plan.disk_experts * sizes.expert / (rates.disk * GB),
    )
    return _summarise(seconds, tokens / prefill, tokens, hits)


def _summarise(seconds: dict[str, float], prefill: float, tokens: int, hits: float) -> Forecast:
    slowest = max(seconds, key=lambda name: seconds[name])
    return Forecast(1 / sum(seconds.values()), prefill, tokens, hits, slowest)
