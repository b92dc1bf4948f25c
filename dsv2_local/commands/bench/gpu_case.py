"""A model on GPUs that is to be measured: its plan, its weights (converted or random), and placing it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from dsv2_local import llm, workstation
from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.tensors import Kind
from dsv2_local.commands.bench.settings import (
    GPU_DECODE,
    GPU_PROMPTS,
    MOST_PARALLEL,
    BenchOptions,
    Lengths,
    architecture,
    settle_lengths,
)
from dsv2_local.commands.bench.subject import random_name
from dsv2_local.commands.bench.timing import Status
from dsv2_local.errors import InputError, PlanError
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.offload.device import Device
from dsv2_local.offload.pinned import PinnedArena
from dsv2_local.offload.plan import Plan, make_plan
from dsv2_local.offload.plan_request import Machine, Mode, PlanRequest
from dsv2_local.offload.trace import Trace
from dsv2_local.progress import Progress
from dsv2_local.quant.checkpoint import Checkpoint
from dsv2_local.quant.schema import Recipe, dense_files
from dsv2_local.runtime.placement import ModelWeights
from dsv2_local.runtime.random_weights import Builder, first_layers

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """What to measure on GPUs.

    Attributes:
        name: the model's name, to be shown.
        whole: the architecture of the whole model.
        plan: where its first layers (`config`) are stored.
        lengths: of prompts, contexts and decoding.
        dtype: type of the activations.
        trace: the routing to decode with; None: the model's own.
    """

    name: str
    whole: ModelConfig
    plan: Plan
    lengths: Lengths
    dtype: torch.dtype = DTYPE
    trace: Trace | None = None

    @property
    def config(self) -> ModelConfig:
        return self.plan.request.config

    @property
    def recipe(self) -> Recipe:
        return self.plan.request.recipe


def settle(options: BenchOptions, devices: Sequence[Device]) -> tuple[Case, Checkpoint | None]:
    """Decide what to measure on these GPUs -> the case, and the converted model (None: random weights).

    Raises:
        InputError: an option is not valid or exceeds the model's context, random weights do not fit in RAM, or the
            trace cannot be replayed.
        PlanError: the model does not fit.
        CheckpointError: the converted model is damaged.
    """
    directory, whole = architecture(options)
    checkpoint = Checkpoint(directory) if directory else None
    config = whole if options.layers is None else first_layers(whole, options.layers)
    recipe = checkpoint.recipe if checkpoint else options.recipe or Recipe.NF4
    lengths = settle_lengths(options, config.max_position_embeddings, GPU_PROMPTS, GPU_DECODE, MOST_PARALLEL["GPU"])
    cache_dtype = cache_dtype_on(devices[0], recipe, DTYPE, options.cache_dtype)
    request = PlanRequest(config, recipe, lengths.cache, cache_dtype, options.experts)
    machine = workstation.this_machine(devices, options.vram, options.experts)
    if checkpoint is None:
        plan, name = plan_of_random_weights(request, machine), random_name(options.random_weights or "")
    else:
        plan = workstation.plan_for(request, machine)
        name = "dsv2-nano" if directory == llm.bundled_model() else checkpoint.directory.resolve().name
    trace = None if options.trace is None else matching_trace(Trace.load(options.trace), whole, plan)
    return Case(name, whole, plan, lengths, DTYPE, trace), checkpoint


def plan_of_random_weights(request: PlanRequest, machine: Machine) -> Plan:
    """Plan a model of random weights, whose experts all fit in RAM and are all page-locked if the system allows it.

    Raises:
        InputError: they do not fit; the message has the bytes needed and available, and the number of layers that fit.
        PlanError: the dense weights or the KV cache do not fit.
    """
    machine = replace(machine, lockable=None)
    plan = make_plan(request, machine)
    if not plan.disk_experts:
        return plan
    fitting = layers_that_fit(request, machine)
    remedy = f"--layers {fitting} fits" if fitting else "free memory, or use a smaller model"
    needed = plan.ram.used + plan.disk_experts * plan.expert_bytes
    raise InputError(
        f"{request.config.num_hidden_layers} layers need {needed / 1e9:,.2f} GB of RAM (routed experts "
        f"{plan.experts * plan.expert_bytes / 1e9:,.2f}) and {machine.ram / 1e9:,.2f} GB are available; {remedy}"
    )


def layers_that_fit(request: PlanRequest, machine: Machine) -> int:
    """The most layers whose experts fit in RAM; 0 if not even one layer of each kind does."""
    for layers in range(request.config.num_hidden_layers, 0, -1):
        try:
            config = first_layers(request.config, layers)
            if not make_plan(replace(request, config=config), machine).disk_experts:
                return layers
        except InputError:
            return 0
        except PlanError:
            continue
    return 0


def matching_trace(trace: Trace, whole: ModelConfig, plan: Plan) -> Trace:
    """The part of a trace that belongs to the layers of the plan.

    Raises:
        InputError: the trace is another model's, is empty, or nothing would depend on it.
    """
    if not plan.offloads:
        raise InputError(f"--trace needs offloaded experts, and --experts {plan.mode} has none; use hybrid or stream")
    layers, experts, chosen = len(whole.moe_layers), whole.n_routed_experts, whole.num_experts_per_tok
    if (trace.layers, trace.experts) != (layers, experts):
        raise InputError(
            f"the trace of {trace.model} has {trace.layers} layers of {trace.experts} experts, and this model has "
            f"{layers} of {experts}; record one of this model (dsv2 bench --record-trace)"
        )
    if not trace.tokens:
        raise InputError(f"the trace of {trace.model} has no tokens; record a longer text")
    if any(len(set(layer)) != chosen or len(layer) != chosen for token in trace.tokens for layer in token):
        raise InputError(f"the trace of {trace.model} does not have {chosen} different experts in every layer")
    kept = len(plan.request.config.moe_layers)
    return Trace(trace.model, kept, experts, [token[:kept] for token in trace.tokens])


@contextmanager
def weights_of(
    case: Case, checkpoint: Checkpoint | None, device: Device, threads: int, status: Status
) -> Iterator[ModelWeights]:
    """The case's weights. Random ones are built straight into page-locked RAM if the plan has experts in RAM."""
    if checkpoint:
        yield converted(checkpoint, case.config)
        return
    in_ram = case.plan.mode is not Mode.GPU
    with (
        Builder(case.config, case.recipe, threads=threads) as builder,
        random_weights(builder, device, partial(building, status), in_ram=in_ram) as made,
    ):
        yield made


