"""Spreading memory over NUMA nodes. This machine may have only one: the kernel is asked all the same."""

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
def test_only_several_nodes_without_a_policy_are_spread_over(machine, monkeypatch, cpus, before, spread):  # noqa: F811
    asked = []
    monkeypatch.setattr(numa, "interleave", lambda nodes: asked.append(nodes) or True)
    monkeypatch.setattr(numa, "_policy", lambda: before)
    assert numa.spread_memory(cpus, machine(TWO)) == spread
    assert asked == ([spread] if spread else [])


def test_the_kernel_spreads_pages_of_memory_and_of_threads_started_later():
    """In a process of its own, over node 0 alone, which every machine has: its maps name the policy."""
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
