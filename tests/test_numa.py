"""Interleaving memory across NUMA nodes; the system calls are tested even on a machine with one node."""

import subprocess
import sys

import pytest

from dsv2_local.machine import numa
from tests.test_machine import NODES, machine  # noqa: F401 - a fixture

TWO = {f"{NODES}/has_memory": "1,70\n", f"{NODES}/node1/cpulist": "0-3\n", f"{NODES}/node70/cpulist": "4-7\n"}


@pytest.mark.parametrize(
    ("cpus", "before", "spread"),
    [([0, 5], 0, [1, 70]), ([0, 1], 0, []), ([], 0, []), ([0, 5], 3, []), ([0, 5], None, [])],
    ids=["two-nodes", "one-node", "no-cpus", "set-by-numactl", "kernel-without-policies"],
)
def test_memory_is_interleaved_only_across_several_nodes_without_a_policy(machine, monkeypatch, cpus, before, spread):  # noqa: F811
    calls = []
    monkeypatch.setattr(numa, "interleave", lambda nodes: calls.append(nodes) or True)
    monkeypatch.setattr(numa, "_policy", lambda: before)
    assert numa.spread_memory(cpus, machine(TWO)) == spread
    assert calls == ([spread] if spread else [])


def test_the_policy_applies_to_this_thread_and_to_threads_started_later():
    """In a separate process, across node 0 alone, which every machine has."""
    code = (
        "import threading\n"
        "from dsv2_local.machine import numa\n"
        "print(numa._policy())\n"
        "print(numa.interleave([0]))\n"
        "print(numa._policy())\n"
        "threading.Thread(target=lambda: print(numa._policy())).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, set_, after, threads = done.stdout.split()
    if set_ == "False":
        pytest.skip("this kernel has no memory policies, or the container forbids them")
    assert (before, after, threads) == ("0", "3", "3")
