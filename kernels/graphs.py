"""A decode step on GPUs captured in CUDA graphs, so that one call launches what took hundreds.

Some of a step has to happen in Python, because it needs numbers from the device or moves experts. It stands between
graphs (a piecewise graph): whoever does it is given the capture and leaves it a function to call in its place.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


class PiecewiseGraph:
    """One step as CUDA graphs and the work for Python between them, in order.

    Tensors that a step makes lie in the graphs' own memory pool; a replay reads and writes the tensors of the capture.

    Attributes:
        fully_captured: whether a replay is launched without waiting for the device: no work stands between graphs.
    """

    def __init__(self) -> None:
        self._parts: list[Callable[[], object]] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pools: dict[int, Any] = {}
        self._streams: dict[int, torch.cuda.Stream] = {}
        self.fully_captured = True

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        """Capture what `step` launches on the current device; returns its result, which each replay fills.

        All kernels must have run before, so that nothing is compiled or tuned.
        """
        torch.cuda.synchronize()
        before = torch.cuda.current_stream()
        try:
            self._begin_graph()
            result = step()
            self._end_graph()
        except BaseException:
            with suppress(RuntimeError):  # what was captured is of no use, but nothing works before it has ended
                self._end_graph()
            raise
        finally:
            torch.cuda.set_stream(before)
        return result

    def call_between(self, work: Callable[[], object]) -> None:
        """Have every replay call `work` here, after all that was captured so far and before the rest is launched."""
        self.fully_captured = False
        self._end_graph()
        self._parts.append(work)
        self._begin_graph()

    def copy_to(self, x: Tensor, device: torch.device) -> Tensor:
        """x on another device, on which what follows is captured."""
        self._end_graph()
        target = torch.empty(x.shape, dtype=x.dtype, device=device)
        self._parts.append(lambda: target.copy_(x))
        torch.cuda.set_device(device)
        self._begin_graph()
        return target

    def replay(self) -> None:
        """Launch the step again on the current streams."""
        for part in self._parts:
            part()

    def _begin_graph(self) -> None:
        device = torch.cuda.current_device()
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
            self._streams[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._streams[device])
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(self._pools[device], capture_error_mode="thread_local")

    def _end_graph(self) -> None:
        graph = self._graph
        assert graph is not None
        graph.capture_end()
        self._parts.append(graph.replay)


def to_device(x: Tensor, device: torch.device, capture: PiecewiseGraph | None) -> Tensor:
    """x on a device, also while a step is captured; a copy from RAM does not wait for the device's earlier work."""
    if x.device == device:
        return x
    if capture:
        return capture.copy_to(x, device)
    return x.pin_memory().to(device, non_blocking=True) if x.is_cpu and device.type == "cuda" else x.to(device)
