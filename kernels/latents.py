"""How tokens' rows lie in the KV cache, in torch: the meaning of what the native kernels write and read.

Shapes: `T` tokens, `C` kv_lora_rank, `P` qk_rope_head_dim, `B` blocks of 64 latents.

A layer's cache is blocks of rows, [blocks, CACHE_BLOCK, row]. A block table is int64 [1 + …]: a sequence's length, then
its block numbers, of which the i-th holds the positions from CACHE_BLOCK · i on; what follows them means nothing.

A row:

- bf16 and fp32: C + P numbers, the normed latent and then the rotated rope key.
- int8: bytes, C codes (int8), then B scales and the rope key (both bf16): 656 in the released models, where bf16 takes
  1,152. A latent is code × scale. A block's scale is its largest magnitude / 127, rounded up to bf16: no code is cut
  off, and no magnitude of float32 is out of reach, as it would be of float16. A latent is off by half a scale at most,
  Gaussian numbers by 0.6 % of their norm.
"""

import torch
from torch import Tensor

from dsv2_local.kernels.format import BLOCK, CACHE_BLOCK, CacheDtype, latent_nbytes

DTYPES = {CacheDtype.BF16: torch.bfloat16, CacheDtype.FP32: torch.float32, CacheDtype.INT8: torch.uint8}


def row_shape(cache: CacheDtype, rank: int, rope: int) -> tuple[int, torch.dtype]:
    """Numbers (int8: bytes) of a row, and their type."""
    return latent_nbytes(rank, rope) if cache is CacheDtype.INT8 else rank + rope, DTYPES[cache]


def row_indices(block_table: Tensor, start: int, count: int) -> Tensor:
    """Which rows of all, counted through the pages, have the positions from `start` on: int64 [count]."""
    position = torch.arange(start, start + count, device=block_table.device)
    return block_table[1 + position // CACHE_BLOCK] * CACHE_BLOCK + position % CACHE_BLOCK


def write_rows(cache: Tensor, block_table: Tensor, latents: Tensor, rank: int) -> None:
    """Put latents [T, C + P] into the next rows of a sequence, in the type that the cache has."""
    rows = quantize_latents(latents, rank) if cache.dtype == torch.uint8 else latents.to(cache.dtype)
    cache.view(-1, cache.shape[2]).index_copy_(0, row_indices(block_table, int(block_table[0]), len(latents)), rows)


def read_rows(cache: Tensor, block_table: Tensor, count: int, rank: int, dtype: torch.dtype) -> Tensor:
    """The latents [count, C + P] of a sequence's first positions, in `dtype`."""
    rows = cache.view(-1, cache.shape[2])[row_indices(block_table, 0, count)]
    return (dequantize_latents(rows, rank) if rows.dtype == torch.uint8 else rows).to(dtype)


def quantize_latents(latents: Tensor, rank: int) -> Tensor:
    """[T, C + P] to 8-bit rows: uint8 [T, latent_nbytes(C, P)]."""
    blocks = _blocks(latents[:, :rank].float())  # [T, B, 64]
    scales = _next_bf16(blocks.abs().amax(2) / 127.0)  # [T, B]
    codes = (blocks / scales.float()[..., None]).nan_to_num_(0.0).round().to(torch.int8)  # zeros have no scale
    rope = latents[:, rank:].bfloat16()
    return torch.cat(
        (codes.flatten(1)[:, :rank].view(torch.uint8), scales.view(torch.uint8), rope.contiguous().view(torch.uint8)), 1
    )


def dequantize_latents(rows: Tensor, rank: int) -> Tensor:
    """8-bit rows uint8 [T, …] to fp32 [T, C + P]."""
    halves = rows[:, rank:].contiguous().view(torch.bfloat16).float()
    count = -(-rank // BLOCK)
    latents = _blocks(rows[:, :rank].contiguous().view(torch.int8).float()) * halves[:, :count, None]
    return torch.cat((latents.flatten(1)[:, :rank], halves[:, count:]), 1)


def _blocks(x: Tensor) -> Tensor:
    """[T, C] to [T, B, 64], with zeros in the end."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK))
    return padded.view(len(x), padded.shape[1] // BLOCK, BLOCK)


def _next_bf16(x: Tensor) -> Tensor:
    """Positive numbers to the next bf16 that is not smaller: the upper half of a float, counted up."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
