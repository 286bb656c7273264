"""Replies on the screen. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.style import Style
from rich.theme import Theme

from specdec.cli.chat.live_lines import Line, LiveLines
from specdec.cli.chat.markdown import num_finished, render, tint
from specdec.cli.chat.reply import Piece

_SECONDS_BETWEEN_DRAWINGS = 0.05

_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(127, 160), "�")


def reply_console() -> Console:
    """A console on stdout."""
    return Console(highlight=False, theme=Theme({"markdown.code": "cyan"}))  # rich's own has a black background


def visible(text: str) -> str:
    """With a sign for each control character: what a model says must not move the cursor or fill the clipboard."""
    return text.translate(_VISIBLE)


class ReplyView(Protocol):
    """Shows one reply."""

    def show(self, pieces: Sequence[Piece]) -> None:
        """Show what has come."""

    def end(self) -> None:
        """That was all, or all that will come; the cursor goes to a new line."""


def shows_styles(console: Console) -> bool:
    """Whether a console is a terminal that can do more than write lines."""
    return console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows


def make_view(console: Console, *, tinted: bool = False) -> ReplyView:
    """A view that suits the console.

    Args:
        tinted: mark what was drafted and accepted, where styles are shown.
    """
    if shows_styles(console):
        return MarkdownView(console, tinted=tinted)
    return PlainView(console)


def tint_style(console: Console) -> Style:
    """How drafted tokens look: green, or underlined where colours are not wanted."""
    return Style(underline=True) if console.no_color else Style(color="green")


class PlainView:
    """The text as it comes."""

    def __init__(self, console: Console):
        self._file = console.file
        self._is_terminal = console.is_terminal

    def show(self, pieces: Sequence[Piece]) -> None:
        text = "".join(piece.text for piece in pieces)
        self._file.write(visible(text) if self._is_terminal else text)
        self._file.flush()

    def end(self) -> None:
        self._file.write("\n")
        self._file.flush()


class MarkdownView:
    """Markdown that grows: finished blocks are printed for good, only the lines of the last one change.

    A block that outgrows the screen is printed for good from its top. Lines that have left the screen stay as they
    were, also where they would look different by now (a wide cell late in a long table).
    """

    def __init__(self, console: Console, *, tinted: bool):
        self._console = console
        self._tint = tint_style(console) if tinted else None
        self._live = LiveLines(console)
        self._text = ""
        """What is not finished, and for each of its characters whether it was drafted."""
        self._marks: list[bool] = []
        self._printed = _Printed()
        self._is_first = True
        """Whether no block has been finished yet."""
        self._next_drawing = 0.0

    def show(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._text += visible(piece.text)
            self._marks += [piece.accepted] * len(piece.text)
        if monotonic() >= self._next_drawing:
            self._draw()
            self._next_drawing = monotonic() + _SECONDS_BETWEEN_DRAWINGS

    def end(self) -> None:
        self._draw(is_end=True)

    def _draw(self, *, is_end: bool = False) -> None:
        # the last column stays free: a full line may or may not move the cursor to the next one
        width = max(1, self._console.width - 1)
        count = num_finished(self._text)
        finished = self._lines(0, count, width, is_first=self._is_first)
        growing = self._lines(count, len(self._text), width, is_first=self._is_first and not finished)
        lines = [*finished, *growing]
        lines = lines[self._printed.num_lines_of(lines) :]
        num_growing = 0 if is_end else min(len(growing), max(1, self._console.height - 1))
        num_final = max(0, len(lines) - num_growing)
        self._live.update(lines, num_final)
        self._printed.add(lines[:num_final])
        if count:
            self._text, self._marks = self._text[count:], self._marks[count:]
            self._printed = _Printed()
        self._is_first = self._is_first and not finished

    def _lines(self, start: int, stop: int, width: int, *, is_first: bool) -> list[Line]:
        """The lines of a part of the text, with a blank one before it unless it is the first."""
        lines = render(self._text[start:stop], self._console, width)
        if self._tint is not None:
            lines = tint(lines, self._text[start:stop], self._marks[start:stop], self._tint)
        return lines if is_first or not lines else [[], *lines]


class _Printed:
    """The lines of what is not finished that have been printed for good."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def add(self, lines: Sequence[Line]) -> None:
        self._lines += lines

    def num_lines_of(self, lines: Sequence[Line]) -> int:
        """How many of all lines have been printed.

        If they look different by now (a resize, a mark that changes what is before it), those whose letters and digits
        have all been printed: some may be shown twice, none is missed.
        """
        count = len(self._lines)
        if lines[:count] != self._lines:
            num_printed = _num_letters(self._lines)
            count = sum(letters <= num_printed for letters in accumulate(_num_letters([line]) for line in lines))
            self._lines = list(lines[:count])
        return count


def _num_letters(lines: Iterable[Line]) -> int:
    return sum(char.isalnum() for line in lines for segment in line for char in segment.text)
