"""Compares GPU speed and memory with transformers and bitsandbytes, on random weights in the shape of DeepSeek-V2-Lite.

    pip install 'transformers>=5' accelerate bitsandbytes
    python benchmarks/against_transformers.py [--json FILE] [--only NAME ...] [--seconds 75]
    python benchmarks/against_transformers.py --tiny    # tests this program, also without a GPU; its times mean nothing

Needs a GPU of 48 GB. What runs, in this order:

- `dsv2`: recipe nf4 (head and kv_b in int8), all experts on the GPU, without drafts.
- `bf16-experts`: what `from_pretrained` returns with `BitsAndBytesConfig(load_in_4bit=True)`, nf4 and bf16 compute. It
  quantises the modules that are `nn.Linear`, except the head. transformers 5 keeps the routed experts of a layer in
  two 3-D parameters, which are no `nn.Linear`, so they stay bf16: 92 % of V2-Lite's weights.
- `nf4-fused`: the same model, with these parameters in nf4 by `bitsandbytes.nn.parametrize`, which dequantises all
  experts of a layer whenever the layer runs. `from_pretrained` does not do this.
- `nf4-modules`: the same model, with three `Linear4bit` for each expert, as transformers 4 had it. The loop over the
  experts is that of transformers 5 (`DeepseekV2Experts.forward`), which waits for the GPU less often than the older.

The last two make the comparison one of 4-bit weights; `bf16-experts` reads and holds four times the bytes.

transformers generates through `model.generate`, with its default attention, experts implementation and KV cache. For
all programs a prefill is timed from the call to the first token (one run to warm up, then the median of three), and
decoding from the first token to the last of 32 more. Sampling is greedy. "loaded" is the memory of PyTorch's allocator
after loading, which for dsv2 has the KV cache in it; "peak" is its maximum from there on.
"""

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dsv2_local.architectures.released import RELEASED

LITE = RELEASED["deepseek-v2-lite"]
PROMPTS, DECODED, RUNS = (512, 4096), 32, 3
TINY_PROMPTS, TINY_DECODED = (4, 16), 3
TINY: dict[str, Any] = {
    "model_type": "deepseek_v2", "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256,
    "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "kv_lora_rank": 128, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "rope_theta": 10000, "eos_token_id": 1,
}  # fmt: skip
DSV2, BF16_EXPERTS, NF4_FUSED, NF4_MODULES = NAMES = ("dsv2", "bf16-experts", "nf4-fused", "nf4-modules")
DEVIATION = 0.02  # of the weights: transformers' `initializer_range`
DRAWN = 1 << 29  # random numbers that all experts are copied from, 1 GB

