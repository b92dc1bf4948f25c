"""Terminal output that the commands share: notices, progress bars and statistics.

stdout is for the model's text and for tables; everything else goes to stderr. rich is imported only when it is needed,
so that `dsv2 --help` stays fast.
"""

import json
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dsv2_local.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from dsv2_local.chunk import Chunk
    from dsv2_local.commands.remote import AnyLLM
    from dsv2_local.runtime.stats import Stats

Item = TypeVar("Item")

PROGRESS_AFTER = 1.0
"""Seconds until a progress bar appears."""
BESIDE_BAR = 72
"""Columns for the text beside a bar, with a margin: "^C" typed at the end of a full line would wrap and stay there."""
RECENT = 9
"""Number of latest calls over which the rate is measured, since prefill slows down as the context grows."""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""The control characters but line end and tab. A terminal obeys them: an answer must not clear or rename it."""
_BREAKING = re.compile(f"{CONTROL.pattern}|[\u2028\u2029]")


def without_control_characters(text: str) -> str:
    """Text that cannot change the terminal on which it is shown."""
    return CONTROL.sub("", text)


def json_text(value: Any, **layout: Any) -> str:
    """A value as JSON, which knows no NaN and no infinity: they become null. `layout` is for `json.dumps`."""
    return json.dumps(_of_json(value), allow_nan=False, **layout)


def json_line(value: Any, *, ascii: bool) -> str:
    """One line of JSON in which all control characters are escaped; `json` itself leaves those from 127 on.

    So are the line and paragraph separators of Unicode, at which some programs break lines.
    """
    return _BREAKING.sub(lambda found: f"\\u{ord(found[0]):04x}", json_text(value, ensure_ascii=ascii))


def json_logprob(chunk: "Chunk") -> dict[str, Any]:
    """A token with its log probability, and the most likely ones in its place."""
    top = [{"token_id": token, "logprob": logprob} for token, logprob in chunk.top_logprobs]
    return {"token_id": chunk.token_id, "text": chunk.text, "logprob": chunk.logprob, "top_logprobs": top}


def _of_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _of_json(item) for key, item in value.items()}
    return [_of_json(item) for item in value] if isinstance(value, list | tuple) else value


def notice(text: str) -> None:
    """Print one line on stderr."""
    print(f"{_end_waiting()}dsv2: {one_line(text)}", file=sys.stderr, flush=True)


_waiting = False  # whether the line of `waiting` is on the screen


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a line on stderr, if it is a terminal, until the block ends or something else is written there."""
    global _waiting
    if sys.stderr.isatty():
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
        print(f"dsv2: {text}"[: columns - 1], end="", file=sys.stderr, flush=True)
        _waiting = True
    try:
        yield
    finally:
        print(_end_waiting(), end="", file=sys.stderr, flush=True)


def _end_waiting() -> str:
    """What removes the line of `waiting` from the screen; nothing if it is not there."""
    global _waiting
    shown, _waiting = _waiting, False
    return "\r\x1b[K" if shown else ""


