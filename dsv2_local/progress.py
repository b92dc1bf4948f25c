"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do in all, in a unit that the caller knows."""


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""
