"""KV caches whose blocks are out of order, as in a block pool that several sequences share."""

import torch
from torch import Tensor

from dsv2_local.kernels.format import CACHE_BLOCK, blocks_for


def scattered(rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Put rows [S, …] into the blocks [n, CACHE_BLOCK, …] of a cache; returns it with the block table of the sequence.

    The block table has `length` as the number of positions before the next step. One extra block, and the space after
    the last row, contain NaN.
    """
    count = blocks_for(len(rows))
    order = torch.arange(count + 1).roll(1).flip(0)[:count]
    blocks = torch.empty(count + 1, CACHE_BLOCK, *rows.shape[1:], dtype=rows.dtype)
    blocks.fill_(0xFF if rows.dtype == torch.uint8 else float("nan"))  # 0xFF makes the scales of 8-bit rows NaN
    for position, block in enumerate(order.tolist()):
        part = rows[position * CACHE_BLOCK : (position + 1) * CACHE_BLOCK]
        blocks[block, : len(part)] = part
    return blocks, torch.cat((torch.tensor([length]), order))


def gathered(blocks: Tensor, block_table: Tensor, count: int) -> Tensor:
    """The first `count` rows of a sequence, from its blocks."""
    return blocks[block_table[1 : 1 + blocks_for(count)]].flatten(0, 1)[:count]
