"""machine/resources.py on directory trees that look like the /proc and /sys of other machines."""

import os
import threading

import pytest

from dsv2_local.errors import InputError
from dsv2_local.machine.resources import (
    Threads,
    choose_threads,
    cpu_features,
    cpu_quota,
    default_threads,
    memory_available,
    numa_nodes,
    physical_cores,
)

CPUS = "sys/devices/system/cpu"
NODES = "sys/devices/system/node"
CGROUPS = "sys/fs/cgroup"
GIB = 2**30
V2_NESTED = "0::/pod/main\n"
TWO_NODES = {
    f"{NODES}/has_memory": "0-1\n",
    f"{NODES}/node0/cpulist": "0,2,4,6\n",
    f"{NODES}/node1/cpulist": "1,3,5,7\n",
}


def smt(cores, name="core_cpus_list"):
    """Files of `cores` cores with two CPUs each, numbered n and n + cores as on most x86 machines."""
    return {f"{CPUS}/cpu{cpu}/topology/{name}": f"{cpu % cores},{cpu % cores + cores}\n" for cpu in range(2 * cores)}


def quota(cpus):
    """Files of a v2 container with its own cgroup namespace and a quota of `cpus` CPUs."""
    return {"proc/self/cgroup": "0::/\n", f"{CGROUPS}/cpu.max": f"{round(cpus * 100_000)} 100000\n"}


def memory(limit, used, inactive=0):
    """Memory files of a v2 cgroup; all values in bytes."""
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 1\ninactive_anon 7\ninactive_file {inactive}\nactive_file 5\n",
    }


@pytest.fixture
def machine(tmp_path):
    """A function that writes files, given as {path: text}, and returns their root directory."""

    def write(files, below=""):
        for path, text in files.items():
            file = tmp_path / below / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


@pytest.fixture
def allow(monkeypatch):
    """A function that makes these CPUs the apparent affinity of this process."""
    return lambda cpus: monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus))


@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 sse\nvmx flags\t: vnmi\n\nprocessor\t: 1\n", {"fpu", "avx2", "sse"}),
        ("processor\t: 0\nFeatures\t: fp asimd sve\nCPU part\t: 0xd40\n", {"fp", "asimd", "sve"}),
        ("processor\t: 0\nvmx flags\t: vnmi\n", set()),
        ("flags\t\t:\nbugs\t\t: spectre_v1\n", set()),
    ],
    ids=["x86", "arm", "neither", "none"],
)  # fmt: skip
def test_features_are_those_of_the_instruction_set(machine, cpuinfo, features):
    assert cpu_features(machine({"proc/cpuinfo": cpuinfo})) == features


def test_features_of_an_unreadable_machine_are_none(tmp_path):
    assert cpu_features(tmp_path) == frozenset()


@pytest.mark.parametrize(
    ("files", "allowed", "cores"),
    [
        (smt(4), range(8), [0, 1, 2, 3]),
        (smt(4, "thread_siblings_list"), range(8), [0, 1, 2, 3]),
        (smt(4) | {f"{CPUS}/cpu5/topology/thread_siblings_list": "5\n"}, range(8), [0, 1, 2, 3]),
        (smt(4), [6, 3, 7, 5], [3, 5, 6]),
        (smt(4), [4], [4]),
        ({f"{CPUS}/cpu{cpu}/topology/core_cpus_list": f"{cpu & ~1}-{cpu | 1}" for cpu in range(4)}, range(4), [0, 2]),
        ({}, [5, 1, 3], [1, 3, 5]),
        ({f"{CPUS}/cpu{cpu}/topology/core_cpus_list": "\n" for cpu in range(2)}, range(2), [0, 1]),
        (TWO_NODES, range(8), [0, 2, 4, 6, 1, 3, 5, 7]),
        (TWO_NODES | smt(4), range(8), [0, 2, 1, 3]),
        (TWO_NODES | {f"{NODES}/has_memory": "1\n"}, range(4), [1, 3, 0, 2]),
    ],
    ids=["smt", "old-kernel", "new-name-first", "partial-mask", "upper-sibling", "adjacent-siblings",
         "no-topology", "empty-topology", "two-nodes", "two-nodes-smt", "memoryless-node"],
)  # fmt: skip
def test_each_physical_core_gives_its_lowest_allowed_cpu(machine, files, allowed, cores):
    assert physical_cores(allowed, machine(files)) == cores


