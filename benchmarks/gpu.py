"""GPU speed of the 236B model's shape and of V2-Lite's: expert offloading in every mode, and experts all on the GPU.

    python benchmarks/gpu.py [--json FILE] [--only lite-gpu,236b-24g-hybrid] [--layers 30] [--seconds 240] [--kernels]
    python benchmarks/gpu.py --interpret --tiny    # tests this program without a GPU; its times mean nothing

Weights are random; each shape is built once, in page-locked RAM, and placed for each of its cases. Every case is what
`dsv2 bench` measures. The file is written after every case, so that an interruption loses only the current one.
Without a GPU, devices are simulated (`offload/simulated_device.py`) and Triton's interpreter runs the kernels.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv2_local.architectures.config import ModelConfig
    from dsv2_local.commands.bench.gpu_case import Case
    from dsv2_local.commands.bench.gpu_rates import MachineRates
    from dsv2_local.offload.device import Device, Event
    from dsv2_local.offload.plan_request import Machine, PlanRequest
    from dsv2_local.runtime.placement import ModelWeights

GIB = 1 << 30
SPARE = 6 * GIB  # RAM that the largest model leaves free, besides what its plan counts
TINY = {
    "model_type": "deepseek_v2", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
    "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 32,
    "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "topk_method": "greedy",
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128, "rope_theta": 10000, "eos_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """A case to measure.

    Attributes:
        name: its name for --only.
        shape: the released model that has this shape.
        mode: where the routed experts are computed.
        vram: limit of GPU memory in bytes; None: all of the card's.
        prompts, contexts, decode: tokens, as `dsv2 bench` takes them.
    """

    name: str
    shape: str
    mode: str
    vram: int | None
    prompts: tuple[int, ...] = (512, 4096)
    contexts: tuple[int, ...] = (0, 4096, 32768)
    decode: int = 64


# The modes that differ in decoding alone are measured at one length, since a minute of a GPU is expensive; the CPU
# would take minutes for long prompts of the 236B model.
CASES = (
    Wanted("236b-24g-hybrid", "deepseek-v2", "hybrid", 24 * GIB, (512, 4096, 8192), decode=32),
    Wanted("236b-24g-stream", "deepseek-v2", "stream", 24 * GIB, (4096,), (4096,), 32),
    Wanted("236b-24g-cpu", "deepseek-v2", "cpu", 24 * GIB, (128,), (4096,), 32),
    Wanted("236b-hybrid", "deepseek-v2", "hybrid", None, (512, 4096, 8192), decode=32),
    Wanted("236b-stream", "deepseek-v2", "stream", None, (4096,), (4096,), 32),
    Wanted("lite-8g-hybrid", "deepseek-v2-lite", "hybrid", 8 * GIB),
    Wanted("lite-8g-stream", "deepseek-v2-lite", "stream", 8 * GIB, (4096,), (4096,)),
    Wanted("lite-8g-cpu", "deepseek-v2-lite", "cpu", 8 * GIB, (512,), (4096,)),
    Wanted("lite-gpu", "deepseek-v2-lite", "gpu", None),
)
MORE_CASES = (  # only if --only names them
    Wanted("lite-long", "deepseek-v2-lite", "gpu", 24 * GIB, (131_072,), (131_072,)),
    Wanted("lite-4g-hybrid", "deepseek-v2-lite", "hybrid", 4 * GIB, (4096,), (4096,)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file, after every case")
    names = ", ".join(case.name for case in (*CASES, *MORE_CASES))
    parser.add_argument("--only", metavar="NAME,…", help=f"measure these cases: {names}")
    parser.add_argument("--layers", type=int, help="layers of the 236B shape (default: as many as fit in RAM)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="skip cases that would start after this")
    parser.add_argument("--kernels", action="store_true", help="measure the kernels first (benchmarks/gpu_kernels.py)")
    parser.add_argument("--interpret", action="store_true", help="run without a GPU, in Triton's interpreter")
    parser.add_argument("--tiny", action="store_true", help="use small shapes")
    args = parser.parse_args()
    if args.interpret:
        os.environ |= {"TRITON_INTERPRET": "1", "DSV2_KERNELS": "triton"}  # before the kernels are imported
    run = Run(args)
    run.measure()
    if run.result["failed"]:
        sys.exit(f"failed: {', '.join(run.result['failed'])}")


def chosen(only: str | None) -> tuple[Wanted, ...]:
    """The cases that --only names, in their usual order; by default those of `CASES`."""
    if only is None:
        return CASES
    known = {case.name: case for case in (*CASES, *MORE_CASES)}
    if unknown := [name for name in only.split(",") if name not in known]:
        sys.exit(f"--only: {unknown[0]!r} is none of {', '.join(known)}")
    return tuple(case for name, case in known.items() if name in only.split(","))


class Run:
    """One run of the program.

    Attributes:
        result: all results so far as plain values.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._start, self._cases = args, time.perf_counter(), chosen(args.only)
        self.result: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": self.device().kind,
            "commit": commit(),
            "software": {name: version(name) for name in ("torch", "triton", "bitsandbytes")}
            | {"python": platform.python_version()},
            "cases": [], "skipped": [], "failed": [], "phases": {},
        }  # fmt: skip

    def device(self) -> "Device":
        """The GPU, or a new simulated device."""
        from dsv2_local.offload.cuda_device import CudaDevice
        from dsv2_local.offload.simulated_device import SimulatedDevice

        class SynchronousDevice(SimulatedDevice):
            """Finishes work before `compute` returns, because Triton's interpreter supports one thread at a time."""

            def compute(self, work: Callable[[], None], after: Sequence["Event"] = ()) -> "Event":
                event = super().compute(work, after)
                event.wait()
                return event

        return SynchronousDevice(capacity=2 * GIB) if self._args.interpret else CudaDevice(0)

    def measure(self) -> None:
        if self._args.tiny:
            shorten()
        if self._args.kernels:
            import gpu_kernels

            with self._phase("kernels"):
                self.result["kernels"] = gpu_kernels.measure("cpu" if self._args.interpret else "cuda", self._args.tiny)
            gpu_kernels.show(self.result["kernels"])
            self._save()
        for shape, cases in groupby(self._cases, key=lambda case: case.shape):
            self._measure_shape(shape, list(cases))
        self._save()
        show(self.result)

    def _measure_shape(self, shape: str, cases: list[Wanted]) -> None:
        """Build a shape once, and measure all of its cases."""
        from dsv2_local.commands.bench import gpu, gpu_case, settings
        from dsv2_local.quant.schema import Recipe
        from dsv2_local.runtime.random_weights import Builder

        if self._late():
            self.result["skipped"] += [case.name for case in cases]
            return
        threads, lender = settings.use_threads(None, Recipe.NF4), self.device()
        whole, config, machine = self._settled(shape, cases, lender)

        def building(done: int, total: int) -> None:
            self._note(f"{shape}: building, {done / 1e9:,.0f} of {total / 1e9:,.0f} GB") if done in (0, total) else None

        with (
            self._phase(f"{shape}: all"),
            Builder(config, Recipe.NF4, threads=threads) as builder,
            gpu_case.random_weights(builder, lender, building, in_ram=True) as weights,
        ):
            with self._phase(f"{shape}: measuring the machine"):
                rates = gpu.machine_rates(weights, lender, threads)
            self._note(f"{rates}, page-locked {weights.arena.locked / 1e9:,.1f} GB" if weights.arena else f"{rates}")
            for case in cases:
                if self._late():
                    self.result["skipped"].append(case.name)
                    continue
                self._measure_case(case, whole, config, machine, weights, rates)
                self._save()
        lender.close()

    def _settled(
        self, shape: str, cases: list[Wanted], device: "Device"
    ) -> tuple["ModelConfig", "ModelConfig", "Machine"]:
        """The whole architecture, its layers to measure, and the machine with what is free now."""
        from dsv2_local import workstation
        from dsv2_local.architectures import released
        from dsv2_local.architectures.families import parse_config
        from dsv2_local.commands.bench import gpu_case
        from dsv2_local.runtime.random_weights import first_layers

        whole = parse_config(TINY) if self._args.tiny else released.read_config(shape)
        machine = workstation.this_machine([device], None)
        machine = replace(machine, ram=machine.ram - (0 if self._args.tiny else SPARE), lockable=None)
        largest = shape == "deepseek-v2" and not self._args.tiny
        layers = self._args.layers if largest else None
        if layers is None:
            layers = gpu_case.layers_that_fit(self._request(whole, cases[0], device), machine)
        self._note(f"{shape}: {layers} of {whole.num_hidden_layers} layers")
        return whole, first_layers(whole, layers), machine

    def _request(self, config: "ModelConfig", case: Wanted, device: "Device") -> "PlanRequest":
        from dsv2_local.commands.bench import gpu_case
        from dsv2_local.commands.bench.settings import Lengths
        from dsv2_local.kernels.format import CacheDtype
        from dsv2_local.offload.plan_request import Mode, PlanRequest
        from dsv2_local.quant.schema import Recipe

        cache = gpu_case.cache_dtype_on(device, Recipe.NF4, self._dtype(), CacheDtype.BF16)
        # The cases of a shape have the same KV cache, so that their slots can be compared.
        alike = [case, *(other for other in CASES if other.shape == case.shape)]
        context = max(Lengths(*lengths(each, self._args.tiny)).cache for each in alike)
        return PlanRequest(config, Recipe.NF4, context, cache, Mode(case.mode))

    def _dtype(self) -> Any:
        import torch

        return torch.float32 if self._args.interpret else torch.bfloat16

    def _measure_case(
        self,
        wanted: Wanted,
        whole: "ModelConfig",
        config: "ModelConfig",
        machine: "Machine",
        weights: "ModelWeights",
        rates: "MachineRates",
    ) -> None:
        """Measure a case; one that fails is noted, and the next one gets its turn."""
        from dsv2_local.commands.bench import gpu, gpu_rates

        gc.collect()  # the tensors of a case that failed
        device = self.device()
        gpu_rates.free_cached(device)
        phases = gpu.Phases(lambda text: None, self._ended(wanted.name))
        try:
            case = self._case(wanted, whole, config, machine, device)
            measured = gpu.measure_case(case, weights, [device], rates, phases)
            self.result["cases"].append({"case": wanted.name, **measured, "phases": phases.seconds})
        except Exception as error:  # the machine is there for a short time only
            traceback.print_exc()
            self.result["failed"].append(wanted.name)
            self._note(f"{wanted.name} failed: {error}")

    def _case(
        self, wanted: Wanted, whole: "ModelConfig", config: "ModelConfig", machine: "Machine", device: "Device"
    ) -> "Case":
        """Plan the case on what was free before its shape was built."""
        from dsv2_local.commands.bench.gpu_case import Case, plan_of_random_weights
        from dsv2_local.commands.bench.settings import Lengths
        from dsv2_local.offload.plan import CONTEXT_BYTES, make_plan
        from dsv2_local.offload.plan_request import Mode

        request, vram = self._request(config, wanted, device), device.free + CONTEXT_BYTES
        if wanted.vram and self._args.tiny:  # room for half of the experts
            streamed = make_plan(replace(request, experts=Mode.STREAM), replace(machine, vram=(1 << 50,)))
            parts = streamed.gpus[0].parts
            vram = sum(parts.values()) - parts["expert slots"] // 2
        elif not self._args.tiny:
            vram = min(vram, wanted.vram or vram)
        plan = plan_of_random_weights(request, replace(machine, vram=(vram,)))
        return Case(wanted.shape, whole, plan, Lengths(*lengths(wanted, self._args.tiny)), self._dtype())

    def _late(self) -> bool:
        return time.perf_counter() - self._start > self._args.seconds

    def _note(self, text: str) -> None:
        print(f"{time.perf_counter() - self._start:7.1f} s  {text}", flush=True)

    def _ended(self, case: str) -> Callable[[str, float], object]:
        return lambda phase, seconds: self._note(f"{case}: {phase} took {seconds:.1f} s")

    def _phase(self, name: str) -> Any:
        from dsv2_local.commands.bench.gpu import Phases

        def ended(phase: str, seconds: float) -> None:
            self.result["phases"][phase] = seconds
            self._note(f"{phase} took {seconds:.1f} s")

        return Phases(lambda text: None, ended)(name)

    def _save(self) -> None:
        self.result["seconds"] = time.perf_counter() - self._start
        if self._args.json:
            new = self._args.json.with_suffix(".new")
            new.write_text(json.dumps(self.result, indent=1) + "\n")
            new.replace(self._args.json)