Generate = Callable[[list[int], int], list[float]]
"""(prompt, number of tokens) -> seconds from the call to each of the tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file after every figure")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="some of the four")
    parser.add_argument("--seconds", type=float, default=75.0, help="begin no figure after this time (default: 75)")
    parser.add_argument("--tiny", action="store_true", help="use a small model")
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.tiny):
        sys.exit("there is no GPU; --tiny tests this program without one")
    start = time.perf_counter()
    for result in results(args.only, args.tiny, lambda: time.perf_counter() - start > args.seconds):
        result["seconds"] = time.perf_counter() - start
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    if any("error" in program for program in result["programs"].values()):
        sys.exit(1)


def results(names: Sequence[str], tiny: bool, late: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """All results so far as plain values, after every figure; no figure is begun once `late` returns True."""
    gpu = torch.cuda.is_available()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if gpu else f"no GPU ({platform.machine()})",
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "prompts": TINY_PROMPTS if tiny else PROMPTS,
        "programs": {},
    }
    yield result
    for name, loading in programs(names, tiny):
        program = result["programs"][name] = {"complete": False}
        if late():
            continue
        start = time.perf_counter()
        try:
            with loading as (generate, stored):
                program |= {"load_seconds": time.perf_counter() - start, "stored": stored}
                for figures in measured(generate, result["prompts"], TINY if tiny else LITE, late):
                    program |= figures
                    yield result
        except Exception as error:  # the other programs may still run
            program["error"] = f"{type(error).__name__}: {error}"
        del loading
        generate = None
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
            program["left_bytes"] = torch.cuda.memory_allocated()
    yield result


def measured(
    generate: Generate, prompts: Sequence[int], config: dict[str, Any], late: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """The figures of a program, one after the other: tokens per second, and the memory in use."""
    gpu, decoded = torch.cuda.is_available(), DECODED if config is LITE else TINY_DECODED

    def random_ids(tokens: int) -> list[int]:
        return torch.randint(config["vocab_size"], (tokens,)).tolist()

    def prefill(tokens: int) -> float:
        seconds = [generate(random_ids(tokens), 1)[0] for _ in range(1 + RUNS)]
        return tokens / median(seconds[1:])

    def decode(context: int) -> float:
        if context == 0:
            generate(random_ids(1), 1 + decoded)  # to warm up
        times = generate(random_ids(max(1, context)), 1 + decoded)
        return decoded / (times[-1] - times[0])

    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield {"loaded_bytes": torch.cuda.memory_allocated()}
    for kind, measure, contexts in (("prefill", prefill, prompts), ("decode", decode, (0, prompts[-1]))):
        for context in contexts:
            if late():
                return
            yield {f"{kind}_{context}_tok_s": measure(context)}
            if gpu:
                yield {"peak_bytes": torch.cuda.max_memory_allocated()}
    yield {"complete": True}


Program = AbstractContextManager[tuple[Generate, dict[str, list[str]]]]
"""While it is entered, a model is loaded: how to generate, and which weights are stored in which format."""


def programs(names: Sequence[str], tiny: bool) -> Iterator[tuple[str, Program]]:
    """The programs to compare, by name; those of transformers share a model."""
    if DSV2 in names:
        yield DSV2, dsv2(tiny)
    peer = Peer(TINY if tiny else LITE)
    for name in NAMES[1:]:
        if name in names:
            yield name, peer.with_experts(name)


@contextmanager
def dsv2(tiny: bool) -> Iterator[tuple[Generate, dict[str, list[str]]]]:
    """dsv2 with random weights, all on the GPU; without a GPU, on a simulated device."""
    from dsv2_local.architectures.families import parse_config
    from dsv2_local.kernels import ops
    from dsv2_local.kernels.format import CacheDtype
    from dsv2_local.machine.resources import memory_available
    from dsv2_local.offload.cuda_device import CudaDevice
    from dsv2_local.offload.device import Device
    from dsv2_local.offload.plan import CONTEXT_BYTES, make_plan
    from dsv2_local.offload.plan_request import Machine, Mode, PlanRequest
    from dsv2_local.offload.simulated_device import SimulatedDevice
    from dsv2_local.quant.schema import Recipe
    from dsv2_local.runtime.answer import Answer, Request
    from dsv2_local.runtime.engine import Engine
    from dsv2_local.runtime.placement import ModelWeights, place_on_devices
    from dsv2_local.runtime.random_weights import build
    from dsv2_local.runtime.sampling_params import SamplingParams
    from dsv2_local.runtime.stats import Stats

    gpu = torch.cuda.is_available()
    config = parse_config(TINY if tiny else LITE)
    model = build(config, Recipe.NF4, threads=os.cpu_count() or 1)
    weights = ModelWeights(config, model.weights, model.layout, model.records)
    ops.set_threads(None, model.layout.format)
    device: Device = CudaDevice(0) if gpu else SimulatedDevice(capacity=2 << 30)
    context = TINY_PROMPTS[-1] + TINY_DECODED + 1 if tiny else PROMPTS[-1] + DECODED + 1
    request = PlanRequest(config, Recipe.NF4, context, CacheDtype.BF16 if gpu else CacheDtype.FP32, Mode.GPU)
    plan = make_plan(request, Machine((device.free + CONTEXT_BYTES,), memory_available(), available=True))
    placed = place_on_devices(weights, plan, [device], torch.bfloat16 if gpu else torch.float32)
    engine = Engine(placed.model, context, request.cache_dtype, plan.chunk)
    engine.warm_up()

    def no_draft(answer: Answer, most: int) -> None:
        answer.draft = []

    def generate(prompt: list[int], tokens: int) -> list[float]:
        engine.clear()
        answer = Request(prompt, SamplingParams(temperature=0), max_tokens=tokens)
        start = time.perf_counter()
        with mock.patch.object(Answer, "propose", no_draft):  # no speculative decoding
            return [time.perf_counter() - start for _ in engine.generate(answer, Stats())]

    formats: dict[str, list[str]] = {}
    for name, weight in weights.dense.items():
        formats.setdefault(str(getattr(weight, "format", "bf16")), []).append(name)
    formats.setdefault(str(model.layout.format), []).append("mlp.experts")
    try:
        yield generate, {format: without_numbers(names) for format, names in formats.items()}
    finally:
        placed.close()


class Peer:
    """A model of transformers, loaded when it is first needed; its experts change from one program to the next."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self._model: Any = None

    @contextmanager
    def with_experts(self, name: str) -> Iterator[tuple[Generate, dict[str, list[str]]]]:
        """The model with its experts as the program of this name stores them."""
        if self._model is None:
            self._model = from_pretrained(self.config)
        change = {BF16_EXPERTS: None, NF4_FUSED: fuse, NF4_MODULES: separate}[name]
        if change:
            change(self._model)
        yield partial(generate_with, self._model), formats_of(self._model)


