"""Plans where a model's bytes are stored, before anything is loaded. Pure, no torch.

A plan adds up everything that takes memory on each device and in RAM. A model that does not fit is refused with the
shortfall and with changes that make it fit, each of which has been checked.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.errors import PlanError
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.offload.plan_request import Machine, Mode, PlanRequest
from dsv2_local.offload.sizes import GIB, MIB, Sizes, sizes_of
from dsv2_local.quant.schema import Recipe

# RAM of Python with torch, and the same with CUDA's libraries. Device memory of a CUDA context, and of what tensors do
# not show: compiled kernels, the workspace of cuBLAS, and gaps that torch's allocator cannot fill.
PROCESS_BYTES, CUDA_PROCESS_BYTES, CONTEXT_BYTES, MODULE_BYTES = 256 * MIB, 2150 * MIB, 600 * MIB, 600 * MIB
# RAM left to the operating system: this fraction of the machine's RAM, but at least this many bytes; or this fraction
# of the RAM that is free now.
SYSTEM_SHARE, SYSTEM_BYTES, SPARE_SHARE = 0.04, GIB, 0.02
# Tokens per prefill step: enough for full-rate matrix products; on the CPU, few enough to report progress and to stop
# every second or so; if experts are streamed over PCIe, more, so that more tokens share one pass over the experts.
CPU_CHUNK, GPU_CHUNK, STREAM_CHUNK = 512, 4096, 8192
# Remedies that are tried: contexts that are multiples of this, and at most this much more memory.
CONTEXT_STEP, MOST_GIB = 1024, 4096


@dataclass(frozen=True)
class MemoryShare:
    """How one memory is used.

    Attributes:
        name: "RAM" or "GPU n".
        capacity: bytes of the memory.
        parts: bytes by purpose.
        layers: of a GPU, its first layer and the layer after its last.
        slots: of a GPU, the number of expert slots.
    """

    name: str
    capacity: int
    parts: dict[str, int]
    layers: tuple[int, int] = (0, 0)
    slots: int = 0

    @property
    def used(self) -> int:
        return sum(self.parts.values())

    @property
    def free(self) -> int:
        return self.capacity - self.used


@dataclass(frozen=True)
class Plan:
    """Where everything is stored, and what follows from that.

    Attributes:
        request, machine: what the plan was made for.
        gpus, ram: how each memory is used.
        ram_experts: routed experts that are stored in RAM.
        locked: whether those are page-locked, so that copies run at the full speed of the PCIe link.
    """

    request: PlanRequest
    machine: Machine
    gpus: tuple[MemoryShare, ...]
    ram: MemoryShare
    ram_experts: int
    locked: bool

    @property
    def experts(self) -> int:
        """Routed experts of the whole model."""
        return _experts(self.request.config)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert."""
        return sizes_of(self.request).expert

    @property
    def slots(self) -> int:
        """Expert slots of all GPUs."""
        return sum(gpu.slots for gpu in self.gpus)

    @property
    def disk_experts(self) -> int:
        """Routed experts that are read from disk whenever they are needed."""
        return 0 if self.resident else self.experts - self.ram_experts

    @property
    def resident(self) -> bool:
        """Whether every routed expert has a slot, so that nothing is fetched once loaded."""
        return bool(self.gpus) and self.slots >= self.experts

    @property
    def mode(self) -> Mode:
        """Where the routed experts are computed: as requested, or what AUTO resolves to. Never AUTO."""
        if not self.gpus:
            return Mode.CPU
        if self.resident:
            return Mode.GPU
        return Mode.HYBRID if self.request.experts is Mode.AUTO else self.request.experts

    @property
    def offloads(self) -> bool:
        """Whether GPUs have slots for some experts and receive copies of others."""
        return self.mode in (Mode.HYBRID, Mode.STREAM)

    @property
    def staging_experts(self) -> int:
        """Experts that each of a GPU's `STAGING_BUFFERS` holds; 0 if no experts are copied to GPUs."""
        return sizes_of(self.request).staging_experts if self.offloads else 0

    @property
    def chunk(self) -> int:
        """Tokens per prefill step."""
        if not self.gpus:
            return CPU_CHUNK
        return STREAM_CHUNK if self.offloads else GPU_CHUNK


def _experts(config: ModelConfig) -> int:
    return _experts_of(config, (0, config.num_hidden_layers))