def lengths(case: Wanted, tiny: bool) -> tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]:
    """Prompts, contexts, tokens to decode, and numbers of sequences to decode in common steps."""
    from dsv2_local.commands.bench.settings import PARALLEL

    return ((4,), (9,), 2, (1, 2)) if tiny else (case.prompts, case.contexts, case.decode, PARALLEL)


def shorten() -> None:
    """Make the measurements of the machine and of single parts short."""
    from dsv2_local.commands.bench import gpu_rates, gpu_timing, hardware, settings

    settings.READ_BYTES = gpu_rates.LINK_BYTES = gpu_rates.MEMORY_BYTES = 1 << 20
    settings.last_level_cache_bytes = lambda: 0  # type: ignore[attr-defined, assignment]
    hardware.FILLED_SECONDS, gpu_rates.MATRIX, gpu_rates.CPU_MATRIX = 0.0, 64, 64
    gpu_timing.PART_REPEATS = gpu_timing.WARM_UP_STEPS = 1


def commit() -> str | None:
    """The commit of this checkout; None if it is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "slots", "context", "tok/s", "hits", "of bound", "forecast", "link", "CPU")
    for case in result["cases"]:
        for row in rows(case):
            table.add_row(*row)
    Console(highlight=False, width=120).print(table)
    for name in ("skipped", "failed"):
        if result[name]:
            print(f"{name}: {', '.join(result[name])}")
    print(f"{result['device']}, {result['date']}, commit {result['commit']}, {result.get('seconds', 0.0):.0f} s in all")


def rows(case: dict[str, Any]) -> Iterator[list[str]]:
    """The rows of one case: prefill by tokens, then decoding by context."""
    slots = f"{case['plan']['slots']:,}/{case['plan']['experts']:,}"
    for name, runs in (("prefill", case["prefill"]), ("decode at", case["decode"])):
        for run in runs:
            moved = [f"{run[key] / 1e6:,.1f} MB" if key in run else "" for key in ("link_bytes", "cpu_bytes")]
            yield [
                case["case"], slots, f"{name} {run.get('context', run.get('tokens')):,}", f"{run['tok_s']:,.1f}",
                f"{run['hit_rate']:.0%}" if "hit_rate" in run else "", f"{run['bound_fraction']:.0%} {run['bound']}",
                f"{run['predicted_tok_s']:,.1f}", *moved,
            ]  # fmt: skip


if __name__ == "__main__":
    main()
