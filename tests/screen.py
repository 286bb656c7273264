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
        self.width, self.height = width, height
        self.rows = [""]
        self._is_broken = [False]
        """Whether a row goes on in the next one."""
        self._row = self._column = 0

    @property
    def text(self) -> str:
        """All lines that were ever on it, however they are broken now, without spaces at their ends."""
        self._drop_empty_rows()
        return "\n".join(line.rstrip() for line in self._lines())

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

    def resize(self, width: int, height: int) -> None:
        """As most terminals do: lines are broken anew. The cursor must be in the last row."""
        self._drop_empty_rows()
        assert self._row == len(self.rows) - 1
        lines = self._lines()
        self.width, self.height = width, height
        self.rows, self._is_broken = [], []
        for line in lines:
            parts = [line[start : start + width] for start in range(0, len(line), width)] or [""]
            self.rows += parts
            self._is_broken += [True] * (len(parts) - 1) + [False]
        self._row, self._column = len(self.rows) - 1, len(self.rows[-1])

    def _drop_empty_rows(self) -> None:
        """Those below the cursor."""
        while self._row < len(self.rows) - 1 and not self.rows[-1]:
            self.rows.pop()
            self._is_broken.pop()

    def _lines(self) -> list[str]:
        lines: list[str] = [""]
        for row, is_broken in zip(self.rows, self._is_broken, strict=True):
            lines[-1] += row
            if not is_broken:
                lines.append("")
        return lines[:-1]

    def _control(self, kind: str, arguments: str) -> None:
        if kind == "A":
            top = max(0, len(self.rows) - self.height)
            self._row = max(top, self._row - int(arguments or 1))
        elif (kind, arguments) == ("K", "2"):
            self.rows[self._row] = ""
            self._is_broken[max(0, self._row - 1) : self._row + 1] = [False] * min(2, self._row + 1)
        else:
            assert kind == "m", f"unknown sequence {arguments}{kind}"

    def _put(self, char: str) -> None:
        if char == "\r":
            self._column = 0
        elif char == "\n":
            self._next_row()
        else:
            assert char.isprintable(), f"{char!r} was sent"
            if self._column == self.width:
                self._is_broken[self._row] = True
                self._next_row()
            row = self.rows[self._row].ljust(self._column)
            self.rows[self._row] = row[: self._column] + char + row[self._column + 1 :]
            self._column += 1

    def _next_row(self) -> None:
        self._row, self._column = self._row + 1, 0
        if self._row == len(self.rows):
            self.rows.append("")
            self._is_broken.append(False)
