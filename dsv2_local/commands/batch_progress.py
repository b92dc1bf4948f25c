"""The progress of a batch on a terminal: requests, tokens per second, time left."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from dsv2_local.commands.console import BESIDE_BAR, clock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

RECENT = 10.0
"""Seconds over which tokens per second are measured."""


class BatchProgress:
    """A progress bar for requests; a context manager that removes the bar in any case."""

    def __init__(self, counts: Callable[[], tuple[int, int]], total: int | None, console: "Console | None") -> None:
        """Prepare the bar.

        Args:
            counts: called from another thread; returns the requests that are done, earlier runs included, and the
                tokens that were generated in this one.
            total: all requests; None: unknown.
            console: where to show the bar; None: nowhere. Nor is it shown where there is no terminal.
        """
        self._counts, self._total, self._console = counts, total, console
        self._start, self._first = time.monotonic(), counts()[0]
        self._recent = deque[tuple[float, int]]([(self._start, 0)])
        self._bar: Progress | None = None

    def figures(self) -> str:
        """What is done, the recent rate, and the time left; the time that has passed until that is known."""
        now, (done, tokens) = time.monotonic(), self._counts()
        self._recent.append((now, tokens))
        while len(self._recent) > 2 and self._recent[1][0] < now - RECENT:
            self._recent.popleft()
        (then, before), passed = self._recent[0], now - self._start
        rate = (tokens - before) / (now - then) if now > then else 0.0
        if self._total is None:
            return f"{done:,} requests · {rate:,.0f} tokens/s · {clock(passed)}"
        new = done - self._first
        time_shown = f"{clock(passed / new * (self._total - done))} left" if new else clock(passed)
        return f"{done:,}/{self._total:,} requests · {rate:,.0f} tokens/s · {time_shown}"

    def __enter__(self) -> "BatchProgress":
        if self._console and self._console.is_terminal:
            self._show(self._console)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def _show(self, console: "Console") -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, Task
        from rich.text import Text

        class FiguresColumn(ProgressColumn):
            def render(_, task: Task) -> Text:  # noqa: N805 (`self` is the BatchProgress)
                task.completed = self._counts()[0]
                return Text(self.figures())

        bar = BarColumn(max(4, min(40, console.width - BESIDE_BAR)))
        self._bar = Progress(bar, FiguresColumn(), console=console, transient=True, refresh_per_second=4)
        self._bar.add_task("", total=self._total)
        with suppress(RuntimeError):  # no further thread can be started: then without a bar
            self._bar.start()
