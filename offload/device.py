"""The interface between the offload engine and a GPU: memory, copies over the PCIe link, and a queue of work.

Copies and work run asynchronously: each kind in the order in which it was queued, and the two kinds beside each other.
Events say when an operation is done. `cuda_device.py` is a real GPU; `simulated_device.py` runs the same schedule
without one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv2_local.errors import DeviceError
from dsv2_local.kernels.cuda import Driver


@dataclass(frozen=True)
class NativeHandles:
    """A CUDA device as native code sees it (`kernels.cuda`).

    Attributes:
        driver: the functions of the driver.
        device: number of the device.
        context: its CUDA context.
        copies: the stream of its copies.
        copy_start, copy_end: two events with timing.
        keep: objects that must live as long as the handles.
    """

    driver: Driver
    device: int
    context: int
    copies: int
    copy_start: int
    copy_end: int
    keep: object = None


class Event(Protocol):
    """A copy or a piece of work that was queued on a device."""

    def wait(self) -> None:
        """Wait until the operation is done.

        Raises:
            DeviceError: the operation failed, or one that it waited for did.
        """
        ...

    @property
    def done(self) -> bool:
        """Whether the operation has finished without an error; does not wait."""
        ...

    @property
    def seconds(self) -> float:
        """Duration of the operation itself, without waiting for others; valid once it is done."""
        ...


class Device(Protocol):
    """A device with its memory, its PCIe link and its queue of work; all methods are called by one thread.

    Attributes:
        name: its name in messages, such as "GPU 0".
        kind: model of the card, under which measured rates are stored.
        torch_device: the torch device of its tensors.
    """

    name: str
    kind: str
    torch_device: torch.device

    @property
    def free(self) -> int:
        """Bytes that `allocate` can still provide."""
        ...

    def allocate(self, nbytes: int) -> Tensor:
        """Allocate device memory: uint8 [nbytes], uninitialised.

        Raises:
            DeviceMemoryError: less memory than that is free.
        """
        ...

    def page_locked(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate a small tensor in page-locked RAM, which the device can copy to and from asynchronously."""
        ...

    def lock(self, memory: Tensor) -> bool:
        """Page-lock existing RAM, so that copies from it run at full PCIe speed; False if the system refuses."""
        ...

    def unlock(self, memory: Tensor) -> None:
        """Undo `lock`."""
        ...

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor], after: Sequence[Event] = ()) -> Event:
        """Queue copies from RAM to device memory, one after the other, to start once the events in `after` are done.

        None of the tensors may be touched until the returned event, which covers all of these copies, is done.
        """
        ...

    def compute(self, work: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        """Queue `work`, which computes on device tensors, to run after the events in `after` and all earlier work."""
        ...

    def join(self, event: Event) -> None:
        """Make the results of the work of `event` available to the caller's next operations.

        Raises:
            DeviceError: the work failed.
        """
        ...

    def synchronize(self) -> None:
        """Wait for all work on the device, queued by `compute` or by the caller itself."""
        ...

    def native_handles(self) -> NativeHandles | None:
        """What native code needs to copy to the device; None if it cannot."""
        ...

    def close(self) -> None:
        """Wait for operations in progress and release the device."""
        ...


@contextmanager
def typed_errors() -> Iterator[None]:
    """Convert torch's errors about GPU memory and GPU state to DeviceError."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        raise typed(error) from error


def typed(error: Exception) -> Exception:
    """The DeviceError for an error of torch about GPU memory or GPU state; any other error itself."""
    if isinstance(error, torch.OutOfMemoryError):
        return DeviceError(f"{_first_line(error)} (use a shorter --context, or less memory with --vram)")
    if isinstance(error, torch.AcceleratorError):
        return DeviceError(f"{_first_line(error)} (start again; the driver's log may say more)")
    return error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
