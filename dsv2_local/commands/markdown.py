"""Shows Markdown in a terminal while it is generated: finished blocks stay, only the last one is redrawn."""

import re
from types import TracebackType

from markdown_it import MarkdownIt
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown as RichMarkdown
from rich.text import Text

from dsv2_local.commands.console import without_control_characters

# HTML is shown as plain text; rich would omit it.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
FENCE = re.compile(r"^ {0,3}(```+|~~~+)", re.MULTILINE)


class Markdown(RichMarkdown):
    """rich's Markdown, but parsed with `PARSER`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.parsed = PARSER.parse(text)


def finished_blocks(text: str) -> int:
    """Length of the part of `text` that later text cannot change: up to the last empty line outside a code fence.

    The empty line must be followed by the unindented beginning of another block: an indented line would continue a
    list.
    """
    end = 0
    for match in re.finditer(r"\n[ \t]*\n(?=[^\s])", text):
        if len(FENCE.findall(text[: match.end()])) % 2 == 0:
            end = match.end()
    return end


class MarkdownStream:
    """A context manager that shows the text given to `push`; if the output is not a terminal, without rendering."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tail = ""
        self._live: Live | None = None
        self._begun = self._ends_empty = False

    def __enter__(self) -> "MarkdownStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._console.is_terminal:
            self._print(self._tail)
        elif not self._tail.endswith("\n"):
            self._console.file.write("\n")
        self._tail = ""

    def push(self, text: str) -> None:
        """Show more text, without control characters."""
        text = without_control_characters(text)
        if not self._console.is_terminal:
            self._console.file.write(text)
            self._tail = text or self._tail
            return
        self._tail += text
        if end := finished_blocks(self._tail):
            self._stop()
            self._print(self._tail[:end])
            self._tail = self._tail[end:]
        if self._tail.strip():
            self._show()

    def _show(self) -> None:
        """Redraw the unfinished block, or its end if it is taller than the screen."""
        lines = self._console.render_lines(Markdown(self._tail), pad=False)
        height = max(1, self._console.size.height - 2)
        visible = Text("\n").join(
            Text.assemble(*((part.text, part.style or "") for part in line)) for line in lines[-height:]
        )
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(visible, refresh=True)

    def _stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        """Print a finished block, with one empty line before it unless one of the two blocks has its own."""
        if not text.strip():
            return
        block = Markdown(text)
        lines = ["".join(part.text for part in line).strip() for line in self._console.render_lines(block)]
        if self._begun and not self._ends_empty and lines[0]:
            self._console.print()
        self._console.print(block)
        self._begun, self._ends_empty = True, not lines[-1]
