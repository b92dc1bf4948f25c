"""A model put where its plan says: dense weights, cache and experts on devices or in RAM."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv2_local.config import ModelConfig
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.kernels.layout import Matrix
from dsv2_local.model import Transformer, Weights
from dsv2_local.offload import calibration, favourites
from dsv2_local.offload.device import Device
from dsv2_local.offload.lru import Policy
from dsv2_local.offload.plan import Mode, Plan, Share
from dsv2_local.offload.schedule import Lane, OffloadedExperts
from dsv2_local.offload.slots import BUFFERS, Slots
from dsv2_local.offload.split import Costs
from dsv2_local.offload.store import Arena, Progress, ResidentExperts
from dsv2_local.quant.checkpoint import MANIFEST, Checkpoint

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Source:
    """A model's weights in RAM, as `quant.checkpoint` names them.

    Attributes:
        records: uint8 [E, layout.nbytes] by MoE layer.
        fingerprint: what is learned about the model's experts is kept under it; None: nothing is.
    """

    config: ModelConfig
    weights: Weights
    layout: ExpertLayout
    records: dict[int, Tensor]
    fingerprint: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Source":
        """A checkpoint, mapped."""
        records = {layer: checkpoint.experts(layer) for layer in checkpoint.config.moe_layers}
        manifest = (checkpoint.directory / MANIFEST).read_bytes()
        fingerprint = hashlib.sha256(manifest).hexdigest()[:16]
        return cls(checkpoint.config, checkpoint.dense(), checkpoint.expert_layout, records, fingerprint)


@dataclass
class Placed:
    """A model where it computes.

    Attributes:
        notes: what is slower than it could be, and what to do about it.
    """

    model: Transformer
    experts: ResidentExperts | OffloadedExperts
    devices: list[Device] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    closing: list[Callable[[], object]] = field(default_factory=list)

    def close(self) -> None:
        """Keep what was learned about this model and machine, and give back devices and page-locked memory."""
        while self.closing:
            self.closing.pop()()


def in_ram(source: Source, dtype: torch.dtype) -> Placed:
    """Everything where it lies, computed on the CPU; `dtype` is that of the activations."""
    experts = ResidentExperts(source.layout, source.records)
    return Placed(Transformer(source.config, source.weights, experts, dtype), experts)


def on_devices(
    source: Source,
    plan: Plan,
    devices: list[Device],
    dtype: torch.dtype,
    *,
    policy: Policy = Policy.LRFU,
    costs: Costs | None = None,
    progress: Progress = lambda done, of: None,
) -> Placed:
    """Each device's layers on it, and the experts as the plan says.

    Args:
        source: the weights.
        plan: made for these devices, in this order.
        devices: one for each of the plan's GPUs.
        dtype: of the activations.
        policy: of the slots.
        costs: of fetching and computing experts; None: those of this machine, measured if need be.
        progress: called with the bytes of experts that are in page-locked RAM, and of those that will be.

    Raises:
        DeviceMemoryError: a device has less memory than the plan counted on.
    """
    owner = [device for device, share in zip(devices, plan.gpus, strict=True) for _ in range(*share.layers)]
    weights, allocate = _dense(source, owner), [device.allocate for device in owner]
    closing: list[Callable[[], object]] = [device.close for device in devices]
    if plan.resident:
        records = {layer: _put(owner[layer], source.records[layer]) for layer in source.records}
        resident = ResidentExperts(source.layout, records)
        return Placed(Transformer(source.config, weights, resident, dtype, allocate), resident, devices, [], closing)
    arena = Arena(source.records, devices[0], _budget(source, plan), progress)
    notes = [_refusal(arena, source)] if arena.refused else []
    lanes = [
        _lane(source, plan, share, device, arena.records, policy, costs)
        for share, device in zip(plan.gpus, devices, strict=True)
    ]
    experts = OffloadedExperts(lanes)
    closing = [arena.close, *closing, lambda: _learn(source, plan, lanes)]
    return Placed(Transformer(source.config, weights, experts, dtype, allocate), experts, devices, notes, closing)


def _dense(source: Source, owner: list[Device]) -> Weights:
    """The dense weights on their layers' devices, norms and routers in fp32; the embedding stays in RAM."""
    placed: Weights = {EMBEDDING: source.weights[EMBEDDING]}
    for name, weight in source.weights.items():
        if name != EMBEDDING:
            placed[name] = _put_weight(owner[_layer(name, len(owner))], weight)
    if source.config.tie_word_embeddings:
        placed[HEAD] = _put_weight(owner[-1], source.weights[EMBEDDING])
    return placed


def _layer(name: str, layers: int) -> int:
    """The layer of a weight; what comes after the layers belongs to the last."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else layers - 1


def _put_weight(device: Device, weight: Matrix | Tensor) -> Matrix | Tensor:
    if isinstance(weight, Matrix):
        return weight.placed(lambda plane: _put(device, plane))
    return _put(device, weight.float())


def _put(device: Device, tensor: Tensor) -> Tensor:
    memory = device.allocate(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return memory.copy_(tensor)


def _budget(source: Source, plan: Plan) -> int:
    """Bytes of experts to page-lock."""
    if not plan.caches:
        return 0
    fitting = plan.ram_experts * source.layout.nbytes
    return fitting if plan.machine.lockable is None else min(fitting, plan.machine.lockable)


def _refusal(arena: Arena, source: Source) -> str:
    wanted = sum(records.nbytes for records in source.records.values())
    return (
        f"the system let {arena.locked / 2**30:,.1f} of {wanted / 2**30:,.1f} GiB of experts be page-locked "
        "(ulimit -l); copies of the others run at about half of the link's speed; raise memlock in "
        "/etc/security/limits.conf"
    )


def _lane(
    source: Source,
    plan: Plan,
    share: Share,
    device: Device,
    records: dict[int, Tensor],
    policy: Policy,
    costs: Costs | None,
) -> Lane:
    """A device's slots, filled with the experts that the model used most."""
    own = {layer: records[layer] for layer in records if layer in range(*share.layers)}
    buffer = share.parts.get("staging", 0) // (BUFFERS * source.layout.nbytes)
    slots = Slots(device, source.layout, share.slots, buffer, policy)
    if not plan.caches:
        return Lane(slots, source.layout, own, Mode.CPU, Costs(1.0, 1.0, 1.0))
    mode = Mode.HYBRID if plan.wish.experts is Mode.AUTO else plan.wish.experts
    slots.fill(own, favourites.load(source.fingerprint, list(own), source.config.n_routed_experts))
    return Lane(slots, source.layout, own, mode, costs or calibration.costs(slots, source.layout, own))


def _learn(source: Source, plan: Plan, lanes: list[Lane]) -> None:
    """Keep which experts the model used most, and costs that turned out otherwise."""
    if not plan.caches:
        return
    worth = {key: lane.slots.cache.worth(key) for lane in lanes for key in lane.slots.cache.favourites()}
    favourites.save(source.fingerprint, sorted(worth, key=lambda key: worth[key], reverse=True))
    for lane in lanes:
        if lane.corrected:
            calibration.keep(lane.costs, lane.slots.device, source.layout)
