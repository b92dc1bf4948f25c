"""The callback by which long work reports its progress."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the work done and the total, in a unit that the function which takes the callback documents."""


def no_progress(done: int, total: int) -> None:
    """Report nothing: the default where progress is optional."""
