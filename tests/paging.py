"""Rows of a cache on pages that lie out of order, as sequences that share a pool leave them."""

import torch
from torch import Tensor

from dsv2_local.kernels.format import CACHE_BLOCK, blocks_for


def scattered(rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Rows [S, …] to (pages [n, CACHE_BLOCK, …], the sequence of which `length` positions come before the next step).

    One page more than is needed, and what follows the rows, hold no numbers.
    """
    count = blocks_for(len(rows))
    order = torch.arange(count + 1).roll(1).flip(0)[:count]
    blocks = torch.empty(count + 1, CACHE_BLOCK, *rows.shape[1:], dtype=rows.dtype)
    blocks.fill_(0xFF if rows.dtype == torch.uint8 else float("nan"))  # as 8-bit rows, 0xFF makes scales NaN
    for position, block in enumerate(order.tolist()):
        part = rows[position * CACHE_BLOCK : (position + 1) * CACHE_BLOCK]
        blocks[block, : len(part)] = part
    return blocks, torch.cat((torch.tensor([length]), order))


def gathered(blocks: Tensor, block_table: Tensor, count: int) -> Tensor:
    """The first `count` rows of a sequence."""
    return blocks[block_table[1 : 1 + blocks_for(count)]].flatten(0, 1)[:count]
