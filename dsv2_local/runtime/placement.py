"""Places a model as its plan says: dense weights, KV cache and experts on GPUs or in RAM."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout, Format
from dsv2_local.kernels.layout import Matrix
from dsv2_local.offload import calibration, warm_experts
from dsv2_local.offload.balance import Costs
from dsv2_local.offload.device import Device
from dsv2_local.offload.expert_cache import ExpertCache, Policy
from dsv2_local.offload.expert_slots import ExpertSlots
from dsv2_local.offload.graph_experts import GraphBuffers
from dsv2_local.offload.offloaded_experts import DeviceExperts, OffloadedExperts
from dsv2_local.offload.pinned import PinnedArena
from dsv2_local.offload.plan import MemoryShare, Plan
from dsv2_local.offload.plan_request import Mode
from dsv2_local.offload.resident_experts import ResidentExperts
from dsv2_local.offload.sizes import STAGING_BUFFERS
from dsv2_local.progress import Progress, no_progress
from dsv2_local.quant.checkpoint import MANIFEST, Checkpoint
from dsv2_local.runtime.model import Transformer, Weights

ON_CPU = Costs(fetch=1e9, read=1.0, token=1.0)  # seconds: no expert is copied to a GPU
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ModelWeights:
    """A model's weights in RAM, with the names of `quant.checkpoint`.

    Attributes:
        config: the architecture.
        dense: all weights but the routed experts, by name; it may make each one when it is asked for.
        layout: layout of a routed expert's record.
        records: uint8 [E, layout.nbytes] by MoE layer; it may make each one when it is asked for.
        fingerprint: hash of the manifest, under which the model's warm experts are stored; None: they are not stored.
        arena: the page-locked memory that has `records` already, and that outlives the model; None: `records` are
            copied to page-locked memory if the plan wants them there.
    """

    config: ModelConfig
    dense: Mapping[str, Matrix | Tensor]
    layout: ExpertLayout
    records: Mapping[int, Tensor]
    fingerprint: str | None = None
    arena: PinnedArena | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ModelWeights":
        """The weights of a checkpoint, memory-mapped from its files."""
        records = {layer: checkpoint.experts(layer) for layer in checkpoint.config.moe_layers}
        manifest = (checkpoint.directory / MANIFEST).read_bytes()
        fingerprint = hashlib.sha256(manifest).hexdigest()[:16]
        return cls(checkpoint.config, checkpoint.dense(), checkpoint.expert_layout, records, fingerprint)


@dataclass
class PlacedModel:
    """A model that is in the memories where it computes.

    Attributes:
        model: the model, ready to run.
        experts: its routed experts.
        devices: the GPUs in use.
        notes: what makes the model slower than it could be, and what to do about it.
        closing: the functions that `close` calls, the last one first.
    """

    model: Transformer
    experts: ResidentExperts | OffloadedExperts
    devices: list[Device] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    closing: list[Callable[[], object]] = field(default_factory=list)

    def close(self) -> None:
        """Store the warm experts and corrected costs for the next run, and free GPU and page-locked memory."""
        while self.closing:
            self.closing.pop()()


def place_in_ram(weights: ModelWeights, dtype: torch.dtype) -> PlacedModel:
    """Leave all weights where they are, in RAM or mapped, and compute on the CPU; `dtype` is the activations' type."""
    experts = ResidentExperts(weights.layout, dict(weights.records))
    return PlacedModel(Transformer(weights.config, dict(weights.dense), experts, dtype), experts)


def place_on_devices(
    weights: ModelWeights,
    plan: Plan,
    devices: list[Device],
    dtype: torch.dtype,
    *,
    policy: Policy = Policy.LRFU,
    costs: Costs | None = None,
    progress: Progress = no_progress,
) -> PlacedModel:
    """Copy each GPU's layers to it, and place the experts as the plan says.

    Weights that are copied to a GPU are taken one by one, a layer's experts together.

    Args:
        weights: the model's weights, in RAM.
        plan: the plan, made for these devices in this order.
        devices: one device for each GPU of the plan.
        dtype: type of the activations.
        policy: which experts the expert cache evicts first.
        costs: time to copy and to compute an expert; None: the costs stored for this machine, measured if there are
            none.
        progress: called with (bytes done, total bytes) while experts are copied to page-locked RAM.

    Raises:
        DeviceMemoryError: a GPU has less free memory than the plan assumed.
    """
    config = weights.config
    owner = [device for device, share in zip(devices, plan.gpus, strict=True) for _ in range(*share.layers)]
    dense, allocate = _place_dense(weights, owner), [device.allocate for device in owner]
    closing: list[Callable[[], object]] = [device.close for device in devices]
    if plan.mode is Mode.GPU:
        records = {layer: _copy(owner[layer], weights.records[layer]) for layer in weights.records}
        resident = ResidentExperts(weights.layout, records)
        return PlacedModel(Transformer(config, dense, resident, dtype, allocate), resident, devices, [], closing)
    arena = weights.arena or _pinned(weights, plan, devices[0], progress)
    notes = [_refusal(arena)] if arena.refused else []
    placed = [
        _place_experts(weights, plan, share, device, arena.records, policy, costs)
        for share, device in zip(plan.gpus, devices, strict=True)
    ]
    experts = OffloadedExperts(placed)
    closing = [*closing, lambda: _keep_learned(weights, plan, placed)]
    if arena is not weights.arena:
        closing.insert(0, arena.close)
    return PlacedModel(Transformer(config, dense, experts, dtype, allocate), experts, devices, notes, closing)