def building(status: Status, done: int, total: int) -> None:
    status(f"building random weights: {done / 1e9:,.1f} of {total / 1e9:,.1f} GB of experts")


def converted(checkpoint: Checkpoint, config: ModelConfig) -> ModelWeights:
    """The first layers of a converted model. Warm experts are neither used nor stored: what is measured is no text."""
    names = {spec.name for specs in dense_files(config).values() for spec in specs}
    dense = {name: weight for name, weight in checkpoint.dense().items() if name in names}
    records = {layer: checkpoint.experts(layer) for layer in config.moe_layers}
    return ModelWeights(config, dense, checkpoint.expert_layout, records)


@contextmanager
def random_weights(builder: Builder, device: Device, progress: Progress, *, in_ram: bool) -> Iterator[ModelWeights]:
    """Random weights of which RAM has no second copy: dense weights are made when they are copied to the GPU.

    `in_ram`: the experts are built in page-locked RAM, as far as the system allows it, and unlocked at the end; else
    a layer's experts are made when they are copied to the GPU.
    """
    model = builder.on_demand()
    if not in_ram:
        yield ModelWeights(builder.config, model.weights, model.layout, model.records)
        return
    arena = PinnedArena(device)
    try:
        builder.fill(arena, progress)
        yield ModelWeights(builder.config, model.weights, model.layout, arena.records, None, arena)
    finally:
        arena.close()


def cache_dtype_on(device: Device, recipe: Recipe, dtype: torch.dtype, requested: CacheDtype) -> CacheDtype:
    """The type of the KV cache on a device, as a plan needs it."""
    return ops.cache_dtype(recipe.format_of(Kind.KV_B), dtype, requested, device.torch_device)
