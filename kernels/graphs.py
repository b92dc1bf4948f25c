"""A step on GPUs captured in CUDA graphs, so that one call launches what took hundreds.

What has to happen in Python during a step, since it needs numbers from the device or moves experts, stands between
graphs: whoever does it asks for the capture at work (`capturing`) and leaves it a function to be called in its place.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


class _AtWork(threading.local):
    """What captures this thread's launches at present, if anything does."""

    graphs: "Graphs | None" = None


_AT_WORK = _AtWork()


def capturing() -> "Graphs | None":
    """The capture that this thread's launches go to, if any does: nothing is computed now, but in each replay."""
    return _AT_WORK.graphs


class Graphs:
    """One step as graphs and the work of Python between them, in order.

    Tensors that a step makes lie in memory of the graphs' own; a replay reads and writes the very tensors of the
    capture.
    """

    def __init__(self) -> None:
        self._parts: list[Callable[[], object]] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pools: dict[int, Any] = {}
        self._streams: dict[int, torch.cuda.Stream] = {}
        self.whole = True
        """Whether a replay is launched without waiting for the device: no work stands between graphs."""

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        """Capture what `step` launches on the current device; returns its result, which each replay fills.

        All kernels must have run before, so that nothing is compiled or tuned.
        """
        torch.cuda.synchronize()
        before, _AT_WORK.graphs = torch.cuda.current_stream(), self
        try:
            self._begin()
            result = step()
            self._end()
        except BaseException:
            with suppress(RuntimeError):  # what was captured is of no use, but nothing works before it has ended
                self._end()
            raise
        finally:
            _AT_WORK.graphs = None
            torch.cuda.set_stream(before)
        return result

    def between(self, work: Callable[[], object]) -> None:
        """Have every replay call `work` here, after all that was captured so far and before the rest is launched."""
        self.whole = False
        self._end()
        self._parts.append(work)
        self._begin()

    def moved(self, x: Tensor, where: torch.device) -> Tensor:
        """x on another device, on which what follows is captured."""
        self._end()
        target = torch.empty(x.shape, dtype=x.dtype, device=where)
        self._parts.append(lambda: target.copy_(x))
        torch.cuda.set_device(where)
        self._begin()
        return target

    def replay(self) -> None:
        """Launch the step again on the current streams."""
        for part in self._parts:
            part()

    def _begin(self) -> None:
        device = torch.cuda.current_device()
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
            self._streams[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._streams[device])
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(self._pools[device], capture_error_mode="thread_local")

    def _end(self) -> None:
        graph = self._graph
        assert graph is not None
        graph.capture_end()
        self._parts.append(graph.replay)


def moved(x: Tensor, where: torch.device) -> Tensor:
    """x on a device, also while a step is captured; a copy from RAM does not wait for what the device has to do."""
    if x.device == where:
        return x
    if graphs := capturing():
        return graphs.moved(x, where)
    return x.pin_memory().to(where, non_blocking=True) if x.is_cpu and where.type == "cuda" else x.to(where)
