"""A terminal that remembers what was written to it, for tests of what a user sees."""

import re

CODE = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|(\n)|(\r)|([^\x1b\n\r])")


class Screen:
    """Rows of characters, with those that have left the screen; knows the control sequences that a chat writes."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0

    def write(self, text: str) -> "Screen":
        for found in CODE.finditer(text):
            number, code, line_end, to_start, letter = found.groups()
            if line_end:
                self.row, self.column = self.row + 1, 0
            elif to_start:
                self.column = 0
            elif letter:
                self._put(letter)
            elif code == "A":
                self.row = max(self.row - int(number or 1), len(self.rows) - self.height, 0)
            elif code in "JK":
                del self.rows[self.row][self.column :]
                if code == "J":
                    del self.rows[self.row + 1 :]
            else:
                assert code == "m", f"an unknown control sequence: {found[0]!r}"
            while len(self.rows) <= self.row:
                self.rows.append([])
        return self

    def _put(self, letter: str) -> None:
        if self.column == self.width:
            self.row, self.column = self.row + 1, 0
            self.rows.append([])
        row = self.rows[self.row]
        row.extend(" " * (self.column + 1 - len(row)))
        row[self.column] = letter
        self.column += 1

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.rows]