def _place_dense(weights: ModelWeights, owner: list[Device]) -> Weights:
    """Copy the dense weights to their layers' devices, norms and routers as fp32; the embedding stays in RAM."""
    placed: Weights = {EMBEDDING: weights.dense[EMBEDDING]}
    for name in weights.dense:
        if name != EMBEDDING:
            placed[name] = _copy_weight(owner[_layer_of(name, len(owner))], weights.dense[name])
    if weights.config.tie_word_embeddings:
        placed[HEAD] = _copy_weight(owner[-1], placed[EMBEDDING])
    return placed


def _layer_of(name: str, layers: int) -> int:
    """The layer that a weight belongs to; the final norm and the head count as the last layer's."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else layers - 1


def _copy_weight(device: Device, weight: Matrix | Tensor) -> Matrix | Tensor:
    if isinstance(weight, Matrix):
        return weight.placed(lambda plane: _copy(device, plane))
    return _copy(device, weight.float())


def _copy(device: Device, tensor: Tensor) -> Tensor:
    memory = device.allocate(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return memory.copy_(tensor)


def _pinned(weights: ModelWeights, plan: Plan, device: Device, progress: Progress) -> PinnedArena:
    """Copy the experts to page-locked RAM, as far as the plan wants it and the system allows it."""
    arena = PinnedArena(device)
    arena.copy(weights.records, _bytes_to_pin(weights, plan), progress)
    return arena


def _bytes_to_pin(weights: ModelWeights, plan: Plan) -> int:
    """Bytes of experts to page-lock: those that the plan has in RAM, as far as the system's limit allows."""
    if not plan.offloads:
        return 0
    fitting = plan.ram_experts * weights.layout.nbytes
    return fitting if plan.machine.lockable is None else min(fitting, plan.machine.lockable)


def _refusal(arena: PinnedArena) -> str:
    return (
        f"the system allowed {arena.locked / 2**30:,.1f} of {arena.nbytes / 2**30:,.1f} GiB of experts to be "
        "page-locked (ulimit -l); the others are copied at about half the speed of the PCIe link; raise memlock in "
        "/etc/security/limits.conf"
    )


def _place_experts(
    weights: ModelWeights,
    plan: Plan,
    share: MemoryShare,
    device: Device,
    records: dict[int, Tensor],
    policy: Policy,
    costs: Costs | None,
) -> DeviceExperts:
    """Set up the experts of one device's layers; its slots start with the warm experts."""
    config, layout = weights.config, weights.layout
    own = {layer: records[layer] for layer in records if layer in range(*share.layers)}
    cache = ExpertCache(share.slots, config.num_hidden_layers, config.n_routed_experts, policy)
    slots = ExpertSlots(device, layout, cache, plan.staging_experts)
    if not plan.offloads:
        buffers = _graph_buffers(weights, plan, device)
        return DeviceExperts(slots, layout, own, Mode.CPU, ON_CPU, buffers)
    slots.fill(own, warm_experts.load(weights.fingerprint, list(own), config.n_routed_experts))
    costs = costs or calibration.costs(slots, layout, own)
    return DeviceExperts(slots, layout, own, plan.mode, costs, _graph_buffers(weights, plan, device))


def _graph_buffers(weights: ModelWeights, plan: Plan, device: Device) -> GraphBuffers | None:
    """The buffers with which experts run inside CUDA graphs; None if they cannot (no Triton, bf16, little staging)."""
    config, format = weights.config, weights.layout.format
    fits = not plan.offloads or config.num_experts_per_tok <= STAGING_BUFFERS * plan.staging_experts
    # The bf16 kernels cannot skip experts that have no slot, as a captured step must.
    if not ops.capturable(device.torch_device) or format is Format.BF16 or not fits:
        return None
    return GraphBuffers.allocate(device, config.hidden_size, config.num_experts_per_tok)


def _keep_learned(weights: ModelWeights, plan: Plan, placed: list[DeviceExperts]) -> None:
    """Store the model's warm experts, and the costs that were corrected while it ran."""
    if not plan.offloads:
        return
    worth = {key: device.slots.cache.worth(key) for device in placed for key in device.slots.cache.warmest()}
    warm_experts.save(weights.fingerprint, sorted(worth, key=lambda key: worth[key], reverse=True))
    for device in placed:
        if device.corrected:
            calibration.keep(device.costs, device.slots.device, weights.layout)
