"""GPU speed: the kernels, V2-Lite's shape with all experts in GPU memory, and both models' shapes with experts in RAM.

    python benchmarks/gpu.py [--json FILE]
    python benchmarks/gpu.py --interpret --tiny    # tests this program without a GPU; its times mean nothing

Weights are random. Each case with experts in RAM runs in every mode and is printed beside the plan's prediction.
Without a GPU, devices are simulated (`offload/simulated_device.py`) and Triton's interpreter runs the kernels.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv2_local.architectures.config import ModelConfig
    from dsv2_local.offload.device import Device, Event
    from dsv2_local.offload.plan import Plan
    from dsv2_local.offload.plan_request import Mode
    from dsv2_local.runtime.placement import ModelWeights

GIB = 1 << 30
TINY = {
    "model_type": "deepseek_v2", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
    "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 32,
    "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "topk_method": "greedy",
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128, "rope_theta": 10000, "eos_token_id": 1,
}  # fmt: skip
LARGE_LAYERS = 9  # layers of the 236B model: 17 GB, which takes little time to generate
LARGE_SLOTS = 0.1  # fraction of its experts that have a slot
ANSWER = 64  # tokens
LONG, LONG_PROMPT = "long", 131_072
Limit = int | float | str | None
"""Limit of GPU memory: bytes, a fraction of the experts in slots, no limit, or `LONG`: 131,072 tokens within 24 GiB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="run without a GPU, in Triton's interpreter")
    parser.add_argument("--tiny", action="store_true", help="use small shapes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    if args.interpret:
        os.environ |= {"TRITON_INTERPRET": "1", "DSV2_KERNELS": "triton"}  # before the kernels are imported
    start = time.perf_counter()
    for result in results(args.interpret, args.tiny):
        result["seconds"] = time.perf_counter() - start
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def results(interpret: bool, tiny: bool) -> Iterator[dict[str, Any]]:
    """All results so far as plain values, after every measurement."""
    import gpu_kernels

    from dsv2_local.architectures import released
    from dsv2_local.architectures.families import parse_config
    from dsv2_local.runtime.random_weights import first_layers

    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernels": gpu_kernels.measure("cpu" if interpret else "cuda", tiny),
        "models": [],
    }
    yield result
    lite = parse_config(TINY) if tiny else released.read_config("deepseek-v2-lite")
    models = [("V2-Lite", lite, [None, LONG, 8 * GIB, 4 * GIB, 3 * GIB])]
    if not tiny:
        large = first_layers(released.read_config("deepseek-v2"), LARGE_LAYERS)
        models.append((f"236B, {LARGE_LAYERS} layers", large, [LARGE_SLOTS]))
    for model in models:
        for measured in cases(*model, interpret, tiny):
            result["models"].append(measured)
            yield result


def cases(
    name: str, config: "ModelConfig", limits: list["Limit"], interpret: bool, tiny: bool
) -> Iterator[dict[str, Any]]:
    """Measure a model's shape within each limit of GPU memory, in each mode."""
    from dsv2_local.kernels import ops
    from dsv2_local.offload.plan_request import Mode
    from dsv2_local.quant.schema import Recipe
    from dsv2_local.runtime.placement import ModelWeights
    from dsv2_local.runtime.random_weights import build

    random_model = build(config, Recipe.NF4, threads=os.cpu_count() or 1)
    weights = ModelWeights(config, random_model.weights, random_model.layout, random_model.records)
    ops.set_threads(None, random_model.layout.format)
    for limit in limits:
        for mode in (Mode.GPU,) if limit in (None, LONG) else (Mode.HYBRID, Mode.STREAM, Mode.CPU):
            yield {"model": name, "mode": str(mode), **case(weights, mode, limit, interpret, tiny)}


