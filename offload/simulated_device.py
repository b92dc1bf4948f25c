"""A device simulated with RAM and two threads, to test the offload engine and its error handling without a GPU.

The PCIe link has an adjustable speed, and work is computed by the CPU's kernels. Both run asynchronously to the caller,
and a copy fills its target with poison when it starts, so that reading a record before it has arrived is noticed (a
link with a set speed leaves the poison out).
"""

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from dsv2_local.errors import DeviceError, DeviceMemoryError
from dsv2_local.offload.device import Event, NativeHandles
from dsv2_local.offload.sizes import GB

POISON = 0xFF
"""Byte whose repetition is NaN as an fp16 scale, and so makes every result NaN."""


class SimulatedEvent:
    """An event of a simulated device."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.queued, self.ended = time.perf_counter(), 0.0
        self.error: BaseException | None = None
        self._done = threading.Event()

    def finish(self, error: BaseException | None = None) -> None:
        self.error, self.ended = error, time.perf_counter()
        self._done.set()

    @property
    def done(self) -> bool:
        return self._done.is_set() and self.error is None

    def wait(self) -> None:
        self._done.wait()
        if self.error is not None:
            raise DeviceError(str(self.error)) from self.error


class SimulatedDevice:
    """See `Device`.

    Args:
        number: number of the device among several.
        capacity: bytes of its memory.
        link: GB/s of copies, without poison; None for copies as fast as RAM allows, with poison.
        hook: called with "copy" and "compute" in the device's threads before each operation, and with "allocate" and
            "lock" by those methods; it may sleep, or raise DeviceError to make the operation fail.
    """

    def __init__(
        self,
        number: int = 0,
        *,
        capacity: int = 1 << 40,
        link: float | None = None,
        hook: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.name, self.kind, self.torch_device = f"simulated device {number}", "simulated", torch.device("cpu")
        self.capacity, self.link, self.hook = capacity, link, hook
        self.allocated = 0
        self._link_free = 0.0  # time at which the link is free again, as `time.perf_counter` counts
        self._queues = {name: SimpleQueue[Any]() for name in ("copy", "compute")}
        self._threads = [threading.Thread(target=self._serve, args=(name,), daemon=True) for name in self._queues]
        for thread in self._threads:
            thread.start()

    @property
    def free(self) -> int:
        return self.capacity - self.allocated

    def allocate(self, nbytes: int) -> Tensor:
        self.hook("allocate")
        if nbytes > self.free:
            raise DeviceMemoryError(self.name, nbytes, self.free)
        self.allocated += nbytes
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def page_locked(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    def lock(self, memory: Tensor) -> bool:
        self.hook("lock")
        return bool(_libc().mlock(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes)) == 0)

    def unlock(self, memory: Tensor) -> None:
        _libc().munlock(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes))

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor], after: Sequence[Event] = ()) -> Event:
        def transfer(ready: float) -> float:
            start = time.perf_counter()
            if self.link is None:
                for target, source in zip(targets, sources, strict=True):
                    target.fill_(POISON)
                    target.copy_(source)
                return time.perf_counter() - start
            seconds = sum(source.nbytes for source in sources) / (self.link * GB)
            # Counted from when the copy could have started, so that a thread that wakes up late does not slow the link.
            self._link_free = max(self._link_free, ready) + seconds
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            time.sleep(max(0.0, self._link_free - time.perf_counter()))
            return seconds

        return self._queue("copy", transfer, after)

    def compute(self, work: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        def run(ready: float) -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return self._queue("compute", run, after)

    def join(self, event: Event) -> None:
        event.wait()

    def synchronize(self) -> None:
        self.compute(lambda: None).wait()

    def native_handles(self) -> NativeHandles | None:
        return None

    def close(self) -> None:
        for queue in self._queues.values():
            queue.put(None)
        for thread in self._threads:
            thread.join()
        self.allocated = 0

    def _queue(self, queue: str, task: Callable[[float], float], after: Sequence[Event]) -> Event:
        """Queue a task: a function of the time at which it could have started that returns how long it took."""
        event = SimulatedEvent()
        self._queues[queue].put((event, task, tuple(after)))
        return event

    def _serve(self, step: str) -> None:
        while item := self._queues[step].get():
            event, task, after = item
            try:
                for earlier in after:
                    earlier.wait()
                self.hook(step)
                with torch.inference_mode():
                    event.seconds = task(max(event.queued, *(earlier.ended for earlier in after), 0.0))
                event.finish()
            except Exception as error:  # raised again by `wait`
                event.finish(error)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
