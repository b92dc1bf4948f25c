"""Interleaves memory across the NUMA nodes that compute.

Threads claim rows of whichever expert is next, so every thread reads all of the weights. With interleaved pages each
thread reads the same mixture of local and remote memory, and the bandwidths of the nodes add up. By default all pages
of a file would be on the node of the thread that touched them first.
"""

import ctypes
import platform
from collections.abc import Iterable
from pathlib import Path

from dsv2_local.machine.resources import ROOT, numa_nodes

# System call numbers of (get_mempolicy, set_mempolicy) by architecture; libc has no functions for them.
_CALLS = {"x86_64": (239, 238), "aarch64": (236, 237)}
_DEFAULT, _INTERLEAVE = 0, 3


def spread_memory(cpus: Iterable[int], root: Path = ROOT) -> list[int]:
    """Interleave new pages across the nodes of these CPUs -> those nodes; [] if nothing was changed.

    This applies to memory and file pages that this thread, and threads that it starts afterwards, touch first; pages
    that are in memory already do not move. A policy that was set from outside (numactl) is respected.
    """
    chosen = set(cpus)
    nodes = [node for node, members in numa_nodes(root).items() if chosen & set(members)]
    return nodes if len(nodes) > 1 and _policy() == _DEFAULT and interleave(nodes) else []


def interleave(nodes: list[int]) -> bool:
    """Set this thread's memory policy to interleave across these nodes; False if the kernel refuses."""
    if platform.machine() not in _CALLS:
        return False
    words = (ctypes.c_ulong * (max(nodes) // 64 + 1))()
    for node in nodes:
        words[node // 64] |= 1 << node % 64
    # The kernel reads one bit less than this number.
    arguments = (ctypes.c_long(_INTERLEAVE), words, ctypes.c_ulong(64 * len(words) + 1))
    return bool(_libc().syscall(ctypes.c_long(_CALLS[platform.machine()][1]), *arguments) == 0)


def _policy() -> int | None:
    """This thread's memory policy; None if the kernel does not report it."""
    if platform.machine() not in _CALLS:
        return None
    mode = ctypes.c_int()
    nothing = (ctypes.c_void_p(), ctypes.c_ulong(), ctypes.c_void_p(), ctypes.c_ulong())
    failed = _libc().syscall(ctypes.c_long(_CALLS[platform.machine()][0]), ctypes.byref(mode), *nothing)
    return None if failed else mode.value


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
