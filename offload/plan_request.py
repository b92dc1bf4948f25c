"""The input of a plan: how a model is to run, and on which machine. No torch."""

from dataclasses import dataclass, field, fields
from enum import StrEnum

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.quant.schema import Recipe

DEFAULT_CONTEXT = 8192  # tokens
DEFAULT_PARALLEL = 16  # sequences


class Mode(StrEnum):
    """Where the routed experts are computed."""

    AUTO = "auto"
    """GPU if all experts fit in its memory, else HYBRID; CPU if there is no GPU."""
    GPU = "gpu"
    """On the GPU, whose memory has all experts."""
    HYBRID = "hybrid"
    """On the GPU if the expert has a slot; missing experts are split between PCIe copies and the CPU."""
    STREAM = "stream"
    """On the GPU; missing experts are copied to it."""
    CPU = "cpu"
    """On the CPU."""


@dataclass(frozen=True)
class Rates:
    """Speed of a machine: read bandwidth of each memory and of the PCIe link in GB/s, matrix products in GFLOP/s."""

    ram: float = 50.0
    link: float = 25.0
    vram: float = 900.0
    disk: float = 3.0
    cpu_gflops: float = 600.0
    gpu_gflops: float = 150_000.0


RATES = tuple(rate.name for rate in fields(Rates))


@dataclass(frozen=True)
class Machine:
    """A machine's memories, in bytes, and its speed.

    Attributes:
        vram: free memory of each GPU.
        ram: RAM of the machine, or what is free of it (see `available`).
        lockable: bytes of RAM that may be page-locked; None: no limit.
        available: whether `ram` is what is free now, so that the operating system's memory is not part of it.
        rates: bandwidths and compute speed.
    """

    vram: tuple[int, ...]
    ram: int
    lockable: int | None = None
    available: bool = False
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True)
class PlanRequest:
    """How a model is to run.

    Attributes:
        config: the architecture.
        recipe: the formats of its weights.
        context: maximum tokens of a sequence.
        cache_dtype: how the KV cache stores latents.
        experts: where to compute the routed experts; `Plan.mode` is the mode that AUTO resolves to.
        parallel: the most sequences in a decode step; they share the KV cache of `context` tokens.
    """

    config: ModelConfig
    recipe: Recipe
    context: int
    cache_dtype: CacheDtype = CacheDtype.BF16
    experts: Mode = Mode.AUTO
    parallel: int = DEFAULT_PARALLEL


def default_context(config: ModelConfig) -> int:
    """Tokens of context if the user requests none."""
    return min(DEFAULT_CONTEXT, config.max_position_embeddings)
