"""Stores what was measured on this machine, for plans and for the expert scheduler."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from math import inf
from pathlib import Path

from dsv2_local.machine import homes
from dsv2_local.machine.resources import ROOT, physical_cores, processor


def file() -> Path:
    """The file of measurements, in the cache directory."""
    return homes.cache() / "rates.json"


def save(rates: dict[str, float], root: Path = ROOT) -> None:
    """Store measurements of this machine; those of other machines and those with other names stay in the file.

    Args:
        rates: rates in GB/s and GFLOP/s, named as in `offload.plan_request.Rates`, or the costs of
            `offload.calibration` in seconds.
        root: directory that has the machine's proc and sys.
    """
    known = _read(file())
    known[_machine(root)] = {**known.get(_machine(root), {}), **rates}
    keep(file(), json.dumps(known, indent=2))


def keep(path: Path, text: str) -> None:
    """Write a file of the cache directory atomically.

    A directory that cannot be written is not an error: the program works without the file.
    """
    path = path.resolve()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(path)


def load(names: Iterable[str], root: Path = ROOT) -> dict[str, float]:
    """The stored measurements of this machine among the named ones; empty if the file is missing or damaged."""
    rates = _read(file()).get(_machine(root), {})
    return {name: rates[name] for name in names if 0 < rates.get(name, 0) < inf}


def _machine(root: Path) -> str:
    """A name for the processor and the cores that this process may use.

    One home directory may serve several machines, and containers with different numbers of cores.
    """
    return f"{processor(root)}, {len(physical_cores(os.sched_getaffinity(0), root))} cores"


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): {str(key): float(rate) for key, rate in rates.items()} for name, rates in known.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}
