"""A request with any value in any place of it."""

import copy
from collections.abc import Iterator
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 10**30, "", "none", "a\ud800", "type", [], [[]], [None], ["a"], {}, {"type": []},
    {"type": "text"}, {"name": {}}, [{"type": {}}],
)  # fmt: skip


def with_every_value(body: Any) -> Iterator[Any]:
    """The body with each of `VALUES` in the place of each of its values, one at a time."""
    for path in _paths(body):
        for value in VALUES:
            changed = copy.deepcopy(body)
            place = changed
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = copy.deepcopy(value)
            yield changed


def _paths(value: Any) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (key,)
        for path in _paths(below):
            yield (key, *path)
