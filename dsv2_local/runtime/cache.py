"""The KV cache of multi-head latent attention: latents, in blocks that sequences share.

Per token and layer it stores the normed latent (kv_lora_rank, 512 numbers in the released models) and the rotated rope
key that all heads share (qk_rope_head_dim, 64): 576 numbers, instead of 40,960 for plain keys and values of 128 heads.

    bf16: 576 · 2 = 1,152 bytes per token and layer: 69,120 per token of the 236B model (60 layers), 8.44 GiB at 128K
          tokens; 31,104 and 3.80 GiB for V2-Lite (27 layers). fp32, which the torch reference uses, doubles it.
    int8: 512 + 8 · 2 + 64 · 2 = 656 bytes (`kernels/latents.py`): 39,360 per token and 4.80 GiB at 128K; V2-Lite 17,712
          and 2.16 GiB.

The cache is paged: blocks of 64 tokens, found through a block table. Sequences share the blocks of a common prefix
(`block_pool.py`), and a shared block is copied before it is written (copy-on-write).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.errors import ContextLengthError
from dsv2_local.kernels.format import CACHE_BLOCK, CacheDtype, blocks_for
from dsv2_local.kernels.latents import row_indices, row_shape
from dsv2_local.runtime.block_pool import BlockPool

Allocate = Callable[[int], Tensor]
"""Allocates the given number of bytes, uninitialised: nbytes -> uint8 [nbytes]."""


def allocate_in_ram(nbytes: int) -> Tensor:
    """Allocate uninitialised RAM: uint8 [nbytes]."""
    return torch.empty(nbytes, dtype=torch.uint8)


def bytes_per_token(config: ModelConfig, dtype: CacheDtype = CacheDtype.BF16) -> int:
    """Bytes of the KV cache per token, over all layers."""
    return config.num_hidden_layers * dtype.bytes_per_token_and_layer(config)


class LatentCache:
    """The blocks of all layers, allocated up front, and the sequence that is being computed.

    A step reserves blocks, writes its tokens layer by layer at `length` and advances once, so a step that fails half
    way leaves the sequence as it was.

    Attributes:
        context: maximum tokens of a sequence.
        dtype: how latents are stored.
        length: tokens of the sequence so far.
        layers: each layer's blocks: [blocks, CACHE_BLOCK, a row of `kernels.latents`].
        block_tables: for each layer, int64 [1 + blocks] on its device: the sequence's length, then its block numbers.
            Kernels read them from memory, so that a replayed step finds its position.
    """

    def __init__(
        self, config: ModelConfig, context: int, dtype: CacheDtype, allocate: Sequence[Allocate] | None = None
    ) -> None:
        """Allocate blocks for `context` tokens; `allocate` has the function for each layer's memory (None: RAM)."""
        self.context, self.dtype, self.length = context, dtype, 0
        self._pool = BlockPool(blocks_for(context))
        self._blocks: list[int] = []  # the sequence's blocks, in the order of their tokens
        self._shared = 0  # how many of the first blocks are also cached or held by others, and must not be written
        width, torch_dtype = row_shape(dtype, config.kv_lora_rank, config.qk_rope_head_dim)
        nbytes = self._pool.count * CACHE_BLOCK * width * torch_dtype.itemsize
        memories = (make(nbytes) for make in allocate or [allocate_in_ram] * config.num_hidden_layers)
        self.layers = [memory.view(torch_dtype).view(-1, CACHE_BLOCK, width) for memory in memories]
        empty = torch.zeros(1 + self._pool.count, dtype=torch.int64)
        by_device = {device: empty.to(device) for device in dict.fromkeys(layer.device for layer in self.layers)}
        self.block_tables = [by_device[layer.device] for layer in self.layers]
        self._tables = list(by_device.values())
        self._lengths = [table[:1] for table in self._tables]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def match_prefix(self, tokens: Sequence[int]) -> int:
        """Begin another sequence with the longest cached prefix of `tokens`; returns the length of that prefix."""
        before = self._blocks
        self._blocks, self._shared = [], 0
        self._set_length(0)
        self._pool.release(before)
        self._blocks, length = self._pool.match(tokens)
        self._shared = len(self._blocks)
        self._update_tables(0)
        self._set_length(length)
        return length

    def insert_prefix(self, tokens: Sequence[int]) -> None:
        """Put the blocks of `tokens`, all tokens of the sequence or its first ones, into the prefix cache."""
        used = self._blocks[: blocks_for(len(tokens))]
        self._pool.insert(tokens, used)
        self._shared = max(self._shared, len(used))

    def clear(self) -> None:
        """Forget the sequence and the prefix cache."""
        self.match_prefix([])
        self._pool.clear()

    def reserve(self, tokens: int) -> None:
        """Give the sequence private blocks, which no other sequence reads, for `tokens` more tokens.

        Raises:
            ContextLengthError: the tokens do not fit in the context.
        """
        if self.length + tokens > self.context:
            raise ContextLengthError(self.length + tokens, self.context)
        if self.length // CACHE_BLOCK < self._shared:
            self._copy_on_write()
        count = len(self._blocks)
        while len(self._blocks) * CACHE_BLOCK < self.length + tokens:
            self._blocks.append(self._pool.allocate())
        self._update_tables(count)

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has written."""
        self._set_length(self.length + tokens)

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` tokens of the sequence; its blocks stay reserved."""
        self._set_length(min(self.length, length))

    def rows(self, layer: int) -> Tensor:
        """The sequence's rows in one layer, in RAM: [length, …]; a view of the cache if its blocks are contiguous."""
        first, used = next(iter(self._blocks), 0), self._blocks[: blocks_for(self.length)]
        rows = self.layers[layer].flatten(0, 1)
        if used == [*range(first, first + len(used))]:
            return rows[first * CACHE_BLOCK :][: self.length].cpu()
        return rows[row_indices(self.block_tables[layer], 0, self.length)].cpu()

    def write_rows(self, layer: int, rows: Tensor) -> None:
        """Write the sequence's next rows in one layer: [T, …] as `rows` returns them. Their blocks must be reserved."""
        at = row_indices(self.block_tables[layer], self.length, len(rows))
        self.layers[layer].flatten(0, 1)[at] = rows.to(at.device)

    def _copy_on_write(self) -> None:
        """Give the sequence private blocks from `length` on: copy the one it has filled in part, release the others."""
        length, full = self.length, self.length // CACHE_BLOCK
        shared = self._blocks[full:]
        self._blocks, self._shared = self._blocks[:full], full
        self._set_length(full * CACHE_BLOCK)
        self._pool.release(shared)
        if length % CACHE_BLOCK:
            block = self._pool.allocate()  # may be the released block itself, if no other is available
            self._blocks.append(block)
            for layer in self.layers:
                layer[block] = layer[shared[0]]
            self._update_tables(full)
            self._set_length(length)

    def _update_tables(self, first: int) -> None:
        """Write the sequence's block numbers from index `first` on, which are new, to the block tables."""
        if new := self._blocks[first:]:
            for table in self._tables:
                table[1 + first : 1 + len(self._blocks)] = torch.tensor(new)

    def _set_length(self, length: int) -> None:
        self.length = length
        for in_table in self._lengths:
            in_table.fill_(length)
