"""A CUDA device for the offload engine: a stream for copies beside the stream that the model computes on."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from dsv2_local.errors import DeviceMemoryError
from dsv2_local.kernels import cuda, ops
from dsv2_local.offload.device import Event, NativeHandles, typed_errors

REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


class CudaEvent:
    """The start and the end of an operation on a stream."""

    def __init__(self) -> None:
        self.start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        with typed_errors():
            self.end.synchronize()

    @property
    def done(self) -> bool:
        return bool(self.end.query())  # type: ignore[no-untyped-call]

    @property
    def seconds(self) -> float:
        return float(self.start.elapsed_time(self.end)) / 1e3


class CudaDevice:
    """One GPU."""

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self.name, self.kind = f"GPU {index}", torch.cuda.get_device_name(index)
        ops.stay_awake()
        self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    @property
    def free(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def allocate(self, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError:
            raise DeviceMemoryError(self.name, nbytes, self.free) from None

    def page_locked(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, pin_memory=True)

    def lock(self, memory: Tensor) -> bool:
        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, REGISTER_PORTABLE)  # type: ignore[no-untyped-call]
        return int(code) == 0

    def unlock(self, memory: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor], after: Sequence[Event] = ()) -> Event:
        def transfer() -> None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

        return self._queue(self._copies, transfer, after)

    def compute(self, work: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        return self._queue(torch.cuda.current_stream(self.torch_device), work, after)

    def join(self, event: Event) -> None:
        """Do nothing: the model computes on the stream that the work was queued on."""

    def synchronize(self) -> None:
        with typed_errors():
            torch.cuda.current_stream(self.torch_device).synchronize()

    def native_handles(self) -> NativeHandles | None:
        driver, number = cuda.driver(), self.torch_device.index
        if driver is None:
            return None
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self._copies):
            event = CudaEvent()
            for timed in (event.start, event.end):
                timed.record()  # torch creates an event when it is first recorded
            handles = self._copies.cuda_stream, event.start.cuda_event, event.end.cuda_event
            return NativeHandles(driver, number, cuda.context(number), *handles, event)

    def close(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def _queue(self, stream: torch.cuda.Stream, work: Callable[[], object], after: Sequence[Event]) -> Event:
        event = CudaEvent()
        with typed_errors(), torch.cuda.stream(stream):
            for earlier in after:
                stream.wait_event(cast(CudaEvent, earlier).end)
            event.start.record(stream)
            work()
            event.end.record(stream)
        return event
