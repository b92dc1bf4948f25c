"""Lines at the end of a terminal's screen that grow while a user watches."""

from collections.abc import Callable
from math import ceil

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

Line = list[Segment]
MARGIN = 2
"""Rows of the screen that are left free, for the cursor and for the line typed before."""


class GrowingLines:
    """Prints what is new of a list of lines, and draws lines again that have changed.

    A line is written again only if it is certain where it is on the screen: not if it has left the screen, and not once
    the terminal's size has changed or the process was stopped.

    Attributes:
        settled: number of lines that are never drawn again.
    """

    def __init__(self, console: Console, stops: Callable[[], int]) -> None:
        """`stops` tells how often the process was stopped so far."""
        self.settled = 0
        self._console, self._stops = console, stops
        self._shown: list[Line] = []  # the cursor is at the end of the last of them
        self._place = self._screen()
        self._begun = False

    @property
    def most(self) -> int:
        """Number of rows that can be drawn again."""
        return max(1, self._console.height - MARGIN)

    def show(self, lines: list[Line], settled: int = 0) -> None:
        """Make the screen show `lines`, of which the first `settled` ones are final.

        Of those that are settled already, only the last one that is on the screen may still become longer.
        """
        (size, stops), self._place = self._place, self._screen()
        if (size, stops) != self._place:
            self.settled = len(self._shown)
        shown = len(self._shown)
        first = next((i for i in range(self.settled, shown) if lines[i : i + 1] != [self._shown[i]]), shown)
        if first < shown:
            out = self._drawn_again(first, lines)
        else:
            if shown and self.settled == shown <= len(lines):
                out = self._completed(lines[shown - 1], stops != self._place[1])
            else:
                out = ""
            if new := lines[shown:]:
                out += ("\n" if shown or self._begun else "") + self._written(new)
        self._write(out)
        self._shown = [*self._shown[: first - 1], *lines[max(0, first - 1) :]] if first else list(lines)
        self.settled = max(self.settled, settled, self._off_screen())

    def finish(self) -> None:
        """End the lines: what follows comes after an empty line."""
        if self._shown:
            self._begun = True
            self._write("\n")
        self._shown, self.settled = [], 0

    def _drawn_again(self, first: int, lines: list[Line]) -> str:
        """What replaces the lines on the screen from number `first` on."""
        if first == len(self._shown) - 1 and first < len(lines):
            rest = _rest(self._shown[first], lines[first])
            if rest is not None:
                return self._written([rest, *lines[first + 1 :]])
        up = sum(map(self._rows, self._shown[first:])) - 1
        return (f"\x1b[{up}A" if up else "") + "\r\x1b[J" + self._written(lines[first:])

    def _completed(self, line: Line, elsewhere: bool) -> str:
        """What makes the last line on the screen, which cannot be drawn again, become `line`."""
        if elsewhere:  # a shell has written below it
            return "\r\x1b[K" + self._written([line])
        rest = _rest(self._shown[-1], line, styled=False)
        return "\n" + self._written([line]) if rest is None else self._written([rest])

    def _screen(self) -> tuple[tuple[int, int], int]:
        width, height = self._console.size
        return (width, height), self._stops()

    def _off_screen(self) -> int:
        """Number of lines whose beginning has left the screen, or is about to."""
        rows = 0
        for number in range(len(self._shown) - 1, self.settled - 1, -1):
            rows += self._rows(self._shown[number])
            if rows > self.most:
                return number + 1
        return 0

    def _rows(self, line: Line) -> int:
        return max(1, ceil(Segment.get_line_length(line) / self._console.width))

    def _written(self, lines: list[Line]) -> str:
        """Lines as the terminal gets them, the last one without its end."""
        with self._console.capture() as capture:
            for number, line in enumerate(lines):
                text = Text.assemble(*((part.text, part.style or "") for part in line))
                self._console.print(text, end="\n" if number < len(lines) - 1 else "", soft_wrap=True)
        return capture.get()

    def _write(self, text: str) -> None:
        if text:
            self._console.file.write(text)
            self._console.file.flush()


def _rest(shown: Line, line: Line, styled: bool = True) -> Line | None:
    """What `line` has more than `shown`; None if it does not begin with it. With `styled` the styles count too."""
    before, after = _characters(shown), _characters(line)
    if [pair[: 1 + styled] for pair in after[: len(before)]] != [pair[: 1 + styled] for pair in before]:
        return None
    return list(Segment.simplify(Segment(letter, style) for letter, style in after[len(before) :]))


def _characters(line: Line) -> list[tuple[str, Style | None]]:
    return [(letter, part.style) for part in line for letter in part.text]
