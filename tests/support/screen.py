"""A terminal's screen, as far as the chat uses it: what is shown is what a person would see."""

from __future__ import annotations

import re

_SEQUENCE = re.compile(r"\x1b\[(?P<arguments>[\d;?]*)(?P<kind>[A-Za-z])")


class Screen:
    """Rows of characters with a cursor; rows that leave at the top can no longer be changed.

    Raises:
        AssertionError: a sequence that it does not know.
    """

    def __init__(self, width: int, height: int):
        self._width, self._height = width, height
        self._rows = [""]
        self._row = self._column = 0

    @property
    def text(self) -> str:
        """All rows that were ever on it, without spaces at their ends, to where the cursor is."""
        rows = [row.rstrip() for row in self._rows]
        while len(rows) > self._row + 1 and not rows[-1]:
            rows.pop()
        return "\n".join(rows)

    def feed(self, data: str) -> None:
        position = 0
        while position < len(data):
            sequence = _SEQUENCE.match(data, position)
            if sequence:
                self._control(sequence["kind"], sequence["arguments"])
                position = sequence.end()
            else:
                self._put(data[position])
                position += 1

    def _control(self, kind: str, arguments: str) -> None:
        if kind == "A":
            self._row = max(0, len(self._rows) - self._height, self._row - int(arguments))
        elif (kind, arguments) == ("K", "2"):
            self._rows[self._row] = ""
        else:
            assert kind == "m" or arguments == "?25", f"unknown sequence {arguments}{kind}"

    def _put(self, char: str) -> None:
        if char == "\r":
            self._column = 0
        elif char == "\n":
            self._next_row()
        else:
            assert char.isprintable(), f"{char!r} was sent"
            if self._column == self._width:
                self._next_row()
            row = self._rows[self._row].ljust(self._column)
            self._rows[self._row] = row[: self._column] + char + row[self._column + 1 :]
            self._column += 1

    def _next_row(self) -> None:
        self._row, self._column = self._row + 1, 0
        if self._row == len(self._rows):
            self._rows.append("")
