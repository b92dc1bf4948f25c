"""A prefill pass: chunks of prompts that are computed layer by layer, with other work between the layers.

A step that decodes would wait for seconds if a chunk of a prompt were computed at once, and small chunks would read
all experts again and again. So a pass is computed in pieces of half a layer, for as long as nobody should wait, and
goes on after the next decode step (layered prefill, arXiv 2510.08055). The chunks are those of the prompt alone, so its
results have the same bits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter

import torch
from torch import Tensor

from dsv2_local.runtime.batch import Part
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.model import Transformer


class PrefillPass:
    """Chunks of one or several sequences on their way through the layers.

    Its tokens count (`Sequence.advance`) when it is complete, so a pass can be dropped at any time.
    """

    def __init__(self, model: Transformer, cache: LatentCache, parts: Sequence[Part], chunks: Sequence[int]) -> None:
        """Prepare the tokens of `parts`, whose blocks are reserved; `chunks` are the sizes of their chunks."""
        self._last: list[Callable[[Tensor], object]] = []
        batch = model.new_batch(cache, [len(tokens) for _, tokens in parts], chunks)
        batch.fill(parts)
        self.rows = batch.rows
        self._pieces: Iterator[Tensor] = model.in_pieces(batch)
        self._count = self._pieces_left = 2 * len(model.layers)
        self._output = torch.empty(0)
        self._wait: Callable[[], object] = _nothing  # waits for the piece that was queued last

    def add(self, pieces: Iterable[Callable[[Tensor], object]]) -> None:
        """Add pieces of work, of about the time of half a layer, that get the hidden states [T, D] in the end."""
        self._last += pieces

    @property
    def done(self) -> float:
        """How much of it is computed, 0 to 1. Any thread may ask."""
        return 1 - self._pieces_left / self._count

    def advance(self, seconds: float) -> Tensor | None:
        """Compute pieces for about `seconds`, at least one -> the hidden states [T, D] if the pass is complete.

        On a GPU a piece is only queued, so this waits for the piece before it: else the whole pass would be queued at
        once, and a decode step after it would wait for all of it.
        """
        end = perf_counter() + seconds
        while self._pieces_left or self._last:
            if self._pieces_left:
                self._output = next(self._pieces)
                self._pieces_left -= 1
            else:
                self._last.pop(0)(self._output)
            before, self._wait = self._wait, waiter(self._output)
            before()
            if perf_counter() >= end:
                break
        return None if self._pieces_left or self._last else self._output


def waiter(x: Tensor) -> Callable[[], object]:
    """A function that waits until what is queued on the device of x so far is done."""
    if not x.is_cuda:
        return _nothing
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(x.device))
    return event.synchronize


def _nothing() -> None:
    """Nothing is queued in RAM."""
