"""Every implementation of the kernels has the functions that `kernels.ops` calls, with the reference's parameters."""

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest

from dsv2_local.kernels import cpu, ops, reference, triton


def dispatched() -> set[str]:
    """The kernels that `ops` calls on the implementation it chose: `_kernels(…).name(…)` and `chosen.name(…)`."""
    names = set()
    for node in ast.walk(ast.parse(Path(ops.__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            chosen = isinstance(owner, ast.Name) and owner.id == "chosen"
            if chosen or (isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "_kernels"):
                names.add(node.func.attr)
    return names


def parameters(implementation: ModuleType | type, name: str) -> list[str]:
    names = inspect.signature(getattr(implementation, name)).parameters
    return [each for each in names if each not in ("self", "linear")]  # `linear`: what bitsandbytes replaces


def implementations() -> dict[str, ModuleType | type]:
    found: dict[str, ModuleType | type] = {"native": cpu.Kernels, "triton": triton}
    try:
        from dsv2_local.kernels import bnb
    except ImportError:
        return found
    return {**found, "bitsandbytes": bnb}


def test_the_dispatched_kernels_are_found():
    assert {"linear", "attention", "write_latents", "experts", "combine", "route", "top_candidates"} <= dispatched()
    assert dispatched() <= set(dir(reference))


@pytest.mark.parametrize("name", sorted(dispatched()))
@pytest.mark.parametrize("variant", implementations())
def test_an_implementation_has_the_references_parameters(variant, name):
    assert parameters(implementations()[variant], name) == parameters(reference, name)


@pytest.mark.parametrize("variant", implementations())
def test_an_implementation_says_which_caches_it_reads(variant):
    assert set(implementations()[variant].CACHES) <= set(reference.CACHES)
