"""The formats of weights and of the KV cache, and their sizes in bytes. Does not import torch.

The layout of the bytes is in `kernels.layout` for weights and in `kernels.latents` for the cache.
"""

from dataclasses import dataclass
from enum import StrEnum

from dsv2_local.architectures.config import ModelConfig

ROWS = 8  # rows of a matrix that are interleaved in a tile
BLOCK = 64  # columns of a matrix, or numbers of a latent, that share a scale
CACHE_BLOCK = 64  # tokens per block of the KV cache
# On GPUs materialised attention rebuilds keys and values of as many heads at a time as stay below this many numbers.
REBUILT_NUMBERS = 1 << 27


class Format(StrEnum):
    """How weights are stored."""

    NF4 = "nf4"
    INT8 = "int8"
    BF16 = "bf16"

    @property
    def bits(self) -> float:
        """Bits per weight, scales included, of a matrix that needs no padding."""
        return {Format.NF4: 4.25, Format.INT8: 8.25, Format.BF16: 16.0}[self]


class CacheDtype(StrEnum):
    """How the KV cache is stored."""

    BF16 = "bf16"
    INT8 = "int8"
    FP32 = "fp32"
    """What the PyTorch reference uses when it computes in fp32."""

    def bytes_per_token_and_layer(self, config: ModelConfig) -> int:
        """2 or 4 bytes per number; for int8, 8-bit latents with a 16-bit scale per 64, and the rope key in bf16."""
        if self is not CacheDtype.INT8:
            return (2 if self is CacheDtype.BF16 else 4) * config.latent_dim
        return latent_nbytes(config.kv_lora_rank, config.qk_rope_head_dim)


def blocks_for(tokens: int) -> int:
    """The number of KV cache blocks that `tokens` tokens take; the last one may be partly empty."""
    return -(-tokens // CACHE_BLOCK)


def latent_nbytes(rank: int, rope: int) -> int:
    """Bytes of an 8-bit row of the cache: 656 in the released models, with rank 512 and rope 64."""
    return rank + 2 * -(-rank // BLOCK) + 2 * rope


def matrix_nbytes(format: Format, rows: int, cols: int) -> int:
    """Bytes of a stored matrix [rows, cols], scales and padding included."""
    if format is Format.BF16:
        return 2 * rows * cols
    tiles = -(-rows // ROWS) * -(-cols // BLOCK)
    code_bytes = ROWS * BLOCK // (2 if format is Format.NF4 else 1)
    return tiles * (code_bytes + 2 * ROWS)  # fp16 scales


@dataclass(frozen=True)
class ExpertLayout:
    """One routed expert's record: the matrices gate [I, D], up [I, D] and down [D, I], stored one after the other."""

    format: Format
    hidden_size: int
    moe_intermediate_size: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the three matrices by name, in the order in which they are stored."""
        wide = (self.moe_intermediate_size, self.hidden_size)
        return {"gate_proj": wide, "up_proj": wide, "down_proj": wide[::-1]}

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return sum(matrix_nbytes(self.format, *shape) for shape in self.shapes.values())


MAX_CANDIDATES = 2048
"""The largest number of tokens that `ops.top_candidates` returns per distribution."""