def from_pretrained(config: dict[str, Any]) -> Any:
    """The model that `from_pretrained` makes of a bf16 checkpoint of random weights with `load_in_4bit`."""
    from transformers import BitsAndBytesConfig, DeepseekV2Config, DeepseekV2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    described = DeepseekV2Config(**{**config, "bos_token_id": None, "eos_token_id": None})  # no answer ends early
    model = DeepseekV2ForCausalLM.from_pretrained(
        None, config=described, state_dict=random_checkpoint(described), dtype=torch.bfloat16,
        quantization_config=quantization, device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )  # fmt: skip
    return model.eval()


def random_checkpoint(config: Any) -> dict[str, Tensor]:
    """The bf16 tensors of a checkpoint by their names in the release; those of experts share their memory."""
    from transformers import DeepseekV2ForCausalLM

    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(config)
    device, inner, hidden = device_type(), config.moe_intermediate_size, config.hidden_size
    expert_weights = inner * hidden
    drawn = torch.randn(max(DRAWN if device == "cuda" else 0, 2 * expert_weights), device=device, dtype=torch.bfloat16)
    drawn *= DEVIATION
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        prefix, _, last = name.rpartition(".experts.")
        if prefix:
            for expert in range(config.n_routed_experts):
                for matrix in ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",):
                    begin = int(torch.randint(len(drawn) - expert_weights, ()))
                    shape = (hidden, inner) if matrix == "down_proj" else (inner, hidden)
                    tensors[f"{prefix}.experts.{expert}.{matrix}.weight"] = drawn[begin:][:expert_weights].view(shape)
        elif "norm" in name:
            tensors[name] = torch.ones(weight.shape, device=device, dtype=torch.bfloat16)
        else:
            tensors[name] = torch.randn(weight.shape, device=device, dtype=torch.bfloat16) * DEVIATION
    return tensors