def report_console() -> "Console":
    """A console for tables on stdout."""
    from rich.console import Console

    class ReportConsole(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            """Lines may have names from files in them."""
            super().print(*(one_line(text) if isinstance(text, str) else text for text in objects), **options)

    return ReportConsole(highlight=False, emoji=False)


def format_bytes(size: float) -> str:
    """Format a number of bytes with a decimal unit: 512 B, 3.4 MB, 8.60 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"


class ProgressBar:
    """A progress bar that appears after `PROGRESS_AFTER` seconds, and disappears when the work is done.

    An instance is a `Progress` callback, and a context manager that removes the bar in any case.
    """

    def __init__(self, what: str, console: "Console | None" = None, unit: str | None = None) -> None:
        """Prepare the bar.

        Args:
            what: the label, such as "reading the prompt".
            console: where to show the bar; None: stderr.
            unit: what is counted; None: bytes.
        """
        self._what, self._console, self._unit = what, console, unit
        self._lock = threading.Lock()
        self._bar: Progress | None = None
        self._timer: threading.Timer | None = None
        self._state = (0, 0)
        self._steps = deque[tuple[float, int]](maxlen=RECENT)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def __call__(self, done: int, total: int) -> None:
        if done >= total:
            self._stop()
            return
        with self._lock:
            self._state = (done, total)
            self._steps.append((time.monotonic(), done))
            if self._bar:
                self._bar.update(self._bar.task_ids[0], completed=done, total=total)
            elif self._timer is None:
                # A timer, since a prefill chunk of a large model takes many seconds, until the next call.
                self._timer = threading.Timer(PROGRESS_AFTER, self._show)
                self._timer.daemon = True
                with suppress(RuntimeError):  # no further thread can be started: then without a bar
                    self._timer.start()

    def figures(self) -> str:
        """The work done and the total, the recent rate and the time left; until a rate is known, the time elapsed."""
        (done, total), now = self._state, time.monotonic()
        (start, first), (last, _) = self._steps[0], self._steps[-1]
        count = format_bytes if self._unit is None else lambda number: f"{number:,.0f}"
        unit = "" if self._unit is None else f" {self._unit}"
        if done == first:
            return f"{count(done)}/{count(total)}{unit} · {clock(now - start)}"
        rate = (done - first) / (last - start)
        left = (total - done) / rate - (now - last)
        return f"{count(done)}/{count(total)} · {count(rate)}{unit}/s · {clock(left)} left"

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.text import Text

        class FiguresColumn(ProgressColumn):
            def render(_, task: Task) -> Text:  # noqa: N805 (`self` is the ProgressBar)
                return Text(self.figures())

        with self._lock:
            console = self._console or Console(stderr=True)
            if self._timer is None or not console.is_terminal:
                return
            print(_end_waiting(), end="", file=sys.stderr, flush=True)
            bar = BarColumn(max(4, min(40, console.width - BESIDE_BAR)))
            self._bar = Progress(TextColumn(self._what), bar, FiguresColumn(), console=console, transient=True)
            self._bar.add_task(self._what, completed=self._state[0], total=self._state[1])
            with suppress(RuntimeError):
                self._bar.start()

    def _stop(self) -> None:
        with self._lock:
            if self._timer:
                self._timer.cancel()
            if self._bar:
                self._bar.stop()
            self._timer = self._bar = None
            self._steps.clear()


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 0:01:05."""
    return str(timedelta(seconds=round(max(0.0, seconds))))


def prompt_progress(console: "Console | None" = None) -> ProgressBar:
    """A progress bar for the prefill of a prompt."""
    return ProgressBar("reading the prompt", console, "tokens")


class Stopwatch:
    """Measures what a user waits for: the seconds from the first token of an answer until `seconds` is read.

    `Stats.decode_seconds` has the time of the model alone, without what it takes to show the answer.
    """

    def __init__(self) -> None:
        self._start: float | None = None

    def over(self, chunks: Iterable[Item]) -> Iterator[Item]:
        """Iterate over the answer's chunks; the first one starts the watch."""
        for chunk in chunks:
            self._start = self._start or time.monotonic()
            yield chunk

    @property
    def seconds(self) -> float:
        return 0.0 if self._start is None else time.monotonic() - self._start


def describe_stats(stats: "Stats", seconds: float, interrupted: bool = False) -> str:
    """The statistics of an answer in one line, with the reason if it was cut short.

    `seconds` is the time that the answer took after its first token, as the user saw it.
    """
    rate = (stats.completion_tokens - 1) / seconds if seconds and stats.completion_tokens else 0.0
    reused = f", reused {stats.reused_tokens:,}" if stats.reused_tokens else ""
    parts = [
        f"prompt {stats.prompt_tokens:,} tokens{reused}, {stats.prefill_tok_s:,.1f} tok/s",
        f"answer {stats.completion_tokens:,} tokens, {rate:,.1f} tok/s",
        f"context {stats.context_used:,}/{stats.context:,}",
    ]
    if stats.draft_tokens:
        parts.append(f"{stats.accepted_tokens:,} of {stats.draft_tokens:,} draft tokens accepted")
    if interrupted:
        parts.append("stopped by Ctrl-C")
    elif stats.finish_reason == "length":
        full = stats.context_used >= stats.context
        parts.append("stopped: the context is full" if full else "stopped at max_tokens")
    return " · ".join(parts)


def describe_stop(stats: "Stats") -> str:
    """How much of a prompt was read before Ctrl-C."""
    return f"read {stats.context_used:,} of {stats.prompt_tokens:,} tokens"


def describe_experts(llm: "AnyLLM") -> list[str]:
    """Where the routed experts are stored, and statistics of their use since loading; one string per line."""
    from dsv2_local.commands.remote import RemoteLLM

    if isinstance(llm, RemoteLLM):
        return [f"the experts are the server's; {llm.recipe}/ shows their use"]
    from dsv2_local.offload.offloaded_experts import OffloadedExperts

    expert, total = llm.plan.expert_bytes, llm.plan.experts
    if not isinstance(llm.experts, OffloadedExperts):
        where = "GPU memory" if llm.plan.resident else "RAM and computed by the CPU"
        return [f"{total:,} experts of {format_bytes(expert)} ({format_bytes(total * expert)}), all in {where}"]
    stats = llm.experts.stats
    lines = [
        f"{llm.plan.slots:,} of {total:,} experts of {format_bytes(expert)} have a slot in GPU memory; "
        f"hit rate {stats.hit_rate:.1%} of {stats.hits + stats.misses:,} uses",
        f"PCIe link: {format_bytes(stats.fetched_bytes)}{_rate(stats.fetched_bytes, stats.fetch_seconds)}, "
        f"{stats.streamed_layers:,} layers streamed",
        f"CPU: {stats.host_experts:,} experts computed{_rate(stats.host_experts * expert, stats.host_seconds)}",
    ]
    if stats.retries:
        lines.append(f"{stats.retries:,} layers failed on a GPU and were computed again on the CPU")
    return lines


def _rate(nbytes: int, seconds: float) -> str:
    return f" at {nbytes / seconds / 1e9:,.1f} GB/s" if seconds else ""
