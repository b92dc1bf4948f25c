"""What this machine was found able to do, kept for plans and schedules."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from math import inf
from pathlib import Path

from dsv2_local.machine.resources import ROOT, physical_cores, processor


def file() -> Path:
    """Where it is kept, under $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dsv2-local" / "rates.json"


def save(rates: dict[str, float], root: Path = ROOT) -> None:
    """Keep figures of this machine beside those of others: rates (GB/s and GFLOP/s by the names of
    `offload.plan.Rates`) and costs (`offload.calibration`).
    """
    known = _read(file())
    known[_machine(root)] = {**known.get(_machine(root), {}), **rates}
    keep(file(), json.dumps(known, indent=2))


def keep(path: Path, text: str) -> None:
    """Write a file of the cache's directory, whole or not at all.

    A home that cannot be written is no reason to fail: the program goes on with what it assumes.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(path)


def load(names: Iterable[str], root: Path = ROOT) -> dict[str, float]:
    """Those of the named figures that are kept for this machine; none where the file is damaged."""
    rates = _read(file()).get(_machine(root), {})
    return {name: rates[name] for name in names if 0 < rates.get(name, 0) < inf}


def _machine(root: Path) -> str:
    """A name for a processor as this process may use it: homes are shared between machines, and containers differ."""
    return f"{processor(root)}, {len(physical_cores(os.sched_getaffinity(0), root))} cores"


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): {str(key): float(rate) for key, rate in rates.items()} for name, rates in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