def case(weights: "ModelWeights", mode: "Mode", limit: "Limit", interpret: bool, tiny: bool) -> dict[str, Any]:
    """Load the model, measure prefill and decode, and release the device."""
    import torch

    from dsv2_local.offload.forecast import forecast
    from dsv2_local.offload.offloaded_experts import OffloadedExperts
    from dsv2_local.runtime import placement
    from dsv2_local.runtime.engine import Engine, Request, Stats
    from dsv2_local.runtime.sampling_params import SamplingParams

    device, plan = planned(weights, mode, limit, interpret, tiny)
    placed = placement.place_on_devices(weights, plan, [device], torch.float32 if interpret else torch.bfloat16)
    engine = Engine(placed.model, plan.request.context, plan.request.cache_dtype, plan.chunk)
    vocab = weights.config.vocab_size
    prompts, answer = ((4,), 2) if tiny else ((16, engine.context - ANSWER), ANSWER)
    start = time.perf_counter()
    engine.warm_up()
    warm_up = time.perf_counter() - start
    greedy, runs = SamplingParams(temperature=0), []
    for prompt in prompts:  # the first run fills the slots and is not reported
        stats = Stats()
        engine.cache.clear()
        request = Request(torch.randint(vocab, (prompt,)).tolist(), greedy, max_tokens=answer)
        steps = engine.generate(request, stats)
        next(steps)
        start = time.perf_counter()
        for _ in steps:
            pass
        wall = time.perf_counter() - start
        runs.append(stats)
    measured: dict[str, Any] = {
        "slots": plan.slots, "experts": plan.experts, "prompt": prompts[-1], "prefill_tok_s": runs[-1].prefill_tok_s,
        "decode_tok_s": (answer - 1) / wall, "predicted_tok_s": forecast(plan).decode_tok_s,
        "warm_up_seconds": warm_up, "planned_bytes": plan.gpus[0].used - plan.gpus[0].parts["driver"],
    }  # fmt: skip
    if not interpret:
        measured["peak_bytes"] = torch.cuda.max_memory_allocated()
    if isinstance(placed.experts, OffloadedExperts):
        experts = placed.experts.stats
        measured |= {"hit_rate": experts.hit_rate, "fetched_bytes": experts.fetched_bytes, "retries": experts.retries}
        measured["link_gb_s"] = experts.fetched_bytes / experts.fetch_seconds / 1e9 if experts.fetch_seconds else 0.0
    placed.close()
    del placed, engine
    if not interpret:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return measured


def planned(
    weights: "ModelWeights", mode: "Mode", limit: "Limit", interpret: bool, tiny: bool
) -> tuple["Device", "Plan"]:
    """A device, and the plan of the model within the limit on the device's memory."""
    from dsv2_local.kernels.format import CacheDtype
    from dsv2_local.machine.resources import memory_available
    from dsv2_local.offload.cuda_device import CudaDevice
    from dsv2_local.offload.plan import CONTEXT_BYTES, make_plan
    from dsv2_local.offload.plan_request import Machine, Mode, PlanRequest
    from dsv2_local.offload.simulated_device import SimulatedDevice
    from dsv2_local.quant.schema import Recipe

    long = limit == LONG
    limit = 24 * GIB if isinstance(limit, str) else limit
    context = 16 if tiny else LONG_PROMPT + ANSWER if long else 4096 + ANSWER
    request = PlanRequest(weights.config, Recipe.NF4, context, CacheDtype.FP32 if interpret else CacheDtype.BF16, mode)

    class SynchronousDevice(SimulatedDevice):
        """Finishes all work before `compute` returns, because Triton's interpreter supports one thread at a time."""

        def compute(self, work: Callable[[], None], after: Sequence["Event"] = ()) -> "Event":
            event = super().compute(work, after)
            event.wait()
            return event

    device: Device = SynchronousDevice(capacity=GIB) if interpret else CudaDevice(0)
    vram = device.free + CONTEXT_BYTES
    if isinstance(limit, float) or (tiny and limit):
        whole = make_plan(replace(request, experts=Mode.STREAM), Machine((1 << 50,), 1 << 50))
        share = limit if isinstance(limit, float) else 0.5
        slots = int(whole.experts * share) * whole.expert_bytes
        vram = min(vram, whole.gpus[0].used - whole.gpus[0].parts["expert slots"] + slots)
    elif limit:
        vram = min(vram, int(limit))
    return device, make_plan(request, Machine((vram,), memory_available(), available=True))


def show(result: dict[str, Any]) -> None:
    import gpu_kernels
    from rich.console import Console
    from rich.table import Table

    gpu_kernels.show(result["kernels"])
    table = Table("model", "mode", "prompt", "slots", "hits", "prefill tok/s", "decode tok/s", "predicted", "link GB/s")
    for run in result["models"]:
        hits, link = (f"{run['hit_rate']:.0%}", f"{run['link_gb_s']:.1f}") if "hit_rate" in run else ("", "")
        table.add_row(
            run["model"], run["mode"], f"{run['prompt']:,}", f"{run['slots']:,}/{run['experts']:,}", hits,
            f"{run['prefill_tok_s']:,.1f}", f"{run['decode_tok_s']:,.1f}", f"{run['predicted_tok_s']:,.1f}", link,
        )  # fmt: skip
    Console(highlight=False, width=120).print(table)
    print(f"{result['kernels']['device']}, {result['date']}, {result['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
