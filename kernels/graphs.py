"""CUDA graph capture of a decode step on GPUs, so that a few graph launches replace hundreds of kernel launches.

Some work of a step must run on the host, because it waits for values from the GPU or moves experts. It runs between
graphs (a piecewise graph): code with such work receives the capture and registers functions that each replay calls.
Graphs and native functions between two functions of Python are replayed by one native call.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor

from dsv2_local.kernels import cuda
from dsv2_local.kernels.cuda import NativeCall, NativeReplay


class GraphMemory:
    """Where captured graphs have their tensors: a memory pool and a stream of each device.

    Several steps that never run at the same time may share it: what one step no longer needs, the next ones use.
    """

    def __init__(self) -> None:
        self._devices: dict[int, tuple[Any, torch.cuda.Stream]] = {}

    def on(self, device: int) -> tuple[Any, torch.cuda.Stream]:
        """The pool and the stream of the current device, which has this number."""
        if device not in self._devices:
            self._devices[device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self._devices[device]


class PiecewiseGraph:
    """One step as a list of CUDA graphs and of functions between them, in order.

    Tensors that a step creates are allocated in the graphs' own memory. A replay reads and writes the tensors of the
    captured run.

    Attributes:
        fully_captured: whether nothing runs between graphs, so that a replay never waits for the device.
    """

    def __init__(self, memory: GraphMemory | None = None) -> None:
        """An empty step; `memory` is shared with other steps, None: its own."""
        self._parts: list[_Captured | Callable[[], object]] = []
        self._replay: list[Callable[[], object]] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._memory = memory or GraphMemory()
        self.fully_captured = True

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        """Capture the kernels that `step` launches on the current device; each replay overwrites the returned tensor.

        All kernels must have run before, since a capture can neither compile nor tune them.
        """
        torch.cuda.synchronize()
        before = torch.cuda.current_stream()
        try:
            self._begin_graph()
            result = step()
            self._end_graph()
        except BaseException:
            with suppress(RuntimeError):  # the graph is useless, but CUDA refuses other work until the capture ends
                self._end_graph()
            raise
        finally:
            torch.cuda.set_stream(before)
        self._replay = _joined(self._parts)
        return result

    def call_between(self, *work: Callable[[], object]) -> None:
        """Call functions at this point of every replay: after launching what is captured so far, before the rest."""
        self.fully_captured = False
        self._end_graph()
        self._parts.extend(work)
        self._begin_graph()

    def copy_to(self, x: Tensor, device: torch.device) -> Tensor:
        """Copy x to another device in every replay; what follows is captured on that device."""
        self._end_graph()
        target = torch.empty(x.shape, dtype=x.dtype, device=device)
        self._parts.append(lambda: target.copy_(x))
        torch.cuda.set_device(device)
        self._begin_graph()
        return target

    def replay(self) -> None:
        """Run the step again: launch its graphs on the current streams and call the functions between them."""
        for part in self._replay:
            part()

    def _begin_graph(self) -> None:
        pool, stream = self._memory.on(torch.cuda.current_device())
        torch.cuda.set_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool, capture_error_mode="thread_local")

    def _end_graph(self) -> None:
        graph = self._graph
        assert graph is not None
        graph.capture_end()
        self._parts.append(_Captured(graph, torch.cuda.current_device()))


@dataclass(frozen=True)
class _Captured:
    """A captured graph and the number of its device."""

    graph: torch.cuda.CUDAGraph
    device: int

    def launch(self) -> Callable[[], object]:
        """A native call that launches the graph, or torch's own function."""
        return cuda.launch(self.graph, self.device) or self.graph.replay


def _joined(parts: Sequence[_Captured | Callable[[], object]]) -> list[Callable[[], object]]:
    """Functions that replay the parts; if some are native calls, consecutive ones and graphs become one function."""
    if not any(isinstance(part, NativeCall) for part in parts):
        return [part.graph.replay if isinstance(part, _Captured) else part for part in parts]
    joined: list[Callable[[], object]] = []
    calls = (part.launch() if isinstance(part, _Captured) else part for part in parts)
    for device, group in groupby(calls, key=lambda call: call.device if isinstance(call, NativeCall) else None):
        run = list(group)
        joined.extend(run if device is None else [NativeReplay(cast(list[NativeCall], run))])
    return joined


def to_device(x: Tensor, device: torch.device, capture: PiecewiseGraph | None = None) -> Tensor:
    """Copy x to a device, also during capture; a copy from RAM does not wait for earlier work of the device."""
    if x.device == device:
        return x
    if capture:
        return capture.copy_to(x, device)
    return x.pin_memory().to(device, non_blocking=True) if x.is_cpu and device.type == "cuda" else x.to(device)