def fuse(model: nn.Module) -> None:
    """Store the 3-D parameters of all routed experts in nf4."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for experts in of_type(model, "DeepseekV2Experts"):
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(experts, name, quant_type="nf4")


def separate(model: nn.Module) -> None:
    """Give every routed expert three `Linear4bit` in place of its parts of the 3-D parameters."""
    for moe in of_type(model, "DeepseekV2Moe"):
        moe.experts = SeparateExperts(moe.experts)


class SeparateExperts(nn.Module):
    """The routed experts of a layer as modules of `Linear4bit`."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = fused.num_experts, fused.act_fn
        gate_up, down = fused.gate_up_proj, fused.down_proj  # bf16 [E, 2·I, D] and [E, D, I], dequantised if need be
        gate, up = gate_up.chunk(2, dim=1)
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.ModuleList(map(linear_4bit, matrices)) for matrices in (gate, up, down)
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [T, D], expert numbers and weights [T, K] -> [T, D]; the loop of `DeepseekV2Experts.forward`."""
        out = torch.zeros_like(hidden_states)
        mask = nn.functional.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
        for expert in mask.sum(dim=(-1, -2)).greater(0).nonzero()[:, 0].tolist():
            gate, up, down = self.gate_proj[expert], self.up_proj[expert], self.down_proj[expert]
            place, token = torch.where(mask[expert])
            x = hidden_states[token]
            y = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def linear_4bit(weight: Tensor) -> nn.Module:
    """A `Linear4bit` with the options of `BitsAndBytesConfig` above, of a bf16 matrix [R, C]."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    with torch.device("meta"):
        linear = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, **options)
    parameter = Params4bit(weight.detach().contiguous(), requires_grad=False, module=linear, **options)
    linear.weight = parameter.to(weight.device)  # quantises
    return linear


def generate_with(model: Any, prompt: list[int], tokens: int) -> list[float]:
    """`Generate`, by transformers."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Gets the prompt and then every token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock, ids = Clock(), torch.tensor([prompt], device=device_type())
    start = time.perf_counter()
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=clock
    )
    assert answer.shape[1] == len(prompt) + tokens == len(prompt) + len(clock.times) - 1
    return [moment - start for moment in clock.times[1:]]


def formats_of(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters by how they are stored: nf4, or a type of torch."""
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        format = "nf4" if parameter.dtype is torch.uint8 else str(parameter.dtype).removeprefix("torch.")
        found.setdefault(format, []).append(name)
    return {format: without_numbers(names) for format, names in found.items()}


def without_numbers(names: list[str]) -> list[str]:
    """Names with neither the numbers of layers and experts nor the suffix for weights, each once."""
    dropped = {"model", "layers", "parametrizations", "original", "weight"}
    parts = ([part for part in name.split(".") if not part.isdigit() and part not in dropped] for name in names)
    return sorted({".".join(kept) for kept in parts})


def of_type(model: nn.Module, name: str) -> list[Any]:
    """The modules of a class of transformers."""
    found = [module for module in model.modules() if type(module).__name__ == name]
    if not found:
        sys.exit(f"this version of transformers has no {name}; version 5 has")
    return found


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    programs = result["programs"]
    names = list(dict.fromkeys(key for run in programs.values() for key in run if key.endswith("_tok_s")))
    table = Table("", "loaded GB", "peak GB", *(name.removesuffix("_tok_s").replace("_", " ") for name in names))
    for name, run in programs.items():
        memory = (f"{run[key] / 1e9:.1f}" if key in run else "" for key in ("loaded_bytes", "peak_bytes"))
        speeds = (f"{run[key]:,.1f}" if key in run else "" for key in names)
        table.add_row(name if run["complete"] else f"{name} (incomplete)", *memory, *speeds)
    Console(highlight=False, width=120).print(table)
    for name, run in programs.items():
        if "error" in run:
            print(f"{name} failed: {run['error']}")
        for format, weights in run.get("stored", {}).items():
            print(f"{name}: {format}: {', '.join(weights)}")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    print(f"Tokens per second. {result['device']}, {versions}, {result['date']}, {result['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
