"""Native code of decode steps on GPUs: launches CUDA graphs and makes the native calls between them, without Python.

The library links against nothing of CUDA: it calls the driver through a table of addresses, which `driver` takes from
libcuda.so.1. Like the CPU kernels it is optional; without it, Python does the same.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from dsv2_local.errors import DeviceError

# The fields of `Driver` in driver.hpp, and the functions of libcuda.so.1 that they hold.
DRIVER_FUNCTIONS = {
    "set_context": "cuCtxSetCurrent",
    "launch_graph": "cuGraphLaunch",
    "synchronize": "cuStreamSynchronize",
    "copy_to_device": "cuMemcpyHtoDAsync_v2",
    "record": "cuEventRecord",
    "wait": "cuStreamWaitEvent",
    "elapsed": "cuEventElapsedTime",
}


class Driver(ctypes.Structure):
    """`Driver` in driver.hpp: addresses of functions."""

    _fields_ = tuple((name, c_void_p) for name in DRIVER_FUNCTIONS)


class _Call(ctypes.Structure):
    """`Call` in replay.cpp."""

    _fields_ = (("function", c_void_p), ("argument", c_void_p))


class _Launch(ctypes.Structure):
    """`Launch` in replay.cpp."""

    _fields_ = (("driver", c_void_p), ("context", c_void_p), ("graph", c_void_p))


@dataclass(frozen=True)
class NativeCall:
    """A native function `int32_t function(void* argument, void* stream)`, to be called on a device's current stream.

    Calling the object calls the function.

    Attributes:
        function: address of the function.
        argument: its argument, which stays alive and in place as long as this object.
        device: number of the GPU; -1: none, in tests, and the stream is a null pointer.
    """

    function: int
    argument: ctypes.Structure
    device: int

    def __call__(self) -> None:
        replay([self])


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None if it was not compiled when the package was installed."""
    path = Path(__file__).parent / f"_native{EXTENSION_SUFFIXES[0]}"
    if not path.is_file():
        return None
    found = ctypes.CDLL(str(path))
    found.dsv2_replay.argtypes, found.dsv2_replay.restype = (c_void_p, c_int64, c_void_p), c_int32
    return found


def address(name: str) -> int:
    """Address of a function of the library, which must have been compiled."""
    function = getattr(library(), name)
    return ctypes.cast(function, c_void_p).value or 0


@cache
def driver() -> Driver | None:
    """The functions of the CUDA driver; None if there is no driver."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
        addresses = {field: ctypes.cast(getattr(libcuda, name), c_void_p) for field, name in DRIVER_FUNCTIONS.items()}
    except (OSError, AttributeError):  # no driver, or one that is too old
        return None
    return Driver(**{field: pointer.value for field, pointer in addresses.items()})


def context(device: int) -> int:
    """The CUDA context that torch uses on a device."""
    found = c_void_p()
    with torch.cuda.device(device):
        ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(found))
    return found.value or 0


def launch(graph: Any, device: int) -> NativeCall | None:
    """The call that launches a captured `torch.cuda.CUDAGraph`; None if native code cannot launch it."""
    table = driver()
    if library() is None or table is None or not hasattr(graph, "raw_cuda_graph_exec"):
        return None
    argument = _Launch(ctypes.addressof(table), context(device), graph.raw_cuda_graph_exec())
    argument.keep = graph, table  # the graph lives as long as the call
    return NativeCall(address("dsv2_launch"), argument, device)


class NativeReplay:
    """Consecutive calls on one device, made by one call from Python."""

    def __init__(self, calls: Sequence[NativeCall]) -> None:
        native = library()
        assert native is not None, "there are no native calls without the library"
        self._calls, self._device, self._replay = list(calls), calls[0].device, native.dsv2_replay
        entries = [_Call(call.function, ctypes.addressof(call.argument)) for call in calls]
        self._array = (_Call * len(calls))(*entries)

    def __call__(self) -> None:
        """Make the calls on the device's current stream.

        Raises:
            DeviceError: a call failed; the ones after it were not made.
        """
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device >= 0 else None
        code = self._replay(self._array, len(self._array), stream)
        if code:
            raise DeviceError(f"{_error_name(code)} in a decode step (start again; the driver's log may say more)")


def replay(calls: Sequence[NativeCall]) -> None:
    """Make calls of one device; see `NativeReplay`."""
    NativeReplay(calls)()


def _error_name(code: int) -> str:
    """The name of a CUresult, such as CUDA_ERROR_ILLEGAL_ADDRESS."""
    name = c_char_p()
    try:
        get_name = ctypes.CDLL("libcuda.so.1").cuGetErrorName
        get_name.argtypes = (c_int32, POINTER(c_char_p))
        get_name(code, ctypes.byref(name))
    except OSError:
        pass
    return name.value.decode() if name.value else f"CUDA error {code}"