def make_plan(request: PlanRequest, machine: Machine) -> Plan:
    """Plan where a model is stored on a machine.

    Raises:
        PlanError: the model does not fit; the error has the shortfall and changes that make it fit.
    """
    try:
        return _place(request, machine)
    except PlanError as error:
        raise PlanError(error.where, error.shortfall, tuple(_remedies(request, machine, error.where))) from None


def _place(request: PlanRequest, machine: Machine) -> Plan:
    return _place_on_gpus(request, machine) if machine.vram else _place_in_ram(request, machine)


def _place_in_ram(request: PlanRequest, machine: Machine) -> Plan:
    """Plan for the CPU alone: dense weights and KV cache in RAM, and as many experts as fit beside them."""
    sizes = sizes_of(request)
    tied = sizes.embedding if request.config.tie_word_embeddings else 0
    parts = {
        "system": _system(machine),
        "program": PROCESS_BYTES,
        "dense weights": sum(sizes.layers) + sizes.embedding + sizes.head - tied,
        "KV cache": sizes.latent_cache(len(sizes.layers)),
        "workspace": sizes.workspace("cpu", CPU_CHUNK),
    }
    ram, count = _with_experts(request, machine, parts, "experts (mapped)")
    return Plan(request, machine, (), ram, count, False)


def _place_on_gpus(request: PlanRequest, machine: Machine) -> Plan:
    """Plan for GPUs: each has the dense weights and KV cache of consecutive layers, and slots in its free memory."""
    sizes, split = sizes_of(request), _split(request, machine.vram)
    parts = {"system": _system(machine), "program": CUDA_PROCESS_BYTES, "embedding": sizes.embedding}
    if request.experts in (Mode.AUTO, Mode.GPU):
        gpus = _gpu_shares(sizes, machine.vram, split, staged=False)
        lacking = [_experts_of(request.config, share.layers) - share.slots for share in gpus]
        if not any(lacking):
            return Plan(request, machine, gpus, _fitting(MemoryShare("RAM", machine.ram, parts)), 0, False)
        if request.experts is Mode.GPU:
            worst = max(range(len(gpus)), key=lambda gpu: lacking[gpu])
            raise PlanError(gpus[worst].name, lacking[worst] * sizes.expert - gpus[worst].free)
    if request.experts is Mode.CPU:
        gpus = tuple(_without_slots(share) for share in _gpu_shares(sizes, machine.vram, split, staged=False))
        ram, count = _with_experts(request, machine, parts, "experts (mapped)")
        return Plan(request, machine, gpus, ram, count, False)
    gpus = _gpu_shares(sizes, machine.vram, split, staged=True)
    wanted = _experts(request.config) * sizes.expert
    locked = wanted if machine.lockable is None else machine.lockable
    name = "experts (page-locked)" if locked >= wanted else "experts (mapped)"
    ram, count = _with_experts(request, machine, parts, name)
    return Plan(request, machine, gpus, ram, count, locked >= wanted)


