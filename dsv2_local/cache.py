"""The latent cache: all that multi-head latent attention has to remember.

Per token and layer it keeps the normed latent (kv_lora_rank, 512 numbers in the released models) and the rotated
rope key that all heads share (qk_rope_head_dim, 64): 576 numbers, where plain keys and values of 128 heads would
be 40,960. In bf16 that is 1,152 bytes per token and layer: 69,120 per token of the 236B model (60 layers),
8.44 GiB at 128K tokens; 31,104 and 3.80 GiB for V2-Lite (27 layers). fp32, which the torch reference keeps, doubles it.
With latents of 8 bits (`kernels/latents.py`) it is 512 + 8 · 2 + 64 · 2 = 656 bytes: 39,360 per token and 4.80 GiB at
128K, for V2-Lite 17,712 and 2.16 GiB.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv2_local.config import ModelConfig
from dsv2_local.errors import ContextLengthError
from dsv2_local.kernels.format import Cache
from dsv2_local.kernels.latents import row_shape

Allocate = Callable[[int], Tensor]
"""Bytes to memory: uint8 [nbytes], with any contents."""


def in_ram(nbytes: int) -> Tensor:
    """Memory of the CPU."""
    return torch.empty(nbytes, dtype=torch.uint8)


def bytes_per_token(config: ModelConfig, kind: Cache = Cache.BF16) -> int:
    """Bytes the cache takes for one token over all layers."""
    return config.num_hidden_layers * kind.bytes_per_token_and_layer(config)


class LatentCache:
    """Latents of one sequence, allocated up front: for each layer [context, a row as `kernels.latents` has it].

    A step writes its tokens layer by layer at `length` and advances once, so that a step that fails half way
    leaves the sequence as it was.
    """

    def __init__(
        self, config: ModelConfig, context: int, kind: Cache, allocate: Sequence[Allocate] | None = None
    ) -> None:
        """`allocate` makes each layer's memory; None: RAM."""
        self.context, self.kind = context, kind
        self.filled = torch.zeros(1, dtype=torch.int64)
        """`length`, where kernels find it: a replayed step has no other way to learn its position."""
        width, dtype = row_shape(kind, config.kv_lora_rank, config.qk_rope_head_dim)
        nbytes = context * width * dtype.itemsize
        made = (make(nbytes) for make in allocate or [in_ram] * config.num_hidden_layers)
        self.layers = [memory.view(dtype).view(context, width) for memory in made]
        """Each layer's rows [context, …], of which the first `length` are written."""
        everywhere = (self.filled.device, *(rows.device for rows in self.layers))
        places = {where: self.filled.to(where) for where in everywhere}
        self.lengths = [places[layer.device] for layer in self.layers]
        """`filled` where each layer is."""
        self._everywhere = list(places.values())

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return int(self.filled)

    def check_room(self, tokens: int) -> None:
        """ContextLengthError unless a step of `tokens` fits."""
        if self.length + tokens > self.context:
            raise ContextLengthError(self.length + tokens, self.context)

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has written."""
        self._set(self.length + tokens)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._set(min(self.length, length))

    def _set(self, length: int) -> None:
        for filled in self._everywhere:
            filled.fill_(length)
