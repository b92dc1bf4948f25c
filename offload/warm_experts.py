"""Which experts a model used most, kept from run to run, so that the slots begin with them."""

import json
from collections.abc import Sequence
from pathlib import Path

from dsv2_local.machine import measurements
from dsv2_local.offload.expert_cache import Key


def file(fingerprint: str) -> Path:
    """Where those of a model are kept."""
    return measurements.file().with_name("favourites") / f"{fingerprint}.json"


def save(fingerprint: str | None, keys: Sequence[Key]) -> None:
    """Keep experts, the worthiest first; those of a model without a name are not kept."""
    if fingerprint is not None:
        measurements.keep(file(fingerprint), json.dumps(keys))


def load(fingerprint: str | None, layers: Sequence[int], experts: int) -> list[Key]:
    """Every expert once, those kept first; the others in turns by layer."""
    every = [(layer, expert) for expert in range(experts) for layer in layers]
    known = set(every)
    kept = [key for key in _read(file(fingerprint)) if key in known] if fingerprint else []
    return list(dict.fromkeys([*kept, *every]))


def _read(path: Path) -> list[Key]:
    try:
        return [(int(layer), int(expert)) for layer, expert in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
