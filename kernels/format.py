"""The formats of weights and the bytes that they take; how the bytes lie is `kernels.layout`. No torch."""

from dataclasses import dataclass
from enum import StrEnum

ROWS = 8
BLOCK = 64


class Format(StrEnum):
    """How weights are stored; the bits include the scales."""

    NF4 = "nf4"
    INT8 = "int8"
    BF16 = "bf16"

    @property
    def bits(self) -> float:
        """Bits per weight of a matrix that needs no padding."""
        return {Format.NF4: 4.25, Format.INT8: 8.25, Format.BF16: 16.0}[self]


def matrix_nbytes(format: Format, rows: int, cols: int) -> int:
    """Bytes of a matrix [rows, cols] with its scales and padding."""
    if format is Format.BF16:
        return 2 * rows * cols
    tiles = -(-rows // ROWS) * -(-cols // BLOCK)
    code_bytes = ROWS * BLOCK // (2 if format is Format.NF4 else 1)
    return tiles * (code_bytes + 2 * ROWS)  # fp16 scales


@dataclass(frozen=True)
class ExpertLayout:
    """One routed expert's record: gate [I, D], up [I, D] and down [D, I], one after the other."""

    format: Format
    hidden_size: int
    moe_intermediate_size: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The three matrices by name, in the order in which they are stored."""
        wide = (self.moe_intermediate_size, self.hidden_size)
        return {"gate_proj": wide, "up_proj": wide, "down_proj": wide[::-1]}

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return sum(matrix_nbytes(self.format, *shape) for shape in self.shapes.values())
