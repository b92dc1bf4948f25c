"""The KV cache of multi-head latent attention: latents, in blocks that sequences share.

Per token and layer it stores the normed latent (kv_lora_rank, 512 numbers in the released models) and the rotated rope
key that all heads share (qk_rope_head_dim, 64): 576 numbers, instead of 40,960 for plain keys and values of 128 heads.

    bf16: 576 · 2 = 1,152 bytes per token and layer: 69,120 per token of the 236B model (60 layers), 8.44 GiB at 128K
          tokens; 31,104 and 3.80 GiB for V2-Lite (27 layers). fp32, which the torch reference uses, doubles it.
    int8: 512 + 8 · 2 + 64 · 2 = 656 bytes (`kernels/latents.py`): 39,360 per token and 4.80 GiB at 128K; V2-Lite 17,712
          and 2.16 GiB.

The cache is paged: blocks of 64 tokens, found through a block table. Sequences share the blocks of a common prefix
(`block_pool.py`), and a shared block is copied before it is written (copy-on-write, `sequence.py`).
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.kernels.format import CACHE_BLOCK, CacheDtype, blocks_for
from dsv2_local.kernels.latents import row_indices, row_shape
from dsv2_local.runtime.block_files import BlockFiles
from dsv2_local.runtime.block_pool import BlockPool
from dsv2_local.runtime.block_store import BlockStore, first_key
from dsv2_local.runtime.sequence import Sequence

Allocate = Callable[[int], Tensor]
"""Allocates the given number of bytes, uninitialised: nbytes -> uint8 [nbytes]."""


def allocate_in_ram(nbytes: int) -> Tensor:
    """Allocate uninitialised RAM: uint8 [nbytes]."""
    return torch.empty(nbytes, dtype=torch.uint8)


def bytes_per_token(config: ModelConfig, dtype: CacheDtype = CacheDtype.BF16) -> int:
    """Bytes of the KV cache per token, over all layers."""
    return config.num_hidden_layers * dtype.bytes_per_token_and_layer(config)


def block_bytes(config: ModelConfig, dtype: CacheDtype) -> int:
    """Bytes of a block in all layers."""
    return CACHE_BLOCK * bytes_per_token(config, dtype)


def key_of(config: ModelConfig, dtype: CacheDtype, fingerprint: str, *, batch_invariant: bool = False) -> bytes:
    """The key in the block store before the first block: rows under different ones are never taken for each other.

    Args:
        config: the model's.
        dtype: how latents are stored.
        fingerprint: the hash of the model's manifest.
        batch_invariant: whether all tokens are computed in absorbed form.
    """
    width = row_shape(dtype, config.kv_lora_rank, config.qk_rope_head_dim)
    return first_key(1, fingerprint, str(dtype), str(width), config.num_hidden_layers, CACHE_BLOCK, batch_invariant)


class LatentCache:
    """The blocks of all layers, allocated up front; sequences share them.

    Attributes:
        context: maximum tokens of a sequence, and of all sequences together.
        dtype: how latents are stored.
        pool: which sequences hold which blocks.
        layers: each layer's blocks: [blocks, CACHE_BLOCK, a row of `kernels.latents`].
    """

    def __init__(
        self, config: ModelConfig, context: int, dtype: CacheDtype, allocate: Iterable[Allocate] | None = None
    ) -> None:
        """Allocate blocks for `context` tokens; `allocate` has the function for each layer's memory (None: RAM)."""
        self.context, self.dtype = context, dtype
        self.pool = BlockPool(blocks_for(context), copy=self._copy)
        width, torch_dtype = row_shape(dtype, config.kv_lora_rank, config.qk_rope_head_dim)
        nbytes = self.pool.count * CACHE_BLOCK * width * torch_dtype.itemsize
        memories = (make(nbytes) for make in allocate or [allocate_in_ram] * config.num_hidden_layers)
        self.layers = [memory.view(torch_dtype).view(-1, CACHE_BLOCK, width) for memory in memories]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def new_sequence(self, tokens: Iterable[int] = ()) -> Sequence:
        """A sequence of these tokens, none of which is computed yet."""
        return Sequence(self.pool, self.context, tokens)

    def rows(self, sequence: Sequence, layer: int) -> Tensor:
        """A sequence's rows in one layer, in RAM: [length, …]; a view of the cache if its blocks are contiguous."""
        rows, used = self.layers[layer].flatten(0, 1), sequence.blocks[: blocks_for(sequence.length)]
        first = used[0] if used else 0
        if used == tuple(range(first, first + len(used))):
            return rows[first * CACHE_BLOCK :][: sequence.length].cpu()
        return rows[self._indices(sequence, layer, 0, sequence.length)].cpu()

    def write_rows(self, sequence: Sequence, layer: int, rows: Tensor) -> None:
        """Write a sequence's next rows in one layer: [T, …] as `rows` returns them. Their blocks must be reserved."""
        at = self._indices(sequence, layer, sequence.length, len(rows))
        self.layers[layer].flatten(0, 1)[at] = rows.to(at.device)

    def add_store(self, first: bytes, ram: int = 0, files: BlockFiles | None = None) -> None:
        """Let blocks that are evicted go to a block store: to `ram` bytes of RAM, and to files; `first`: `key_of`."""
        nbytes = sum(layer[0].nbytes for layer in self.layers)
        self.pool.store = BlockStore(first, nbytes, self.read_block, self.write_block, ram, files)

    def read_block(self, block: int, tokens: int) -> NDArray[np.uint8]:
        """A copy of a block's rows in all layers, in RAM, with zeros after the first `tokens`: uint8 [bytes]."""
        rows = np.empty((len(self.layers), self.layers[0][0].nbytes), dtype=np.uint8)
        for numbers, in_ram in self._places():
            if in_ram:
                for number in numbers:
                    rows[number] = self._bytes(number)[block]
            else:  # one copy, which waits for what the device still computes
                copy = torch.stack([self.layers[number][block] for number in numbers]).cpu()
                rows[numbers] = copy.view(torch.uint8).numpy().reshape(len(numbers), -1)
        rows.reshape(len(self.layers), CACHE_BLOCK, -1)[:, tokens:] = 0
        return rows.reshape(-1)

    def write_block(self, block: int, rows: NDArray[np.uint8]) -> None:
        """Write what `read_block` has returned to a block that no sequence reads."""
        by_layer = rows.reshape(len(self.layers), -1)
        for numbers, in_ram in self._places():
            if in_ram:
                for number in numbers:
                    self._bytes(number)[block] = by_layer[number]
            else:
                like = self.layers[numbers[0]]
                copy = torch.from_numpy(by_layer[numbers]).view(like.dtype).view(-1, *like.shape[1:]).to(like.device)
                for number, source in zip(numbers, copy, strict=True):
                    self.layers[number][block] = source

    def _places(self) -> list[tuple[list[int], bool]]:
        """The numbers of the layers on each device, and whether that is RAM."""
        devices = dict.fromkeys(layer.device for layer in self.layers)
        return [
            ([number for number, layer in enumerate(self.layers) if layer.device == device], device.type == "cpu")
            for device in devices
        ]

    def _bytes(self, number: int) -> NDArray[np.uint8]:
        """A view of a layer in RAM: uint8 [blocks, bytes of a block]."""
        layer = self.layers[number]
        return layer.view(torch.uint8).numpy().reshape(len(layer), -1)

    def _indices(self, sequence: Sequence, layer: int, start: int, count: int) -> Tensor:
        return row_indices(torch.from_numpy(sequence.block_table), start, count).to(self.layers[layer].device)

    def _copy(self, source: int, target: int) -> None:
        for layer in self.layers:
            layer[target] = layer[source]
