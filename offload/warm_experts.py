"""Stores which experts a model used most, so that the next run can start with them in its slots."""

import json
from collections.abc import Sequence
from pathlib import Path

from dsv2_local.machine import measurements
from dsv2_local.offload.expert_cache import Key


def file(fingerprint: str) -> Path:
    """The file that stores the warm experts of a model."""
    return measurements.file().with_name("favourites") / f"{fingerprint}.json"


def save(fingerprint: str | None, keys: Sequence[Key]) -> None:
    """Store experts, the most used first; does nothing for a model without a fingerprint."""
    if fingerprint is not None:
        measurements.keep(file(fingerprint), json.dumps(keys))


def load(fingerprint: str | None, layers: Sequence[int], experts: int) -> list[Key]:
    """All experts of these layers in the order in which to fill slots: stored ones, then one of each layer in turn."""
    every = [(layer, expert) for expert in range(experts) for layer in layers]
    known = set(every)
    stored = [key for key in _read(file(fingerprint)) if key in known] if fingerprint else []
    return list(dict.fromkeys([*stored, *every]))


def _read(path: Path) -> list[Key]:
    """The experts in a file; none if it is missing or damaged."""
    try:
        return [(int(layer), int(expert)) for layer, expert in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        return []
