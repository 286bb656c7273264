"""The last lines of the screen, kept up to date: what is above them is never touched, so it scrolls as usual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType, Segment, Segments

Line: TypeAlias = list[Segment]

_ERASE = (ControlType.ERASE_IN_LINE, 2)
_UP = (ControlType.CURSOR_UP, 1)


class LiveLines:
    """Lines that may still change. The cursor rests behind the last of them.

    Only lines that differ are written again, in one write for each update: a terminal has nothing to flicker with.
    """

    def __init__(self, console: Console):
        self._console = console
        self._lines: list[Line] = []

    def update(self, lines: Sequence[Line], num_final: int) -> None:
        """Show these lines in place of the live ones; the first `num_final` of them will never change again."""
        same = _num_common(self._lines, lines)
        if same < len(self._lines):
            same = max(0, min(same, len(lines) - 1))  # the last line is written anew, so that the cursor ends there
        with self._console:
            self._erase_from(same)
            starts_on_a_new_row = same == len(self._lines) > 0
            for place, line in enumerate(lines[same:]):
                self._write([Segment.line(), *line] if place or starts_on_a_new_row else line)
            if 0 < num_final == len(lines):
                self._write([Segment.line()])
        self._lines = [list(line) for line in lines[num_final:]]

    def _erase_from(self, place: int) -> None:
        """Erase the live lines from this one on; the cursor goes to where the first of them began."""
        if place < len(self._lines):
            rows = sum(self._num_rows(line) for line in self._lines[place:])
            rows = min(rows, self._console.height)  # what has left the screen is out of reach
            self._console.control(Control(ControlType.CARRIAGE_RETURN, _ERASE, *[_UP, _ERASE] * (rows - 1)))

    def _write(self, segments: Line) -> None:
        self._console.print(Segments(segments), end="", soft_wrap=True)

    def _num_rows(self, line: Line) -> int:
        """Rows that a line takes now: a terminal made narrower has broken it."""
        return max(1, -(-Segment.get_line_length(line) // self._console.width))


def _num_common(lines: Sequence[Line], others: Sequence[Line]) -> int:
    for place, (line, other) in enumerate(zip(lines, others, strict=False)):
        if line != other:
            return place
    return min(len(lines), len(others))
