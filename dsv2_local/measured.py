"""What `dsv2 bench` found this machine able to do, kept for `dsv2 plan`."""

import json
import os
from contextlib import suppress
from math import inf
from pathlib import Path

from dsv2_local.machine import ROOT, physical_cores, processor


def file() -> Path:
    """Where it is kept, under $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dsv2-local" / "rates.json"


def save(rates: dict[str, float], root: Path = ROOT) -> None:
    """Keep rates (GB/s and GFLOP/s by the names of `offload.plan.Rates`) beside those of other machines.

    A home that cannot be written is no reason to fail: planning goes on with what it assumes.
    """
    with suppress(OSError):
        path = file()
        path.parent.mkdir(parents=True, exist_ok=True)
        known = _read(path)
        known[_machine(root)] = {**known.get(_machine(root), {}), **rates}
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        new.replace(path)


def load(root: Path = ROOT) -> dict[str, float]:
    """The rates kept for this machine; none where there are none, or where the file is damaged."""
    rates = _read(file()).get(_machine(root), {})
    return {name: rate for name, rate in rates.items() if 0 < rate < inf}


def _machine(root: Path) -> str:
    """A name for a processor as this process may use it: homes are shared between machines, and containers differ."""
    return f"{processor(root)}, {len(physical_cores(os.sched_getaffinity(0), root))} cores"


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): {str(key): float(rate) for key, rate in rates.items()} for name, rates in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
