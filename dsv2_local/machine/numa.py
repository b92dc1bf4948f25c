"""Where memory lies on a machine with several NUMA nodes: spread over all nodes that compute.

Threads claim rows of whichever expert comes next, so each of them reads everything. Pages spread evenly give every
thread the same mixture of near and far memory and add up the nodes' bandwidths; left alone, a file's pages all lie on
the node of the thread that first touched them.
"""

import ctypes
import platform
from collections.abc import Iterable
from pathlib import Path

from dsv2_local.machine.resources import ROOT, numa_nodes

# Neither libc has functions for these; numbers of (get_mempolicy, set_mempolicy) by machine.
_CALLS = {"x86_64": (239, 238), "aarch64": (236, 237)}
_DEFAULT, _INTERLEAVE = 0, 3


def spread_memory(cpus: Iterable[int], root: Path = ROOT) -> list[int]:
    """Have new pages lie in turns on the nodes of these CPUs -> those nodes; [] where there is nothing to spread.

    It holds for memory and for pages of files that this thread, and threads that it starts from now on, touch first;
    what is in memory stays where it is. A policy that was set from outside (numactl) is left alone.
    """
    chosen = set(cpus)
    nodes = [node for node, members in numa_nodes(root).items() if chosen & set(members)]
    return nodes if len(nodes) > 1 and _policy() == _DEFAULT and interleave(nodes) else []


def interleave(nodes: list[int]) -> bool:
    """Set the policy of this thread; False where the kernel refuses."""
    if platform.machine() not in _CALLS:
        return False
    words = (ctypes.c_ulong * (max(nodes) // 64 + 1))()
    for node in nodes:
        words[node // 64] |= 1 << node % 64
    # The kernel takes the number of bits less one.
    arguments = (ctypes.c_long(_INTERLEAVE), words, ctypes.c_ulong(64 * len(words) + 1))
    return bool(_libc().syscall(ctypes.c_long(_CALLS[platform.machine()][1]), *arguments) == 0)


def _policy() -> int | None:
    """This thread's policy; None where the kernel does not tell."""
    if platform.machine() not in _CALLS:
        return None
    mode = ctypes.c_int()
    nothing = (ctypes.c_void_p(), ctypes.c_ulong(), ctypes.c_void_p(), ctypes.c_ulong())
    failed = _libc().syscall(ctypes.c_long(_CALLS[platform.machine()][0]), ctypes.byref(mode), *nothing)
    return None if failed else mode.value


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
