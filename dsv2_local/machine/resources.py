"""Resources of this machine: CPU features, cores, NUMA nodes, memory, and the container's limits on them.

Linux only. Every function takes `root`, the directory that has proc and sys; a limit that cannot be read counts as no
limit. "CPU" means a logical CPU with the kernel's number; a physical core is one CPU or several SMT siblings.
"""

import os
import re
import resource
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from math import floor, inf
from pathlib import Path, PurePosixPath

from dsv2_local.errors import InputError
from dsv2_local.values import Number, RefusedError

ROOT = Path("/")
MAX_THREADS = 4096
SPARE_THREADS = 2  # beside those that compute: a progress bar, the keyboard
FEW_CORES = 4  # below this, leaving cores idle costs too little to warn about


def cpu_features(root: Path = ROOT) -> frozenset[str]:
    """Instruction set flags in the kernel's spelling ("avx512_vnni", "asimd"); empty if unreadable.

    The first CPU is enough: the kernel lists for each CPU the features that all CPUs have.
    """
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return frozenset(line[1].split() if line else ())


def processor(root: Path = ROOT) -> str:
    """The kernel's model name of the first CPU; "unknown" if unreadable."""
    line = re.search(r"^model name\s*:\s*(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return line[1] if line else "unknown"


def numa_nodes(root: Path = ROOT) -> dict[int, list[int]]:
    """The CPUs of each NUMA node that has both memory and CPUs, by node number; one node if unreadable."""
    base = root / "sys/devices/system/node"
    nodes = {node: _numbers(base / f"node{node}/cpulist") for node in _numbers(base / "has_memory")}
    return {node: cpus for node, cpus in nodes.items() if cpus} or {0: list(range(os.cpu_count() or 1))}


def physical_cores(affinity: Iterable[int], root: Path = ROOT) -> list[int]:
    """The lowest CPU of each physical core among the CPUs in `affinity`.

    They are sorted by NUMA node; cores of nodes without memory are last. A CPU whose siblings cannot be read counts as
    a core of its own.
    """
    lowest: dict[tuple[int, ...], int] = {}
    for cpu in sorted(affinity):
        lowest.setdefault(_siblings(cpu, root), cpu)
    nodes = numa_nodes(root)
    node_of = {cpu: node for node, cpus in nodes.items() for cpu in cpus}
    return sorted(lowest.values(), key=lambda cpu: (node_of.get(cpu, inf), cpu))


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPU time per second that the cgroups (v2 and v1) allow this process, in CPUs; None without a limit."""
    pairs = [_read(group / "cpu.max").split() for group in _cgroups("", root)]
    for group in _cgroups("cpu", root):
        pairs.append([_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")])
    limited = [pair for pair in pairs if pair and pair[0].isdecimal()]  # no limit is "max" in v2 and -1 in v1
    return min((int(quota) / int(period) for quota, period in limited), default=None)


def memory_available(root: Path = ROOT) -> int:
    """Bytes that can be allocated without swapping or reaching the cgroup's limit (v2 only)."""
    kib = _fields(root / "proc/meminfo").get("MemAvailable")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if kib is None else kib * 1024
    limited = [group for group in _cgroups("", root) if _read(group / "memory.max").isdecimal()]
    return max(0, min([free, *map(_headroom, limited)]))


def default_threads(root: Path = ROOT) -> int:
    """One thread for each physical core that this process may run on, but no more than its CPU quota allows.

    This function and `choose_threads` read the affinity of the calling thread, so call them before pinning it.
    """
    return _fitting(len(physical_cores(os.sched_getaffinity(0), root)), cpu_quota(root))


@dataclass(frozen=True)
class Threads:
    """How many threads compute, and on which CPUs.

    Attributes:
        count: number of threads, at least 1.
        cpus: the CPU that each thread is pinned to; empty (no pinning) if there are more threads than cores.
        warning: one line that explains why another count would be faster, if so.
    """

    count: int
    cpus: tuple[int, ...]
    warning: str | None = None


def choose_threads(requested: int | None, root: Path = ROOT) -> Threads:
    """The requested number of threads, or the default for None; a count that costs speed is accepted with a warning.

    There are fewer, with a warning, if no more can be started.

    Raises:
        InputError: fewer than one thread, or far too many.
    """
    if requested is not None:
        try:
            requested = int(Number(1, MAX_THREADS, whole=True).read(requested))
        except RefusedError as reason:
            raise InputError(f"--threads {reason}; leave it out for one per physical core") from None
    affinity = os.sched_getaffinity(0)
    cores, quota = physical_cores(affinity, root), cpu_quota(root)
    count = _fitting(len(cores), quota) if requested is None else requested
    possible = 1 + max(0, startable(count - 1 + SPARE_THREADS) - SPARE_THREADS)
    warning = _warning(count, len(cores), len(affinity), quota)
    if possible < count:
        count, warning = possible, _limit_warning(count, possible)
    cpus = tuple(cores[:count]) if count <= len(cores) else ()
    return Threads(count, cpus, warning)


def startable(count: int) -> int:
    """How many of `count` further threads can be started now, as far as limits of the user and the container allow."""
    end, started = threading.Event(), list[threading.Thread]()
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:  # the limit
        pass
    finally:
        end.set()
        for thread in started:
            thread.join()
    return len(started)


def _limit_warning(wanted: int, possible: int) -> str:
    return (
        f"only {_plural(possible, 'thread')} of {wanted} can be started here; a higher limit of processes makes it "
        "faster (ulimit -u, or the container's pids limit)"
    )


def _fitting(cores: int, quota: float | None) -> int:
    """The most threads that have one core each and do not exceed the CPU quota; at least 1."""
    return cores if quota is None else min(cores, max(1, floor(quota)))


def _warning(count: int, cores: int, cpus: int, quota: float | None) -> str | None:
    """Why `count` threads on `cores` physical cores (`cpus` CPUs) are slower than the default; None if they are not."""
    default = _fitting(cores, quota)
    if quota is not None and default < min(count, cores):
        problem = f"{count} threads, but the container is limited to {round(quota, 2)} CPUs and throttled beyond that"
    elif count > cpus:
        problem = f"{count} threads on {_plural(cpus, 'CPU')} (they have to take turns)"
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
    """This process's cgroup and its parents, in the hierarchy of a v1 controller, or of v2 if `controller` is "".

    Inside a container the path may be the host's, with only its top mounted: then the other directories do not exist.
    """
    base = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = PurePosixPath(path.lstrip("/"))
            return [base / group for group in (own, *own.parents)]
    return [base]


def _headroom(group: Path) -> int:
    """Bytes below a cgroup's memory.max; inactive file pages can be reclaimed and count as free."""
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
    """A file's stripped text; empty if unreadable. Decoded like file names, since it may contain paths."""
    try:
        return os.fsdecode(path.read_bytes()).strip()
    except OSError:
        return ""


def lockable_memory() -> int | None:
    """Bytes of RAM that this process may page-lock; None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit
