"""The layout of the KV cache, in torch: the reference for the kernels that write and read it.

Shapes: `T` tokens, `C` kv_lora_rank, `P` qk_rope_head_dim, `B` groups of 64 numbers of a latent, each with a scale.

A layer's cache is a tensor of blocks [blocks, CACHE_BLOCK, row], one row per token. A block table is int64 [1 + n]: the
length of a sequence, then the numbers of its blocks; the i-th of them stores the positions from CACHE_BLOCK · i on.
Entries past the sequence's blocks are ignored.

A row has one of two layouts:

- bf16 and fp32: C + P numbers, the normalised latent, then the rotated rope key.
- int8: bytes: C int8 codes, then B scales and the rope key, both bf16. That is 656 bytes in the released models, where
  a bf16 row takes 1,152. A number of the latent is code × scale. The scale of a group is its largest magnitude / 127,
  rounded up to bf16, so no code is clipped; bf16 covers all magnitudes of float32, which float16 would not. The error
  of a number is at most half a scale; for Gaussian latents it is 0.6 % of their norm.
"""

import torch
from torch import Tensor

from dsv2_local.kernels.format import BLOCK, CACHE_BLOCK, CacheDtype, latent_nbytes

DTYPES = {CacheDtype.BF16: torch.bfloat16, CacheDtype.FP32: torch.float32, CacheDtype.INT8: torch.uint8}


def row_shape(cache: CacheDtype, rank: int, rope: int) -> tuple[int, torch.dtype]:
    """The number of elements of a cache row, and their type; an int8 cache is an array of bytes."""
    return latent_nbytes(rank, rope) if cache is CacheDtype.INT8 else rank + rope, DTYPES[cache]


def row_indices(block_table: Tensor, start: int, count: int) -> Tensor:
    """The indices of positions [start, start + count) among all rows of a layer's cache: int64 [count]."""
    position = torch.arange(start, start + count, device=block_table.device)
    return block_table[1 + position // CACHE_BLOCK] * CACHE_BLOCK + position % CACHE_BLOCK


def write_rows(cache: Tensor, block_table: Tensor, latents: Tensor, rank: int) -> None:
    """Write latents [T, C + P] to the positions after the sequence's length, in the type of the cache."""
    rows = quantize_latents(latents, rank) if cache.dtype == torch.uint8 else latents.to(cache.dtype)
    cache.view(-1, cache.shape[2]).index_copy_(0, row_indices(block_table, int(block_table[0]), len(latents)), rows)


def read_rows(cache: Tensor, block_table: Tensor, count: int, rank: int, dtype: torch.dtype) -> Tensor:
    """The latents [count, C + P] of the first `count` positions of a sequence, in `dtype`."""
    rows = cache.view(-1, cache.shape[2])[row_indices(block_table, 0, count)]
    return (dequantize_latents(rows, rank) if rows.dtype == torch.uint8 else rows).to(dtype)


def quantize_latents(latents: Tensor, rank: int) -> Tensor:
    """Quantise latents and rope keys [T, C + P] to 8-bit rows, uint8 [T, latent_nbytes(C, P)]."""
    blocks = _blocks(latents[:, :rank].float())  # [T, B, 64]
    scales = _next_bf16(blocks.abs().amax(2) / 127.0)  # [T, B]
    codes = (blocks / scales.float()[..., None]).nan_to_num_(0.0).round().to(torch.int8)  # 0 / 0 if all are zeros
    rope = latents[:, rank:].bfloat16()
    return torch.cat(
        (codes.flatten(1)[:, :rank].view(torch.uint8), scales.view(torch.uint8), rope.contiguous().view(torch.uint8)), 1
    )


def dequantize_latents(rows: Tensor, rank: int) -> Tensor:
    """Convert 8-bit rows, uint8 [T, latent_nbytes(C, P)], to fp32 [T, C + P]."""
    halves = rows[:, rank:].contiguous().view(torch.bfloat16).float()
    count = -(-rank // BLOCK)
    latents = _blocks(rows[:, :rank].contiguous().view(torch.int8).float()) * halves[:, :count, None]
    return torch.cat((latents.flatten(1)[:, :rank], halves[:, count:]), 1)


def _blocks(x: Tensor) -> Tensor:
    """View [T, C], padded with zeros, as [T, B, 64]."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK))
    return padded.view(len(x), padded.shape[1] // BLOCK, BLOCK)


def _next_bf16(x: Tensor) -> Tensor:
    """Round positive numbers up to bf16, the upper half of a float's bits."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
