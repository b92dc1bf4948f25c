"""What of a model lies where, by bytes, before anything is loaded: pure functions, no torch.

A plan adds up everything that takes memory on each device and in RAM. What fits is granted and explained, with the
speed that the given bandwidths allow; what does not is refused with the shortfall and with changes that would make it
fit, each of them tried.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property, lru_cache
from math import prod

from dsv2_local.config import ModelConfig
from dsv2_local.errors import PlanError
from dsv2_local.kernels.format import PAGE, Cache, pages_of
from dsv2_local.quant.schema import Kind, Recipe, TensorSpec, active_weights, dense_files, expert_layout, stored_bytes

GB, GIB, MIB = 10**9, 1 << 30, 1 << 20

# Python with torch, and with CUDA's libraries; a CUDA context on the device.
PROCESS_BYTES, CUDA_PROCESS_BYTES, CONTEXT_BYTES = 256 * MIB, GIB, 600 * MIB
# Of a machine's RAM, what the system keeps: this share, and at least so much. Of RAM that is free now: this share.
SYSTEM_SHARE, SYSTEM_BYTES, SPARE_SHARE = 0.04, GIB, 0.02
STAGING_BUFFERS = 3
STAGING_BYTES = 320 * MIB  # of one buffer at most: large enough that a copy runs at the link's full speed
DEFAULT_CONTEXT = 8192
# Tokens of a step of prefill: enough for full-rate matrix products, on the CPU few enough to report and stop every
# second or so; where experts stream over the link, more tokens share one pass over them.
CPU_CHUNK, GPU_CHUNK, STREAM_CHUNK = 512, 4096, 8192
PIECE = 4096  # pairs of a token and a routed expert whose outputs are kept at a time beside a cache of experts
KEY_BLOCK = 4096  # cached positions whose keys and values are rebuilt at a time
ACTIVATION_BYTES = {"cpu": 4, "gpu": 2}
CAPTURED_BYTES = 32 * MIB  # what decode steps that are captured keep for themselves
CONTEXT_STEP, MOST_GIB = 1024, 4096  # of the remedies that are tried

# Shares of a memory's bandwidth that kernels reach; docs/log.md has the CPU's, the GPU's is a target.
CPU_EFFICIENCY, GPU_EFFICIENCY, LINK_EFFICIENCY = 0.85, 0.8, 0.9
UNLOCKED = 0.5  # of the link's speed, where RAM is not page-locked and every copy goes through the driver's buffer


class Mode(StrEnum):
    """Who computes routed experts."""

    AUTO = "auto"
    """The GPU alone if all fit there, else as HYBRID; the CPU where there is no GPU."""
    GPU = "gpu"
    """The GPU, which holds them all."""
    HYBRID = "hybrid"
    """The GPU those in its slots; the link and the CPU share the others."""
    STREAM = "stream"
    """The GPU, to which all that have no slot are copied."""
    CPU = "cpu"
    """The CPU."""


@dataclass(frozen=True)
class Rates:
    """What a machine can do: GB/s of reading, GFLOP/s of matrix products."""

    ram: float = 50.0
    link: float = 25.0
    vram: float = 900.0
    disk: float = 3.0
    cpu_gflops: float = 600.0
    gpu_gflops: float = 60_000.0


RATES = tuple(rate.name for rate in fields(Rates))


@dataclass(frozen=True)
class Machine:
    """Bytes: of each GPU that are free, of RAM, and how much of RAM may be page-locked (None: no limit)."""

    vram: tuple[int, ...]
    ram: int
    lockable: int | None = None
    available: bool = False
    """Whether `ram` is what is free now, so that the system has its share already."""
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True)
class Wish:
    """What is to run: a model in a recipe, tokens of context, how their latents are kept, who computes experts."""

    config: ModelConfig
    recipe: Recipe
    context: int
    cache: Cache = Cache.BF16
    experts: Mode = Mode.AUTO


@dataclass(frozen=True)
class Share:
    """What lies in one memory: bytes by part, and what is left of it."""

    name: str
    capacity: int
    parts: dict[str, int]
    layers: tuple[int, int] = (0, 0)
    """Of a GPU: its first layer and the one after its last."""
    slots: int = 0
    """Of a GPU: routed experts that it holds at a time."""

    @property
    def used(self) -> int:
        return sum(self.parts.values())

    @property
    def free(self) -> int:
        return self.capacity - self.used


@dataclass(frozen=True)
class Plan:
    """Where everything lies."""

    wish: Wish
    machine: Machine
    gpus: tuple[Share, ...]
    ram: Share
    ram_experts: int
    """Routed experts in RAM."""
    locked: bool
    """Whether those are page-locked, so that copies run at the link's full speed."""

    @property
    def experts(self) -> int:
        """Routed experts of the whole model."""
        return _experts(self.wish.config)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one of them."""
        return _sizes(self.wish).expert

    @property
    def slots(self) -> int:
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
    def caches(self) -> bool:
        """Whether GPUs hold some experts in slots and are sent others."""
        return bool(self.gpus) and not self.resident and self.wish.experts is not Mode.CPU

    @property
    def chunk(self) -> int:
        """Tokens of a step of prefill."""
        if not self.gpus:
            return CPU_CHUNK
        return STREAM_CHUNK if self.caches else GPU_CHUNK

    @property
    def notes(self) -> list[str]:
        """What slows it down, and what to do about it."""
        found = []
        if self.disk_experts:
            size = self.disk_experts * self.expert_bytes
            found.append(
                f"{self.disk_experts:,} of {self.experts:,} experts ({size / GB:,.1f} GB) do not fit in RAM and are "
                f"read from disk when they are needed: expect about {self.forecast.decode_tok_s:,.2g} tok/s, if the "
                f"disk reads {self.machine.rates.disk:g} GB/s"
            )
        if self.gpus and self.caches and not self.locked:
            locked = (self.machine.lockable or 0) / GIB
            found.append(
                f"only {locked:,.1f} GiB of RAM may be page-locked (ulimit -l), so that copies to the GPU run at about "
                "half of the link's speed; raise memlock in /etc/security/limits.conf"
            )
        return found

    @cached_property
    def forecast(self) -> "Forecast":
        return _forecast(self)


@dataclass(frozen=True)
class Forecast:
    """Tokens per second that the machine's rates allow, and what they rest on.

    The hit rate is that of even routing, slots over experts: `offload/lru.py` does better on every trace so far.
    """

    decode_tok_s: float
    prefill_tok_s: float
    prefill_tokens: int
    """Tokens of the prompt that the second figure is for."""
    hit_rate: float
    bound: str
    """What takes most of a decoded token's time."""


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a wish, as the parts of a plan need them."""

    wish: Wish

    @cached_property
    def expert(self) -> int:
        return expert_layout(self.wish.config, self.wish.recipe).nbytes if self.wish.config.moe_layers else 0

    @cached_property
    def _files(self) -> list[list[TensorSpec]]:
        """What is outside the layers, then each layer."""
        return list(dense_files(self.wish.config).values())

    @cached_property
    def layers(self) -> list[int]:
        """Dense weights of each layer."""
        return [self._stored(specs) for specs in self._files[1:]]

    @cached_property
    def embedding(self) -> int:
        return self._stored([spec for spec in self._files[0] if spec.kind is Kind.EMBEDDING])

    @cached_property
    def head(self) -> int:
        """The last norm and the head; one that is tied to the embedding is a second copy on a GPU."""
        head = self._stored([spec for spec in self._files[0] if spec.kind is not Kind.EMBEDDING])
        return head + (self.embedding if self.wish.config.tie_word_embeddings else 0)

    @property
    def experts_per_token(self) -> int:
        """Bytes of the routed experts that a token takes."""
        return len(self.wish.config.moe_layers) * self.wish.config.num_experts_per_tok * self.expert

    @cached_property
    def flops(self) -> float:
        """Of a token: a multiplication and an addition for each weight that it meets; attention's own are left out."""
        return 2.0 * active_weights(self.wish.config)

    def _stored(self, specs: list[TensorSpec]) -> int:
        """Bytes in memory, where norms and routers are fp32."""
        recipe = self.wish.recipe
        return sum(stored_bytes(spec, recipe) if spec.quantised else 4 * prod(spec.shape) for spec in specs)

    def cache(self, layers: int) -> int:
        """Of the whole context, in whole pages."""
        tokens = pages_of(self.wish.context) * PAGE
        return layers * tokens * self.wish.cache.bytes_per_token_and_layer(self.wish.config)

    def workspace(self, where: str, chunk: int, staged: bool = False) -> int:
        """Activations of a chunk, keys and values of a block of positions, and logits: what a step holds at most.

        `staged`: with outputs of single experts.
        """
        c, size = self.wish.config, ACTIVATION_BYTES[where]
        tokens, positions = min(chunk, self.wish.context), min(KEY_BLOCK, self.wish.context)
        heads = c.num_attention_heads
        hidden = 6 * tokens * c.hidden_size
        attention = (tokens + positions) * heads * (c.qk_head_dim + c.v_head_dim)
        experts = 2 * tokens * max(c.num_experts_per_tok * c.moe_intermediate_size, c.intermediate_size)
        outputs = 4 * PIECE * c.hidden_size if staged else 0
        captured = CAPTURED_BYTES if where == "gpu" else 0
        return size * (hidden + attention + experts) + outputs + captured + 4 * c.vocab_size

    def staging(self) -> int:
        """Three buffers, each a layer's experts or as many of them as `STAGING_BYTES` hold."""
        experts = min(self.wish.config.n_routed_experts, max(1, STAGING_BYTES // self.expert)) if self.expert else 0
        return STAGING_BUFFERS * experts * self.expert


@lru_cache(256)
def _sizes(wish: Wish) -> _Sizes:
    return _Sizes(wish)


def default_context(config: ModelConfig) -> int:
    """Tokens of context where none are asked for."""
    return min(DEFAULT_CONTEXT, config.max_position_embeddings)


def _experts(config: ModelConfig) -> int:
    return _experts_of(config, (0, config.num_hidden_layers))


def plan(wish: Wish, machine: Machine) -> Plan:
    """Place a model.

    Raises:
        PlanError: it does not fit, with the shortfall and what would make it fit.
    """
    try:
        return _place(wish, machine)
    except PlanError as error:
        raise PlanError(error.where, error.shortfall, tuple(_remedies(wish, machine, error.where))) from None


def _place(wish: Wish, machine: Machine) -> Plan:
    return _place_on_gpus(wish, machine) if machine.vram else _place_in_ram(wish, machine)


def _place_in_ram(wish: Wish, machine: Machine) -> Plan:
    """Everything on the CPU: dense weights and cache in RAM, experts there too as far as they fit."""
    sizes = _sizes(wish)
    tied = sizes.embedding if wish.config.tie_word_embeddings else 0
    parts = {
        "system": _system(machine),
        "program": PROCESS_BYTES,
        "dense weights": sum(sizes.layers) + sizes.embedding + sizes.head - tied,
        "latent cache": sizes.cache(len(sizes.layers)),
        "workspace": sizes.workspace("cpu", CPU_CHUNK),
    }
    ram, count = _with_experts(wish, machine, parts, "experts (mapped)")
    return Plan(wish, machine, (), ram, count, False)


def _place_on_gpus(wish: Wish, machine: Machine) -> Plan:
    """Attention, shared experts and cache on the GPUs, a run of layers each; slots in what is left of them."""
    sizes, split = _sizes(wish), _split(wish, machine.vram)
    parts = {"system": _system(machine), "program": CUDA_PROCESS_BYTES, "embedding": sizes.embedding}
    if wish.experts in (Mode.AUTO, Mode.GPU):
        gpus = _gpu_shares(sizes, machine.vram, split, staged=False)
        lacking = [_experts_of(wish.config, share.layers) - share.slots for share in gpus]
        if not any(lacking):
            return Plan(wish, machine, gpus, _fitting(Share("RAM", machine.ram, parts)), 0, False)
        if wish.experts is Mode.GPU:
            worst = max(range(len(gpus)), key=lambda gpu: lacking[gpu])
            raise PlanError(gpus[worst].name, lacking[worst] * sizes.expert - gpus[worst].free)
    if wish.experts is Mode.CPU:
        gpus = tuple(_without_slots(share) for share in _gpu_shares(sizes, machine.vram, split, staged=False))
        ram, count = _with_experts(wish, machine, parts, "experts (mapped)")
        return Plan(wish, machine, gpus, ram, count, False)
    gpus = _gpu_shares(sizes, machine.vram, split, staged=True)
    wanted = _experts(wish.config) * sizes.expert
    locked = wanted if machine.lockable is None else machine.lockable
    name = "experts (page-locked)" if locked >= wanted else "experts (mapped)"
    ram, count = _with_experts(wish, machine, parts, name)
    return Plan(wish, machine, gpus, ram, count, locked >= wanted)


def _gpu_shares(sizes: _Sizes, vram: tuple[int, ...], split: list[tuple[int, int]], staged: bool) -> tuple[Share, ...]:
    """What lies on each GPU; `staged`: with buffers through which experts stream."""
    shares = []
    for gpu, (capacity, (first, end)) in enumerate(zip(vram, split, strict=True)):
        parts = {
            "driver": CONTEXT_BYTES,
            "dense weights": sum(sizes.layers[first:end]) + (sizes.head if end == len(sizes.layers) else 0),
            "latent cache": sizes.cache(end - first),
            "workspace": sizes.workspace("gpu", STREAM_CHUNK if staged else GPU_CHUNK, staged),
        }
        if staged:
            parts["staging"] = sizes.staging()
        share = _fitting(Share(f"GPU {gpu}", capacity, parts, (first, end)))
        slots = min(share.free // sizes.expert, _experts_of(sizes.wish.config, (first, end))) if sizes.expert else 0
        shares.append(replace(share, parts={**parts, "expert slots": slots * sizes.expert}, slots=slots))
    return tuple(shares)


def _without_slots(share: Share) -> Share:
    return replace(share, parts={name: size for name, size in share.parts.items() if name != "expert slots"}, slots=0)


def _split(wish: Wish, vram: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs of layers, in proportion to the GPUs' memory by the bytes of each layer with its cache and experts."""
    sizes = _sizes(wish)
    experts = wish.config.n_routed_experts * sizes.expert
    weight = [dense + sizes.cache(1) + experts * wish.config.is_moe(layer) for layer, dense in enumerate(sizes.layers)]
    ends, done, layer = [], 0, 0
    for gpu in range(len(vram)):
        target = sum(weight) * sum(vram[: gpu + 1]) / sum(vram)
        while layer < len(weight) and done + weight[layer] / 2 <= target:
            done += weight[layer]
            layer += 1
        ends.append(layer)
    ends[-1] = len(weight)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _experts_of(config: ModelConfig, layers: tuple[int, int]) -> int:
    return sum(config.is_moe(layer) for layer in range(*layers)) * config.n_routed_experts


def _system(machine: Machine) -> int:
    if machine.available:
        return int(machine.ram * SPARE_SHARE)
    return max(SYSTEM_BYTES, int(machine.ram * SYSTEM_SHARE))


def _with_experts(wish: Wish, machine: Machine, parts: dict[str, int], name: str) -> tuple[Share, int]:
    """RAM with as many experts as fit beside `parts`, and how many they are."""
    share, size = _fitting(Share("RAM", machine.ram, parts)), _sizes(wish).expert
    count = min(share.free // size, _experts(wish.config)) if size else 0
    return replace(share, parts={**parts, name: count * size}), count


def _fitting(share: Share) -> Share:
    if share.free < 0:
        raise PlanError(share.name, -share.free)
    return share


def _remedies(wish: Wish, machine: Machine, where: str) -> Iterator[str]:
    """Changes of which each alone makes it fit, the least painful first; the last is more of what is short."""
    if wish.cache is Cache.BF16 and _fits(replace(wish, cache=Cache.INT8), machine):
        yield "--cache-type int8"
    steps = range(wish.context // CONTEXT_STEP)
    shorter = bisect_left(steps, True, key=lambda n: not _fits(replace(wish, context=(n + 1) * CONTEXT_STEP), machine))
    if shorter:
        yield f"--context {shorter * CONTEXT_STEP}"
    if wish.recipe is not Recipe.NF4 and _fits(replace(wish, recipe=Recipe.NF4), machine):
        yield "--recipe nf4"
    if wish.experts is Mode.GPU and _fits(replace(wish, experts=Mode.AUTO), machine):
        yield "--experts auto"
    if machine.vram and where != "RAM" and _fits(wish, replace(machine, vram=())):
        yield "--vram 0 (the CPU alone)"
    grown = _grown_ram if where == "RAM" else _grown_vram
    more = bisect_left(range(MOST_GIB), True, key=lambda gib: _fits(wish, grown(machine, gib)))
    if more < MOST_GIB:
        enough = grown(machine, more)
        sizes = (enough.ram,) if where == "RAM" else enough.vram
        yield f"--{'ram' if where == 'RAM' else 'vram'} " + ",".join(f"{size // GIB}GiB" for size in sizes)


def _grown_ram(machine: Machine, gib: int) -> Machine:
    return replace(machine, ram=-(-machine.ram // GIB + -gib) * GIB)


def _grown_vram(machine: Machine, gib: int) -> Machine:
    """As much more of each GPU, in whole GiB."""
    return replace(machine, vram=tuple(-(-size // GIB + -gib) * GIB for size in machine.vram))


def _fits(wish: Wish, machine: Machine) -> bool:
    try:
        _place(wish, machine)
    except PlanError:
        return False
    return True


def _forecast(p: Plan) -> Forecast:
    return _gpu_forecast(p) if p.gpus else _cpu_forecast(p)


def _cpu_forecast(p: Plan) -> Forecast:
    sizes, rates = _sizes(p.wish), p.machine.rates
    from_disk = p.disk_experts / max(1, p.experts)
    dense = sum(sizes.layers) + sizes.head
    seconds = {
        "RAM": (dense + (1 - from_disk) * sizes.experts_per_token) / (rates.ram * GB * CPU_EFFICIENCY),
        "disk": from_disk * sizes.experts_per_token / (rates.disk * GB),
    }
    tokens = min(CPU_CHUNK, p.wish.context)
    prefill = max(tokens * sizes.flops / (rates.cpu_gflops * GB), p.disk_experts * sizes.expert / (rates.disk * GB))
    return _figures(seconds, tokens / prefill, tokens, 0.0)


def _gpu_forecast(p: Plan) -> Forecast:
    """Misses are shared between the link and the CPU, which together read no faster than RAM gives."""
    mode = p.wish.experts
    sizes, rates = _sizes(p.wish), p.machine.rates
    hits = p.slots / p.experts if p.experts else 1.0
    missed = (1 - hits) * sizes.experts_per_token
    from_disk = p.disk_experts / max(1, p.experts)
    link = rates.link * LINK_EFFICIENCY * (1 if p.locked else UNLOCKED)
    cpu = 0.0 if mode is Mode.STREAM else rates.ram * CPU_EFFICIENCY
    both = min(rates.ram, cpu + (0.0 if mode is Mode.CPU else link))
    on_gpus = sum(sizes.layers) + sizes.head + hits * sizes.experts_per_token
    seconds = {
        "GPU memory": on_gpus / (rates.vram * GB * GPU_EFFICIENCY),
        "RAM and link": (1 - from_disk) * missed / (both * GB),
        "disk": from_disk * missed / (rates.disk * GB),
    }
    tokens = min(p.chunk, p.wish.context)
    streamed = p.ram_experts * (1 - hits) * sizes.expert if p.caches else 0
    flops = tokens * sizes.flops
    prefill = max(
        # Where the CPU computes the experts, most of the work is its own.
        flops / ((rates.cpu_gflops if mode is Mode.CPU else rates.gpu_gflops) * GB),
        streamed / (link * GB),
        p.disk_experts * sizes.expert / (rates.disk * GB),
    )
    return _figures(seconds, tokens / prefill, tokens, hits)


def _figures(seconds: dict[str, float], prefill: float, tokens: int, hits: float) -> Forecast:
    slowest = max(seconds, key=lambda name: seconds[name])
    return Forecast(1 / sum(seconds.values()), prefill, tokens, hits, slowest)
