"""The latent cache: all that multi-head latent attention has to remember.

Per token and layer it keeps the normed latent (kv_lora_rank, 512 numbers in the released models) and the rotated
rope key that all heads share (qk_rope_head_dim, 64): 576 numbers, where plain keys and values of 128 heads would
be 40,960. In bf16 that is 1,152 bytes per token and layer: 69,120 per token of the 236B model (60 layers),
8.44 GiB at 128K tokens; 31,104 and 3.80 GiB for V2-Lite (27 layers). fp32, which the torch reference keeps, doubles it.
With latents of 8 bits (`kernels/latents.py`) it is 512 + 8 · 2 + 64 · 2 = 656 bytes: 39,360 per token and 4.80 GiB at
128K, for V2-Lite 17,712 and 2.16 GiB.

Tokens come in pages of 64, so that what sequences have in common lies there once (`pages.py`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv2_local.config import ModelConfig
from dsv2_local.errors import ContextLengthError
from dsv2_local.kernels.format import PAGE, Cache, pages_of
from dsv2_local.kernels.latents import places, row_shape
from dsv2_local.pages import Pages

Allocate = Callable[[int], Tensor]
"""Bytes to memory: uint8 [nbytes], with any contents."""


def in_ram(nbytes: int) -> Tensor:
    """Memory of the CPU."""
    return torch.empty(nbytes, dtype=torch.uint8)


def bytes_per_token(config: ModelConfig, kind: Cache = Cache.BF16) -> int:
    """Bytes the cache takes for one token over all layers."""
    return config.num_hidden_layers * kind.bytes_per_token_and_layer(config)


class LatentCache:
    """Latents of a sequence on pages, all allocated up front: for each layer [pages, PAGE, a row of `kernels.latents`].

    A step makes room, writes its tokens layer by layer at `length` and advances once, so that a step that fails half
    way leaves the sequence as it was. Pages of earlier sequences are kept while there is room, for one that begins
    alike.

    Attributes:
        length: tokens of the sequence so far.
        layers: each layer's pages.
        sequences: for each layer, int64 [1 + pages] on its device: the length and the pages of the sequence, where
            kernels find them; a replayed step has no other way to learn its position.
    """

    def __init__(
        self, config: ModelConfig, context: int, kind: Cache, allocate: Sequence[Allocate] | None = None
    ) -> None:
        """Room for `context` tokens, in whole pages; `allocate` makes each layer's memory (None: RAM)."""
        self.context, self.kind, self.length = context, kind, 0
        self._pool = Pages(pages_of(context))
        self._pages: list[int] = []  # the sequence's
        self._shared = 0  # how many of them, the first, are kept or held by others too, and not to be written
        width, dtype = row_shape(kind, config.kv_lora_rank, config.qk_rope_head_dim)
        nbytes = self._pool.count * PAGE * width * dtype.itemsize
        made = (make(nbytes) for make in allocate or [in_ram] * config.num_hidden_layers)
        self.layers = [memory.view(dtype).view(-1, PAGE, width) for memory in made]
        empty = torch.zeros(1 + self._pool.count, dtype=torch.int64)
        everywhere = {where: empty.to(where) for where in dict.fromkeys(layer.device for layer in self.layers)}
        self.sequences = [everywhere[layer.device] for layer in self.layers]
        self._everywhere = list(everywhere.values())
        self._lengths = [sequence[:1] for sequence in self._everywhere]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def begin(self, tokens: Sequence[int]) -> int:
        """Begin another sequence with what is kept of `tokens`; how many of the first of them it has then."""
        before = self._pages
        self._pages, self._shared = [], 0
        self._set(0)
        self._pool.drop(before)
        self._pages, length = self._pool.find(tokens)
        self._shared = len(self._pages)
        self._show(0)
        self._set(length)
        return length

    def keep(self, tokens: Sequence[int]) -> None:
        """Keep the sequence's pages for later ones that begin like it; `tokens` are the first that it has, or all."""
        used = self._pages[: pages_of(len(tokens))]
        self._pool.keep(tokens, used)
        self._shared = max(self._shared, len(used))

    def clear(self) -> None:
        """Forget the sequence and all that is kept."""
        self.begin([])
        self._pool.clear()

    def make_room(self, tokens: int) -> None:
        """See to pages for a step of `tokens`, which no one else reads.

        Raises:
            ContextLengthError: the context ends before.
        """
        if self.length + tokens > self.context:
            raise ContextLengthError(self.length + tokens, self.context)
        if self.length // PAGE < self._shared:
            self._part()
        count = len(self._pages)
        while len(self._pages) * PAGE < self.length + tokens:
            self._pages.append(self._pool.take())
        self._show(count)

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has written."""
        self._set(self.length + tokens)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._set(min(self.length, length))

    def rows(self, layer: int) -> Tensor:
        """A layer's rows of the sequence, in RAM: [length, …], the cache's own memory where they lie there in order."""
        first, used = next(iter(self._pages), 0), self._pages[: pages_of(self.length)]
        rows = self.layers[layer].flatten(0, 1)
        if used == [*range(first, first + len(used))]:
            return rows[first * PAGE :][: self.length].cpu()
        return rows[places(self.sequences[layer], 0, self.length)].cpu()

    def put(self, layer: int, rows: Tensor) -> None:
        """Write a layer's next rows, for which there is room: [T, …] as `rows` gives them."""
        at = places(self.sequences[layer], self.length, len(rows))
        self.layers[layer].flatten(0, 1)[at] = rows.to(at.device)

    def _part(self) -> None:
        """Hold no page from `length` on that is not the sequence's own; one that it has filled in part is copied."""
        length, whole = self.length, self.length // PAGE
        others = self._pages[whole:]
        self._pages, self._shared = self._pages[:whole], whole
        self._set(whole * PAGE)
        self._pool.drop(others)
        if length % PAGE:
            page = self._pool.take()  # perhaps the same again, if there is no other
            self._pages.append(page)
            for layer in self.layers:
                layer[page] = layer[others[0]]
            self._show(whole)
            self._set(length)

    def _show(self, first: int) -> None:
        """Let kernels know the sequence's pages, of which those from `first` on are new."""
        if new := self._pages[first:]:
            for sequence in self._everywhere:
                sequence[1 + first : 1 + len(self._pages)] = torch.tensor(new)

    def _set(self, length: int) -> None:
        self.length = length
        for there in self._lengths:
            there.fill_(length)
