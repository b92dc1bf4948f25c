"""Shows Markdown in a terminal while it is generated.

A thread of its own draws, so that generating never waits for it. It prints what is new; lines that are on the screen
are drawn again only if later text has changed them, and lines of a code block never.
"""

import re
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown as RichMarkdown
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

from dsv2_local.commands.console import without_control_characters
from dsv2_local.commands.growing_lines import GrowingLines, Line
from dsv2_local.machine.resources import startable

# HTML and definitions of links are shown as plain text, which rich would omit, and images as links: rich would put them
# before the text, without their address.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable(["reference", "image"])
INTERVAL = 0.1
"""Seconds between two drawings."""
SHARE = 20
"""Drawing takes at most one such part of the time: after a long one, the next comes later."""
FENCE = re.compile(r"( {0,3})(`{3,}(?=[^`]*$)|~{3,})\s*(\S*)")
UNFINISHED = re.compile(r"(^ {0,3}(`{3,}|~{3,}).*|[!-~]{1,20})\Z", re.MULTILINE)
"""What may still become a longer word, or the beginning of a block of code: it is shown a moment later."""
UNCLOSED = re.compile(
    r"""(?:(?<=[\s(\["'>])|^)(?:(?P<mark>\*{1,3}|_{1,2}|~~|`+)(?=\S)(?:(?!(?P=mark))[^\n]){0,80}"""
    r"""|\[[^\]\n]{0,80}(?:\](?:\([^)\n]{0,200})?)?)\Z"""
)
"""Emphasis, code or a link whose end is missing: showing it now would mean drawing it again later."""
TAB = 4


class Markdown(RichMarkdown):
    """rich's Markdown, but parsed with `PARSER`."""

    def __init__(self, text: str) -> None:
        super().__init__(text, hyperlinks=False)  # the address is shown, not hidden in a control sequence
        self.parsed = PARSER.parse(text)

    @property
    def ends_with_table(self) -> bool:
        return bool(self.parsed) and self.parsed[-1].type == "table_close"


class Fence(NamedTuple):
    """The first line of a block of code: its indentation, its backticks or tildes, and the language."""

    indent: str
    mark: str
    language: str

    @classmethod
    def of(cls, line: str) -> "Fence | None":
        """Parse a line; None if no block of code begins with it."""
        found = FENCE.match(line.removesuffix("\n"))
        return cls(found[1], found[2], found[3]) if found else None

    def closes(self, line: str) -> bool:
        """Whether `line` ends the block."""
        mark = line.strip()
        return len(mark) >= len(self.mark) and set(mark) == {self.mark[0]} and not line.startswith("    ")

    def may_close(self, beginning: str) -> bool:
        """Whether a line that begins like this may turn out to end the block."""
        return set(beginning.strip()) <= {self.mark[0]}


def finished_block(text: str) -> int:
    """Length of the first block of `text`, if later text cannot change it; 0 if it may still grow.

    A block ends before an unindented line that begins a block of code, and before one that follows an empty line (an
    indented one would continue a list), but not inside a block of code that belongs to a list.
    """
    inside: Fence | None = None
    after_empty, position = False, 0
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        begins = not inside and not line[0].isspace()
        if position and begins and (after_empty or (line.endswith("\n") and Fence.of(line))):
            return position
        if inside:
            inside = None if inside.closes(line) else inside
        else:
            inside = Fence.of(line) if line.endswith("\n") else None
        after_empty = not inside and not line.strip()
        position += len(line)
    return 0


