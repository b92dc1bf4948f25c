"""A device made of RAM and two threads, so that the schedule runs, and fails, where there is no GPU.

Its link copies with a speed that can be set, its queue computes with the CPU's kernels, and both really run beside the
caller: what is read before it has come is rubbish, since a copy fills its target with rubbish when it begins (unless
speed is what is to be seen).
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
from dsv2_local.offload.device import Event

RUBBISH = 0xFF
"""As fp16 scales, it makes every result NaN."""

GB = 10**9


class Done:
    """An event of a stand-in."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.given, self.ended = time.perf_counter(), 0.0
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
    """A device that is none.

    Args:
        number: of the device among several.
        capacity: bytes of its memory.
        link: GB/s of copies, which leave out the rubbish; None for as fast as they go, and with it.
        hook: called in the device's threads before each "copy" and "compute", and by `allocate` and `lock`; it may
            sleep, or raise DeviceError to have that step fail.
    """

    def __init__(
        self,
        number: int = 0,
        *,
        capacity: int = 1 << 40,
        link: float | None = None,
        hook: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.name, self.kind, self.torch_device = f"stand-in {number}", "stand-in", torch.device("cpu")
        self.capacity, self.link, self.hook = capacity, link, hook
        self.allocated = 0
        self._link_free = 0.0  # when, on the clock of `time.perf_counter`
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
        return torch.full((nbytes,), RUBBISH, dtype=torch.uint8)

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
                    target.fill_(RUBBISH)
                    target.copy_(source)
                return time.perf_counter() - start
            seconds = sum(source.nbytes for source in sources) / (self.link * GB)
            # From when it could have begun, so that a thread which wakes up late does not slow the link.
            self._link_free = max(self._link_free, ready) + seconds
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            time.sleep(max(0.0, self._link_free - time.perf_counter()))
            return seconds

        return self._give("copy", transfer, after)

    def compute(self, work: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        def run(ready: float) -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return self._give("compute", run, after)

    def join(self, event: Event) -> None:
        event.wait()

    def synchronize(self) -> None:
        self.compute(lambda: None).wait()

    def close(self) -> None:
        for queue in self._queues.values():
            queue.put(None)
        for thread in self._threads:
            thread.join()
        self.allocated = 0

    def _give(self, queue: str, task: Callable[[float], float], after: Sequence[Event]) -> Event:
        """Queue a task, which is told when all that it waited for was done, and tells how long it took."""
        done = Done()
        self._queues[queue].put((done, task, tuple(after)))
        return done

    def _serve(self, step: str) -> None:
        while item := self._queues[step].get():
            done, task, after = item
            try:
                for event in after:
                    event.wait()
                self.hook(step)
                with torch.inference_mode():
                    done.seconds = task(max(done.given, *(event.ended for event in after), 0.0))
                done.finish()
            except Exception as error:  # whoever waits for the event is told
                done.finish(error)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