def _gpu_shares(
    sizes: Sizes, vram: tuple[int, ...], split: list[tuple[int, int]], staged: bool
) -> tuple[MemoryShare, ...]:
    """How each GPU's memory is used; `staged`: with staging buffers for experts that are copied."""
    shares = []
    for gpu, (capacity, (first, end)) in enumerate(zip(vram, split, strict=True)):
        parts = {
            "driver": CONTEXT_BYTES,
            "kernels": MODULE_BYTES,
            "dense weights": sum(sizes.layers[first:end]) + (sizes.head if end == len(sizes.layers) else 0),
            "KV cache": sizes.latent_cache(end - first),
            "workspace": sizes.workspace("gpu", STREAM_CHUNK if staged else GPU_CHUNK, staged),
        }
        if staged:
            parts["staging"] = sizes.staging
        share = _fitting(MemoryShare(f"GPU {gpu}", capacity, parts, (first, end)))
        slots = min(share.free // sizes.expert, _experts_of(sizes.request.config, (first, end))) if sizes.expert else 0
        shares.append(replace(share, parts={**parts, "expert slots": slots * sizes.expert}, slots=slots))
    return tuple(shares)


def _without_slots(share: MemoryShare) -> MemoryShare:
    return replace(share, parts={name: size for name, size in share.parts.items() if name != "expert slots"}, slots=0)


def _split(request: PlanRequest, vram: tuple[int, ...]) -> list[tuple[int, int]]:
    """Divide the layers among the GPUs in proportion to their memory -> first layer and layer after the last of each.

    A layer counts with all of its bytes: dense weights, KV cache and routed experts.
    """
    sizes = sizes_of(request)
    experts = request.config.n_routed_experts * sizes.expert
    layer_bytes = [
        dense + sizes.latent_cache(1) + experts * request.config.is_moe(layer)
        for layer, dense in enumerate(sizes.layers)
    ]
    ends, done, layer = [], 0, 0
    for gpu in range(len(vram)):
        target = sum(layer_bytes) * sum(vram[: gpu + 1]) / sum(vram)
        while layer < len(layer_bytes) and done + layer_bytes[layer] / 2 <= target:
            done += layer_bytes[layer]
            layer += 1
        ends.append(layer)
    ends[-1] = len(layer_bytes)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _experts_of(config: ModelConfig, layers: tuple[int, int]) -> int:
    """Routed experts of the layers from the first up to, but not including, the second."""
    return sum(config.is_moe(layer) for layer in range(*layers)) * config.n_routed_experts


def _system(machine: Machine) -> int:
    """Bytes of RAM left to the operating system."""
    if machine.available:
        return int(machine.ram * SPARE_SHARE)
    return max(SYSTEM_BYTES, int(machine.ram * SYSTEM_SHARE))


def _with_experts(request: PlanRequest, machine: Machine, parts: dict[str, int], name: str) -> tuple[MemoryShare, int]:
    """RAM with as many experts as fit beside `parts`, and the number of these experts."""
    share, size = _fitting(MemoryShare("RAM", machine.ram, parts)), sizes_of(request).expert
    count = min(share.free // size, _experts(request.config)) if size else 0
    return replace(share, parts={**parts, name: count * size}), count


def _fitting(share: MemoryShare) -> MemoryShare:
    """The share itself; PlanError if it is larger than its memory."""
    if share.free < 0:
        raise PlanError(share.name, -share.free)
    return share


def _remedies(request: PlanRequest, machine: Machine, where: str) -> Iterator[str]:
    """Options each of which alone makes the model fit, the least painful first; the last is more memory."""
    if request.cache_dtype is CacheDtype.BF16 and _fits(replace(request, cache_dtype=CacheDtype.INT8), machine):
        yield "--cache-type int8"
    if request.parallel > 1 and _fits(replace(request, parallel=1), machine):
        yield "--parallel 1"
    steps = range(request.context // CONTEXT_STEP)
    shorter = bisect_left(
        steps, True, key=lambda n: not _fits(replace(request, context=(n + 1) * CONTEXT_STEP), machine)
    )
    if shorter:
        yield f"--context {shorter * CONTEXT_STEP}"
    if request.recipe is not Recipe.NF4 and _fits(replace(request, recipe=Recipe.NF4), machine):
        yield "--recipe nf4"
    if request.experts is Mode.GPU and _fits(replace(request, experts=Mode.AUTO), machine):
        yield "--experts auto"
    if machine.vram and where != "RAM" and _fits(request, replace(machine, vram=())):
        yield "--vram 0 (the CPU alone)"
    grown = _grown_ram if where == "RAM" else _grown_vram
    more = bisect_left(range(MOST_GIB), True, key=lambda gib: _fits(request, grown(machine, gib)))
    if more < MOST_GIB:
        enough = grown(machine, more)
        sizes = (enough.ram,) if where == "RAM" else enough.vram
        yield f"--{'ram' if where == 'RAM' else 'vram'} " + ",".join(f"{size // GIB}GiB" for size in sizes)


def _grown_ram(machine: Machine, gib: int) -> Machine:
    """A machine with this much more RAM, in whole GiB."""
    return replace(machine, ram=-(-machine.ram // GIB + -gib) * GIB)


def _grown_vram(machine: Machine, gib: int) -> Machine:
    """A machine whose GPUs have this much more memory each, in whole GiB."""
    return replace(machine, vram=tuple(-(-size // GIB + -gib) * GIB for size in machine.vram))


def _fits(request: PlanRequest, machine: Machine) -> bool:
    try:
        _place(request, machine)
    except PlanError:
        return False
    return True
