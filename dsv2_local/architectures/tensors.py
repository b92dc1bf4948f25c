"""What a family says of each tensor of a model: its name, its shape and what it is for."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a tensor is for; a recipe (`quant.schema.Recipe`) gives each kind its format."""

    EMBEDDING = "embedding"
    HEAD = "lm_head"
    ATTENTION = "attention"
    KV_B = "kv_b"
    DENSE = "dense MLP"
    SHARED = "shared experts"
    ROUTED = "routed experts"
    ROUTER = "router"
    NORM = "norm"


UNQUANTISED = (Kind.ROUTER, Kind.NORM)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the dense files. `shape` is [rows, cols] of a matrix, or a norm's [size].

    `source` is the hub's name where it differs: both halves of kv_b come from one tensor.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    source: str = ""

    @property
    def source_name(self) -> str:
        return self.source or self.name

    @property
    def quantised(self) -> bool:
        return self.kind not in UNQUANTISED
