"""What a plan is made from: a model as it is to run, and a machine. No torch."""

from dataclasses import dataclass, field, fields
from enum import StrEnum

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.quant.schema import Recipe

DEFAULT_CONTEXT = 8192  # tokens


class Mode(StrEnum):
    """Who computes the routed experts."""

    AUTO = "auto"
    """GPU if all experts fit there, else HYBRID; CPU where there is no GPU."""
    GPU = "gpu"
    """The GPU, which holds all experts."""
    HYBRID = "hybrid"
    """The GPU computes the experts in its slots; misses are split between PCIe copies and the CPU."""
    STREAM = "stream"
    """The GPU; experts without a slot are copied to it."""
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
    """A machine's memories, in bytes.

    Attributes:
        vram: that is free on each GPU.
        ram: see `available`.
        lockable: how much of the RAM may be page-locked; None: no limit.
        available: whether `ram` is what is free now, so that the system has its share already.
        rates: see `Rates`.
    """

    vram: tuple[int, ...]
    ram: int
    lockable: int | None = None
    available: bool = False
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True)
class PlanRequest:
    """What is to run.

    Attributes:
        config: the architecture.
        recipe: the formats of its weights.
        context: tokens that one sequence may have.
        cache_dtype: how the KV cache stores latents.
        experts: who is asked to compute the routed experts; `Plan.mode` says who will.
    """

    config: ModelConfig
    recipe: Recipe
    context: int
    cache_dtype: CacheDtype = CacheDtype.BF16
    experts: Mode = Mode.AUTO


def default_context(config: ModelConfig) -> int:
    """Tokens of context where none are asked for."""
    return min(DEFAULT_CONTEXT, config.max_position_embeddings)
