"""The layout of a matrix in memory, the same in files, in RAM and in GPU memory.

Shapes: `R` rows (outputs), `C` columns (inputs), `G` groups of 8 rows, `B` blocks of 64 columns.

A matrix [R, C] is padded with zeros to [8·G, 64·B] and cut into tiles of 8 rows × 64 columns. Within a tile the
rows are interleaved, so that the lanes of a vector register are rows and a product needs no sum across lanes. A stored
matrix consists of these arrays, called planes:

- nf4: codes [G, B, 8, 8, 4] uint8, indexed [group, block, octet o, row r, j]; the low nibble is the code of column
  8·o + j, the high nibble that of column 8·o + 4 + j. A tile takes 256 bytes.
- int8: codes [G, B, 16, 8, 4] int8, indexed [group, block, quad q, row r, j], column 4·q + j. A tile takes 512 bytes.
- scales, for both: [G, B, 8] float16, one per row and block. A weight is level(code) × scale.
- bf16: the plain matrix [R, C], row-major and unpadded, no scales.

Codes and scales are separate planes (all codes, then all scales), so that codes stay aligned for vector registers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dsv2_local.kernels.format import BLOCK, ROWS, ExpertLayout, Format, matrix_nbytes

# The 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E), with the values that bitsandbytes uses.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Plane:
    """An array in a file: its name, type and shape. The name of a matrix's plane is a suffix to the matrix's name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


def planes(format: Format, rows: int, cols: int) -> tuple[Plane, ...]:
    """The planes of a matrix [rows, cols] in the order in which they are stored."""
    if format is Format.BF16:
        return (Plane("", torch.bfloat16, (rows, cols)),)
    groups, blocks = -(-rows // ROWS), -(-cols // BLOCK)
    if format is Format.NF4:
        codes = Plane(".codes", torch.uint8, (groups, blocks, 8, ROWS, 4))
    else:
        codes = Plane(".codes", torch.int8, (groups, blocks, 16, ROWS, 4))
    return codes, Plane(".scales", torch.float16, (groups, blocks, ROWS))


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [rows, cols] in its stored format; `scales` is None only for bf16."""

    format: Format
    rows: int
    cols: int
    codes: Tensor
    scales: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors of the planes, in the order of `planes`."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)

    def placed(self, put: Callable[[Tensor], Tensor]) -> "Matrix":
        """The same matrix with `put` applied to each of its tensors, for example to move them to a device."""
        return Matrix(self.format, self.rows, self.cols, *map(put, self.parts))

    @classmethod
    def from_bytes(cls, format: Format, rows: int, cols: int, data: Tensor) -> "Matrix":
        """View `data` (uint8 [matrix_nbytes]) as a matrix, without a copy."""
        parts, offset = [], 0
        for plane in planes(format, rows, cols):
            parts.append(data[offset : offset + plane.nbytes].view(plane.dtype).view(plane.shape))
            offset += plane.nbytes
        return cls(format, rows, cols, *parts)


def expert_matrices(layout: ExpertLayout, record: Tensor) -> tuple[Matrix, Matrix, Matrix]:
    """View an expert's record (uint8 [nbytes]) as gate, up and down, without a copy."""
    matrices, offset = [], 0
    for shape in layout.shapes.values():
        size = matrix_nbytes(layout.format, *shape)
        matrices.append(Matrix.from_bytes(layout.format, *shape, record[offset : offset + size]))
        offset += size
    gate, up, down = matrices
    return gate, up, down


def to_tiles(values: Tensor) -> Tensor:
    """Pad values [R, C] with zeros and view them as [G, 8, B, 64]."""
    rows, cols = values.shape
    pad = (0, -cols % BLOCK, 0, -rows % ROWS)
    if any(pad):
        values = torch.nn.functional.pad(values, pad)
    return values.view(-1, ROWS, values.shape[1] // BLOCK, BLOCK)


def pack_nf4(codes: Tensor) -> Tensor:
    """Pack nf4 codes, 0 to 15 in uint8 [G, 8, B, 64], into the stored plane [G, B, 8, 8, 4]."""
    groups, rows, blocks, _ = codes.shape
    low, high = codes.view(groups, rows, blocks, 8, 2, 4).unbind(4)  # [G, 8r, B, 8o, 4]
    return (low | (high << 4)).permute(0, 2, 3, 1, 4).contiguous()


def unpack_nf4(plane: Tensor) -> Tensor:
    """The inverse of `pack_nf4`: codes 0 to 15 in uint8 [G, 8, B, 64]."""
    groups, blocks = plane.shape[:2]
    quads = plane.view(torch.int32)[..., 0]  # [G, B, 8o, 8r]: four bytes are moved as one number
    nibbles = torch.stack((quads & 0x0F0F0F0F, (quads >> 4) & 0x0F0F0F0F), dim=4)  # [G, B, 8o, 8r, 2]
    return nibbles.permute(0, 3, 1, 2, 4).contiguous().view(torch.uint8).view(groups, ROWS, blocks, BLOCK)


def pack_int8(codes: Tensor) -> Tensor:
    """Rearrange int8 codes [G, 8, B, 64] into the stored plane [G, B, 16, 8, 4]."""
    groups, rows, blocks, _ = codes.shape
    return codes.view(groups, rows, blocks, 16, 4).permute(0, 2, 3, 1, 4).contiguous()


def unpack_int8(plane: Tensor) -> Tensor:
    """The inverse of `pack_int8`: int8 codes [G, 8, B, 64]."""
    groups, blocks = plane.shape[:2]
    return plane.permute(0, 3, 1, 2, 4).reshape(groups, ROWS, blocks, BLOCK)