class MarkdownStream:
    """A context manager that shows the text given to `push`; if the output is not a terminal, without rendering."""

    def __init__(self, console: Console, stops: Callable[[], int] = lambda: 0) -> None:
        """Prepare the stream.

        Args:
            console: where to show the text.
            stops: how often the process was stopped; when that changes, others have written to the screen.
        """
        self._console = console
        self._renders = console.is_terminal and not console.is_dumb_terminal and startable(1) > 0
        self._lines = GrowingLines(console, stops)
        self._pushed: list[str] = []  # text that the drawing thread has not taken yet
        self._tail = ""  # text that is not finished
        self._fence: Fence | None = None  # the block of code that it is in
        self._code: list[str] = []  # finished lines of that block
        self._highlighted: list[Line] = []  # the same as they are shown
        self._width = 0  # for which the unfinished block is laid out; 0: none has begun
        self._ends_line = False
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._draw_until_closed, daemon=True)

    def __enter__(self) -> "MarkdownStream":
        if self._renders:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._renders:
            self._closed.set()
            self._thread.join()
            self._draw(last=True)
        elif not self._ends_line:
            self._console.file.write("\n")

    def push(self, text: str) -> None:
        """Show more text, without control characters.

        Raises:
            OSError: the terminal is gone.
        """
        text = without_control_characters(text)
        if not self._renders:
            self._console.file.write(text)
            self._console.file.flush()
            self._ends_line = text.endswith("\n") if text else self._ends_line
        elif self._error:
            raise self._error
        else:
            self._pushed.append(text)

    def _draw_until_closed(self) -> None:
        took = 0.0
        while not self._closed.wait(max(INTERVAL, SHARE * took)):
            start = time.monotonic()
            try:
                self._draw()
            except BaseException as error:
                self._error = error
                return
            took = time.monotonic() - start

    def _draw(self, last: bool = False) -> None:
        """Show all that was pushed; with `last` nothing will follow."""
        count = len(self._pushed)
        if not count and not last:
            return
        self._tail += "".join(self._pushed[:count])
        del self._pushed[:count]
        while self._advance(last):
            pass
        if self._fence:
            self._show_code(self._tail, last)
        else:
            self._show_block(self._tail, last)

    def _advance(self, last: bool) -> bool:
        """Show the next part of the tail that is finished, and take it off; returns whether there was one."""
        line, ended, rest = self._tail.partition("\n")
        complete = bool(ended) or (last and bool(line))
        if self._fence and complete and self._fence.closes(line):
            self._show_code("", last=True)
            self._fence, self._code, self._highlighted, self._tail = None, [], [], rest
            return True
        if self._fence and ended:
            self._code.append(line)
            self._tail = rest
            return True
        fence = None if self._fence or not complete else Fence.of(line)
        if fence and not fence.indent:
            self._fence, self._tail = fence, rest
            return True
        if not self._fence and (end := finished_block(self._tail)):
            self._show_block(self._tail[:end], last=True)
            self._tail = self._tail[end:]
            return True
        return False

    def _show_block(self, text: str, last: bool) -> None:
        """Show a block other than unindented code; with `last` it is finished."""
        if not last:
            text = UNCLOSED.sub("", UNFINISHED.sub("", text))
            if text.lstrip().startswith("#") and "\n" not in text:  # a heading is centred
                return
        if text.strip():
            self._width = self._width or self._console.width
            block = Markdown(text)
            lines = _visible(
                self._console.render_lines(block, self._console.options.update(width=self._width), pad=False)
            )
            # Later rows of a table change all rows, and only those on the screen can be drawn again.
            self._lines.show(lines[: self._lines.most] if block.ends_with_table and not last else lines)
        if last:
            self._lines.finish()
            self._width = 0

    def _show_code(self, partial: str, last: bool) -> None:
        """Show a block of code as it is, so that it can be copied: not indented, and not broken into shorter lines.

        `partial` is the line that has no end yet; with `last` nothing more belongs to the block.
        """
        assert self._fence
        if partial and last:
            self._code.append(partial)
        if len(self._code) > len(self._highlighted):
            self._highlighted = self._highlight(self._code)
        shown = partial and not last and not self._fence.may_close(partial)
        rest = [[Segment(partial.expandtabs(TAB))]] if shown else []
        self._lines.show([*self._highlighted, *rest], settled=len(self._code))
        if last:
            self._lines.finish()

    def _highlight(self, code: list[str]) -> list[Line]:
        assert self._fence
        syntax = Syntax("", self._fence.language, theme="ansi_dark", background_color="default")
        text: Text = syntax.highlight("\n".join(line.expandtabs(TAB) for line in code))
        lines = [list(line.render(self._console, end="")) for line in text.split("\n", allow_blank=True)]
        return lines[: len(code)]


def _visible(lines: list[Line]) -> list[Line]:
    """Lines without spaces at their ends, and without empty lines before the first one and after the last one."""
    kept = [_without_spaces(line) for line in lines]
    filled = [number for number, line in enumerate(kept) if line]
    return kept[filled[0] : filled[-1] + 1] if filled else []


def _without_spaces(line: Line) -> Line:
    line = list(Segment.simplify(line))
    while line and (not line[-1].style or not line[-1].style.bgcolor) and line[-1].text.endswith(" "):
        last = line.pop()
        if text := last.text.rstrip(" "):
            line.append(Segment(text, last.style))
    return [part for part in line if part.text]
