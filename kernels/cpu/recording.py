"""A step of native calls, recorded while it runs, so that one call can make all of it again.

Between two kernels of a decode step Python and torch take a few microseconds in which memory idles, and more when the
weights that stream past have thrown them out of the caches. A replay has none of that. It reads and writes the very
tensors of the recorded run, so what changes from step to step (token, position, rotation) has to lie in tensors.
"""

import ctypes
import threading
from collections.abc import Callable
from ctypes import c_double, c_int64, c_uint64, c_void_p
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# In the order of FUNCTIONS in replay.cpp.
RECORDED = ("linear", "swiglu", "experts", "attention", "rms_norm", "latents", "route", "embedding", "add")
ALLOCATIONS = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default}
# Seconds between two moments in which Ctrl-C is heard, and the calls until the first of them.
SLICE_SECONDS, FIRST_SLICE = 0.1, 12


_Arguments = c_uint64 * 13


class Call(ctypes.Structure):
    """`Call` of api.hpp."""

    _fields_ = (("function", c_int64), ("arguments", _Arguments))


class AtWork(threading.local):
    """What records this thread's calls at present, if anything does."""

    recording: "Recording | None" = None


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered while a step runs once; then `replay` runs it again, if it is `complete`.

    Attributes:
        names: the kernels called, in order.
        foreign: the first torch operation that computes something, which a replay would leave out; None if all was
            native.
        seconds: what each call has taken in all replays, if they are to take times.
    """

    def __init__(self, at_work: AtWork, replay: Callable[[int, int, int | None], None]) -> None:
        """`replay` is dsv2_replay: addresses of calls and of seconds (or None), and the number of calls between."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.foreign: str | None = None
        self.seconds: ctypes.Array[c_double] | None = None
        self._at_work, self._replay = at_work, replay
        self._kept: list[Any] = []  # tensors and arguments that the calls point to
        self._made: list[Call] = []
        self._calls: ctypes.Array[Call] | None = None
        self._slice = FIRST_SLICE  # calls made at a time

    def __enter__(self) -> "Recording":
        self._at_work.recording = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._at_work.recording = None
        self._calls = (Call * len(self._made))(*self._made)

    @property
    def complete(self) -> bool:
        """Whether the native calls were all that the step computed."""
        return self.foreign is None and bool(self.names)

    def add(self, name: str, types: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        """Note one call with the C types of its arguments."""
        if name not in RECORDED:
            self.foreign = self.foreign or name
            return
        words = [_word(type, argument) for type, argument in zip(types, arguments, strict=True)]
        self.names.append(name)
        self._kept.append(arguments)
        self._made.append(Call(RECORDED.index(name), _Arguments(*words)))

    def take_times(self) -> "ctypes.Array[c_double]":
        """Sum up from here on, in `seconds`, what each call takes."""
        self.seconds = (c_double * len(self.names))()
        return self.seconds

    def replay(self) -> None:
        """Make the calls again.

        Raises:
            KeyboardInterrupt: between two calls; those after it were not made.
        """
        calls, seconds = self._calls, self.seconds
        assert calls is not None
        start = perf_counter()
        for begin in range(0, len(calls), self._slice):
            first = ctypes.addressof(calls) + begin * ctypes.sizeof(Call)
            spent = None if seconds is None else ctypes.addressof(seconds) + begin * ctypes.sizeof(c_double)
            self._replay(first, min(self._slice, len(calls) - begin), spent)
        self._slice = max(1, int(len(calls) * SLICE_SECONDS / (perf_counter() - start)))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to be skipped, a mode imports torch's whole compiler, which takes a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self._kept.append(result)
        elif func._schema.is_mutable or not _is_view(result, args):
            self.foreign = self.foreign or str(func)
        return result


def _is_view(result: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result is the first argument again, or a part of it."""
    tensors = args and isinstance(args[0], Tensor) and isinstance(result, Tensor)
    return bool(tensors) and result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()


def _word(type: Any, argument: Any) -> int:
    """An argument of a C function as the low bytes of a word."""
    if hasattr(argument, "contents"):  # a pointer object; numbers are addresses already
        return ctypes.cast(argument, c_void_p).value or 0
    return int.from_bytes(bytes(type(argument)), "little")