def test_nodes_are_listed_in_order_without_those_lacking_memory_or_cpus(machine):
    lists = {"2": "4-5", "10": "0-1,3", "3": "2", "4": ""}
    files = {f"{NODES}/node{node}/cpulist": f"{cpus}\n" for node, cpus in lists.items()}
    assert numa_nodes(machine(files | {f"{NODES}/has_memory": "2,4,10\n"})) == {2: [4, 5], 10: [0, 1, 3]}


def test_without_numa_all_cpus_are_one_node(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert numa_nodes(tmp_path) == {0: [0, 1, 2]}


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus"),
    [
        (V2_NESTED, {"pod/main/cpu.max": "400000 100000", "pod/cpu.max": "75000 50000", "cpu.max": "max 100000"}, 1.5),
        (V2_NESTED, {"pod/main/cpu.max": "25000 100000", "pod/cpu.max": "200000 100000"}, 0.25),
        (V2_NESTED, {"pod/main/cpu.max": "max 100000", "pod/cpu.max": "max 100000"}, None),
        (V2_NESTED, {"pod/other/cpu.max": "100000 100000"}, None),
        ("0::/../host/path\n", {"cpu.max": "300000 100000"}, 3.0),
        ("", {"cpu.max": "300000 100000"}, 3.0),
        ("4:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "100000"}, 1.5),
        ("4:cpu:/job\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "25000"}, 2.0),
        ("4:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, None),
        ("4:cpuset:/a\n3:cpu:/b\n", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        (V2_NESTED, {}, None),
    ],
    ids=["v2-parent-smaller", "v2-child-smaller", "v2-max", "v2-of-another", "v2-outside-namespace", "v2-unknown-group",
         "v1", "v1-parent", "v1-none", "v1-of-another", "none"],
)  # fmt: skip
def test_the_smallest_quota_of_all_parent_cgroups_counts(machine, cgroup, files, cpus):
    machine({"proc/self/cgroup": cgroup})
    assert cpu_quota(machine(files, CGROUPS)) == cpus


@pytest.mark.parametrize(
    ("own", "parent", "available"),
    [
        (memory("max", 3 * GIB), {}, 8 * GIB),
        (memory(16 * GIB, 3 * GIB), {}, 8 * GIB),
        (memory(6 * GIB, 3 * GIB), {}, 3 * GIB),
        (memory(6 * GIB, 3 * GIB, inactive=GIB), {}, 4 * GIB),
        (memory("max", 3 * GIB), memory(5 * GIB, 4 * GIB), GIB),
        (memory(5 * GIB, 3 * GIB), memory(9 * GIB, 3 * GIB), 2 * GIB),
        (memory(2 * GIB, 2 * GIB + 4096), {}, 0),
        ({}, {}, 8 * GIB),
    ],
    ids=["max", "roomy", "limited", "file-pages", "parent", "child", "overdrawn", "no-cgroup"],
)
def test_memory_is_limited_by_the_machine_and_every_cgroup(machine, own, parent, available):
    machine(own, f"{CGROUPS}/pod/main")
    machine(parent, f"{CGROUPS}/pod")
    kib = 8 * 2**20
    meminfo = f"MemTotal: {4 * kib} kB\nMemFree: 1 kB\nMemAvailable:   {kib} kB\nHugePages_Total:       0\n"
    assert memory_available(machine({"proc/self/cgroup": V2_NESTED, "proc/meminfo": meminfo})) == available


def test_memory_without_proc_is_the_free_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    assert memory_available(tmp_path) == 4_096_000


@pytest.mark.parametrize(
    ("files", "allowed", "threads"),
    [
        (smt(4), range(8), 4),
        (smt(4), [0, 4], 1),
        (smt(4) | quota(2.9), range(8), 2),
        (smt(4) | quota(0.5), range(8), 1),
        (smt(4) | quota(32), range(8), 4),
    ],
    ids=["cores", "one-core", "quota", "part-of-a-cpu", "roomy-quota"],
)
def test_the_default_is_one_thread_per_core_within_the_quota(machine, allow, files, allowed, threads):
    allow(allowed)
    root = machine(files)
    assert default_threads(root) == threads
    assert choose_threads(None, root) == Threads(threads, tuple(physical_cores(allowed, root)[:threads]))


EXPECT = "expect less speed; --threads {} is the default here"
TAKE_TURNS = "(they have to take turns)"
PORT = "(SMT siblings share a memory port)"
ALLOWED = "threads, but the container is limited to {} CPUs and throttled beyond that"


@pytest.mark.parametrize(
    ("files", "allowed", "requested", "pinned", "problem", "default"),
    [
        (smt(4), range(8), 8, False, f"8 threads on 4 physical cores {PORT}", 4),
        (smt(4), range(8), 5, False, f"5 threads on 4 physical cores {PORT}", 4),
        (smt(4), [1, 5], 2, False, f"2 threads on 1 physical core {PORT}", 1),
        (smt(4), range(8), 9, False, f"9 threads on 8 CPUs {TAKE_TURNS}", 4),
        ({}, [3], 2, False, f"2 threads on 1 CPU {TAKE_TURNS}", 1),
        (quota(2), range(4), 3, True, f"3 {ALLOWED.format('2.0')}", 2),
        (quota(2.5), range(4), 3, True, f"3 {ALLOWED.format('2.5')}", 2),
        (quota(0.25), range(4), 2, True, f"2 {ALLOWED.format('0.25')}", 1),
        (quota(2), range(4), 9, False, f"9 {ALLOWED.format('2.0')}", 2),
        (quota(4), range(4), 5, False, f"5 threads on 4 CPUs {TAKE_TURNS}", 4),
        (quota(12), range(16), 5, True, "5 of 12 cores", 12),
        ({}, range(16), 2, True, "2 of 16 cores", 16),
        ({}, range(16), 7, True, "7 of 16 cores", 16),
        (smt(4), range(8), 1, True, "1 of 4 cores", 4),
    ],
)
def test_a_count_that_costs_speed_is_accepted_with_a_warning(
    machine, allow, files, allowed, requested, pinned, problem, default
):
    allow(allowed)
    root = machine(files)
    cpus = tuple(physical_cores(allowed, root)[:requested]) if pinned else ()
    warning = f"{problem}: {EXPECT.format(default)}"
    assert choose_threads(requested, root) == Threads(requested, cpus, warning)


@pytest.mark.parametrize(
    ("files", "allowed", "requested"),
    [
        (smt(4), range(8), 4),
        (smt(4), range(8), 2),
        (smt(3), range(6), 1),
        ({}, range(16), 8),
        (quota(2), range(16), 2),
        (quota(2), range(16), 1),
        (quota(0.5), range(16), 1),
    ],
    ids=["all", "half", "one-of-three", "half-of-16", "quota", "half-of-quota", "part-of-a-cpu"],
)
def test_a_sensible_count_has_no_warning(machine, allow, files, allowed, requested):
    allow(allowed)
    root = machine(files)
    assert choose_threads(requested, root) == Threads(requested, tuple(physical_cores(allowed, root)[:requested]))


def test_threads_are_pinned_to_the_cores_of_one_node_first(machine, allow):
    allow(range(8))
    assert choose_threads(5, machine(TWO_NODES)).cpus == (0, 2, 4, 6, 1)


@pytest.mark.parametrize("requested", [0, -2])
def test_fewer_than_one_thread_is_refused(tmp_path, requested):
    with pytest.raises(InputError, match=rf"--threads must be between 1 and 4,096, not {requested};"):
        choose_threads(requested, tmp_path)


def test_values_of_this_machine_are_plausible():
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
    assert set(choose_threads(None).cpus) <= os.sched_getaffinity(0)
    assert cpu_features()
    assert memory_available() > 0


@pytest.mark.parametrize(("limit", "threads"), [(0, 1), (2, 1), (4, 3), (5, 4), (9, 4)])
def test_fewer_threads_where_no_more_can_be_started(monkeypatch, limit, threads):
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) == limit:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    chosen = choose_threads(4)
    assert chosen.count == threads
    said = "can be started here; a higher limit of processes makes it faster"
    assert (said in (chosen.warning or "")) == (threads < 4)
    assert not any(thread.is_alive() for thread in started)
