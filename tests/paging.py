"""KV caches whose blocks are out of order, as in a block pool that several sequences share."""

import torch
from torch import Tensor

from dsv2_local.kernels.format import CACHE_BLOCK, blocks_for
from dsv2_local.kernels.metadata import AttentionMetadata


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


def scattered_together(
    sequences: list[Tensor], lengths: list[int], absorbed: list[bool], room: int = 0
) -> tuple[Tensor, AttentionMetadata]:
    """Put the rows [S, …] of several sequences into the blocks of one cache; returns it with their metadata.

    The rows from `lengths` on are those of the step, in the given form of attention. The tables have `room` more
    entries than the longest sequence has blocks; entries past a sequence's blocks are -1.
    """
    parts, tables, first = [], [], 0
    for rows, length in zip(sequences, lengths, strict=True):
        blocks, table = scattered(rows, length)
        table[1:] += first
        first += len(blocks)
        parts.append(blocks)
        tables.append(table)
    most = max(map(len, tables)) + room
    padded = torch.stack([torch.cat((table, torch.full((most - len(table),), -1))) for table in tables])
    counts = [len(rows) - length for rows, length in zip(sequences, lengths, strict=True)]
    return torch.cat(parts), AttentionMetadata.of(padded, counts, absorbed)


def moved(metadata: AttentionMetadata, device: str) -> AttentionMetadata:
    """The same metadata on a device."""
    return AttentionMetadata.of(metadata.block_tables.to(device), metadata.counts, metadata.absorbed)


def gathered(blocks: Tensor, block_table: Tensor, count: int) -> Tensor:
    """The first `count` rows of a sequence, from its blocks."""
    return blocks[block_table[1 : 1 + blocks_for(count)]].flatten(0, 1)[:count]


def paged(rows: Tensor, length: int, absorbed: bool) -> tuple[Tensor, AttentionMetadata]:
    """`scattered_together` of one sequence."""
    return scattered_together([rows], [length], [absorbed])


def alone(metadata: AttentionMetadata, index: int) -> AttentionMetadata:
    """The metadata of one of several sequences."""
    part = slice(index, index + 1)
    return AttentionMetadata.of(metadata.block_tables[part], metadata.counts[part], metadata.absorbed[part])
