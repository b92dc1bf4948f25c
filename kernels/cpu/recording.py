"""Recording the native kernel calls of a decode step, so that a single call can replay them all.

Between two kernels of a decode step Python and torch take a few microseconds, and more when the weights have evicted
them from the CPU caches; meanwhile the memory is idle. A replay avoids this. It reads and writes the same tensors as
the recorded run, so whatever changes from step to step (token, position, rotation) must be stored in tensors.
"""

import ctypes
import threading
from collections.abc import Callable, Mapping
from ctypes import c_double, c_int64, c_uint64, c_void_p
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default}
# A replay is cut into slices, since Ctrl-C takes effect only between native calls: seconds per slice, and the number of
# calls in a slice before their durations are known.
SLICE_SECONDS, FIRST_SLICE = 0.1, 12
CALL_ARGUMENTS = 15  # as in api.hpp

_Arguments = c_uint64 * CALL_ARGUMENTS


class Call(ctypes.Structure):
    """`Call` in api.hpp."""

    _fields_ = (("function", c_int64), ("arguments", _Arguments))


class ActiveRecording(threading.local):
    """The recording that is noting this thread's kernel calls, if there is one."""

    recording: "Recording | None" = None


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A recording of kernel calls: enter it while a step runs once, then `replay` repeats the step.

    Only a `complete` recording may be replayed.

    Attributes:
        names: the recorded kernels, in order.
        foreign: the first operation of the step that a replay would leave out (a torch operation that computes
            something, or a kernel that cannot be recorded); None if there was none.
        seconds: the duration of each call, summed over all replays since `take_times`; None before it.
    """

    def __init__(
        self, active: ActiveRecording, replay: Callable[[int, int, int | None], None], recordable: Mapping[str, int]
    ) -> None:
        """Create an empty recording.

        Args:
            active: where the kernels of this thread look for the recording to add to.
            replay: dsv2_replay of api.hpp: the address of the calls, their number, the address of the seconds or None.
            recordable: the number of each function that can be recorded, by its name.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.foreign: str | None = None
        self.seconds: ctypes.Array[c_double] | None = None
        self._active, self._replay, self._recordable = active, replay, recordable
        self._alive: list[Any] = []  # tensors and arguments that the calls point to
        self._recorded: list[Call] = []
        self._calls: ctypes.Array[Call] | None = None
        self._slice = FIRST_SLICE  # calls replayed at a time

    def __enter__(self) -> "Recording":
        self._active.recording = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._active.recording = None
        self._calls = (Call * len(self._recorded))(*self._recorded)

    @property
    def complete(self) -> bool:
        """Whether the recorded calls are all that the step computed, so that a replay is the whole step."""
        return self.foreign is None and bool(self.names)

    def add(self, name: str, types: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        """Record one kernel call; `types` are the ctypes of its arguments."""
        if name not in self._recordable:
            self.foreign = self.foreign or name
            return
        words = [_word(type, argument) for type, argument in zip(types, arguments, strict=True)]
        self.names.append(name)
        self._alive.append(arguments)
        self._recorded.append(Call(self._recordable[name], _Arguments(*words)))

    def take_times(self) -> "ctypes.Array[c_double]":
        """From now on, sum up the duration of each call in `seconds`, which is returned."""
        self.seconds = (c_double * len(self.names))()
        return self.seconds

    def replay(self) -> None:
        """Repeat the recorded calls.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the rest of the calls were not made.
        """
        calls, seconds = self._calls, self.seconds
        assert calls is not None
        start = perf_counter()
        for begin in range(0, len(calls), self._slice):
            first = ctypes.addressof(calls) + begin * ctypes.sizeof(Call)
            durations = None if seconds is None else ctypes.addressof(seconds) + begin * ctypes.sizeof(c_double)
            self._replay(first, min(self._slice, len(calls) - begin), durations)
        self._slice = max(1, int(len(calls) * SLICE_SECONDS / (perf_counter() - start)))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: to skip Dynamo, torch would import its whole compiler, which takes a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self._alive.append(result)
        elif func._schema.is_mutable or not _is_view(result, args):
            self.foreign = self.foreign or str(func)
        return result


def _is_view(result: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result shares the memory of the first argument."""
    tensors = args and isinstance(args[0], Tensor) and isinstance(result, Tensor)
    return bool(tensors) and result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()


def _word(type: Any, argument: Any) -> int:
    """An argument of a C function as a 64-bit word, in its low bytes."""
    if hasattr(argument, "contents"):  # a ctypes pointer; other pointers are given as addresses
        return ctypes.cast(argument, c_void_p).value or 0
    return int.from_bytes(bytes(type(argument)), "little")
