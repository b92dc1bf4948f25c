"""What the offload engine asks of a GPU: memory, a link to copy over, and a queue of work.

Copies and work run on their own, each kind in the order given and beside the other; events say when something is done.
`offload/cuda.py` is the GPU itself, `offload/stand_in.py` runs the same schedule without one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from dsv2_local.errors import DeviceError


class Event(Protocol):
    """A copy or a piece of work that was given to a device."""

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            DeviceError: it failed, or something that it waited for did.
        """
        ...

    @property
    def done(self) -> bool:
        """Whether it is done, and well; asking does not wait."""
        ...

    @property
    def seconds(self) -> float:
        """What it took from its start to its end, waiting for others left out; only to be asked once it is done."""
        ...


class Device(Protocol):
    """A device with its memory, link and queue; all methods are called by one thread.

    Attributes:
        name: what messages call it, "GPU 0".
        kind: the model of the card, so that measured rates are kept for it.
        torch_device: where its tensors lie.
    """

    name: str
    kind: str
    torch_device: torch.device

    @property
    def free(self) -> int:
        """Bytes that `allocate` could still give."""
        ...

    def allocate(self, nbytes: int) -> Tensor:
        """Memory of the device: uint8 [nbytes], with any contents.

        Raises:
            DeviceMemoryError: there is not so much.
        """
        ...

    def page_locked(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A little RAM that copies from and to the device need not wait for."""
        ...

    def lock(self, memory: Tensor) -> bool:
        """Page-lock RAM, so that copies from it run at the link's full speed; whether the system allowed it."""
        ...

    def unlock(self, memory: Tensor) -> None:
        """Undo `lock`."""
        ...

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor], after: Sequence[Event] = ()) -> Event:
        """Copy from RAM to the device's memory over the link, one after the other, once the events are done.

        None of the tensors may be touched until the event, of all these copies, is done.
        """
        ...

    def compute(self, work: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        """Run `work`, which computes on the device's tensors, once the events and all work before it are done."""
        ...

    def join(self, event: Event) -> None:
        """From here on the caller may use what the work of `event` wrote.

        Raises:
            DeviceError: it failed.
        """
        ...

    def synchronize(self) -> None:
        """Wait for all that the device was given to compute, by `compute` or by the caller itself."""
        ...

    def close(self) -> None:
        """Wait for what is under way and give everything back."""
        ...


@contextmanager
def typed_errors() -> Iterator[None]:
    """Have what torch raises of a GPU's memory and state be a DeviceError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{_first_line(error)} (use a shorter --context, or less memory with --vram)") from error
    except torch.AcceleratorError as error:
        raise DeviceError(f"{_first_line(error)} (start again; the driver's log may say more)") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
