"""What this machine has: CPU features, cores, NUMA nodes, memory, and what the container leaves of them.

Linux only. Every reader takes the root below which proc and sys lie; what cannot be read counts as no limit.
"CPU" is a logical CPU, numbered as the kernel does; a physical core is one CPU, or several SMT siblings.
"""

import os
import re
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from math import floor, inf
from pathlib import Path, PurePosixPath

from dsv2_local.errors import InputError

ROOT = Path("/")
FEW_CORES = 4  # below this, leaving cores idle costs too little to warn about


def cpu_features(root: Path = ROOT) -> frozenset[str]:
    """Instruction set flags of the first CPU, in the kernel's spelling ("avx512_vnni", "asimd"); empty if unreadable.

    One CPU speaks for all: the kernel lists on each what all of them can do.
    """
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return frozenset(line[1].split() if line else ())


def processor(root: Path = ROOT) -> str:
    """The first CPU's model as the kernel names it; "unknown" if unreadable."""
    line = re.search(r"^model name\s*:\s*(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return line[1] if line else "unknown"


def numa_nodes(root: Path = ROOT) -> dict[int, list[int]]:
    """CPUs of each node that has both memory and CPUs, by its number; one node if unreadable."""
    base = root / "sys/devices/system/node"
    nodes = {node: _numbers(base / f"node{node}/cpulist") for node in _numbers(base / "has_memory")}
    return {node: cpus for node, cpus in nodes.items() if cpus} or {0: list(range(os.cpu_count() or 1))}


def physical_cores(affinity: Iterable[int], root: Path = ROOT) -> list[int]:
    """The lowest CPU of each physical core among the CPUs of `affinity`.

    The cores of one NUMA node lie together, and those of nodes without memory come last. A CPU whose siblings
    cannot be read is a core of its own.
    """
    lowest: dict[tuple[int, ...], int] = {}
    for cpu in sorted(affinity):
        lowest.setdefault(_siblings(cpu, root), cpu)
    nodes = numa_nodes(root)
    node_of = {cpu: node for node, cpus in nodes.items() for cpu in cpus}
    return sorted(lowest.values(), key=lambda cpu: (node_of.get(cpu, inf), cpu))


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the cgroups (v2 and v1) allow this process; None without a limit."""
    pairs = [_read(group / "cpu.max").split() for group in _cgroups("", root)]
    for group in _cgroups("cpu", root):
        pairs.append([_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")])
    limited = [pair for pair in pairs if pair and pair[0].isdecimal()]  # no limit is "max" in v2 and -1 in v1
    return min((int(quota) / int(period) for quota, period in limited), default=None)


def memory_available(root: Path = ROOT) -> int:
    """Bytes that can be allocated without swapping or meeting the cgroup's limit (v2 only)."""
    kib = _fields(root / "proc/meminfo").get("MemAvailable")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if kib is None else kib * 1024
    limited = [group for group in _cgroups("", root) if _read(group / "memory.max").isdecimal()]
    return max(0, min([free, *map(_headroom, limited)]))


def default_threads(root: Path = ROOT) -> int:
    """One thread for each physical core that this process may run on, but no more than its quota feeds.

    This and `choose_threads` ask what the calling thread may run on, so they come before any pinning.
    """
    return _fitting(len(physical_cores(os.sched_getaffinity(0), root)), cpu_quota(root))


@dataclass(frozen=True)
class Threads:
    """How many threads compute, and where.

    Attributes:
        count: threads, at least 1.
        cpus: the CPU that each thread is pinned to; empty, and no thread is pinned, when they outnumber the cores.
        warning: one line on why another count would be faster.
    """

    count: int
    cpus: tuple[int, ...]
    warning: str | None = None


def choose_threads(requested: int | None, root: Path = ROOT) -> Threads:
    """The requested number of threads, or the default for None; a count that costs speed is kept, with a warning.

    Raises:
        InputError: fewer than one thread.
    """
    if requested is not None and requested < 1:
        raise InputError(f"--threads must be at least 1, not {requested}; leave it out for one a physical core")
    affinity = os.sched_getaffinity(0)
    cores, quota = physical_cores(affinity, root), cpu_quota(root)
    count = _fitting(len(cores), quota) if requested is None else requested
    cpus = tuple(cores[:count]) if count <= len(cores) else ()
    return Threads(count, cpus, _warning(count, len(cores), len(affinity), quota))


def _fitting(cores: int, quota: float | None) -> int:
    """The most threads that have a core each and are never stopped for using up the quota; at least 1."""
    return cores if quota is None else min(cores, max(1, floor(quota)))


def _warning(count: int, cores: int, cpus: int, quota: float | None) -> str | None:
    """Why `count` threads are slower than the default on `cores` physical cores with `cpus` CPUs; None if they fit."""
    default = _fitting(cores, quota)
    if quota is not None and default < min(count, cores):
        problem = f"{count} threads, but the container is allowed {round(quota, 2)} CPUs and halts them beyond that"
    elif count > cpus:
        problem = f"{count} threads on {_plural(cpus, 'CPU')} (they wait for each other's turn)"
    elif count > default:
        problem = f"{count} threads on {_plural(cores, 'physical core')} (SMT siblings share a memory port)"
    elif default >= FEW_CORES and count * 2 < default:
        problem = f"{count} of {default} cores"
    else:
        return None
    return f"{problem}: expect less speed; --threads {default} is the default here"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _siblings(cpu: int, root: Path) -> tuple[int, ...]:
    """All CPUs of the core of `cpu`, or `cpu` alone; thread_siblings_list is the name before Linux 5.3."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return tuple(_numbers(topology / "core_cpus_list") or _numbers(topology / "thread_siblings_list") or [cpu])


def _cgroups(controller: str, root: Path) -> list[Path]:
    """This process's cgroup and those above it, in the hierarchy of a v1 controller or ("") of v2.

    Inside a container the path may be the host's, of which only the top is mounted: the rest does not exist.
    """
    base = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = PurePosixPath(path.lstrip("/"))
            return [base / group for group in (own, *own.parents)]
    return [base]


def _headroom(group: Path) -> int:
    """Bytes left of a cgroup's memory.max; file pages not in use (inactive_file) give way and count as free."""
    used = int(_read(group / "memory.current")) - _fields(group / "memory.stat").get("inactive_file", 0)
    return int(_read(group / "memory.max")) - used


def _fields(path: Path) -> dict[str, int]:
    """The lines "name value" or "name: value unit" of a file."""
    return {name.rstrip(":"): int(value) for name, value, *_ in map(str.split, _read(path).splitlines())}


def _numbers(path: Path) -> list[int]:
    """The numbers of a list such as "0-3,8"; empty if unreadable."""
    spans = [span.partition("-") for span in _read(path).split(",") if span]
    return [number for first, _, last in spans for number in range(int(first), int(last or first) + 1)]


def _read(path: Path) -> str:
    """A file's text without the space around it; empty if unreadable. Decoded as file names are: it may hold paths."""
    try:
        return os.fsdecode(path.read_bytes()).strip()
    except OSError:
        return ""


def lockable_memory() -> int | None:
    """Bytes of RAM that this process may page-lock; None for as many as there are."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit
