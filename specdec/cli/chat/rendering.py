"""Replies on the screen. Knows no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import monotonic
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.style import Style
from rich.text import Text
from rich.theme import Theme

from specdec.cli.chat.markdown import num_finished, render, tint
from specdec.cli.chat.reply import Piece
from specdec.cli.status import make_way

_SECONDS_BETWEEN_DRAWINGS = 0.05

DRAFTED = Style(underline=True)
"""How drafted tokens look: a colour would be lost among those of code, and one of them among all would be no sign."""
REPLY_THEME = Theme(
    {
        "markdown.code": "cyan",  # rich's own has a black background
        **{"markdown.h1": "bold", "markdown.h2": "bold magenta", "markdown.link_url": "blue"},  # not underlined
    }
)

_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(127, 160), "�")


def reply_console() -> Console:
    """A console on stdout."""
    return Console(highlight=False, theme=REPLY_THEME)


def visible(text: str) -> str:
    """With a sign for each control character: what a model says must not move the cursor or fill the clipboard."""
    return text.translate(_VISIBLE)


class ReplyView(ABC):
    """Shows one reply, and ends it when it is left: the cursor goes to a new line, unless nothing came but an error."""

    has_begun = False
    """Whether anything has come."""

    def show(self, pieces: Sequence[Piece]) -> None:
        """Show what has come."""
        if not self.has_begun:
            make_way()
        self.has_begun = True
        self._show(pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.has_begun or error is None:
            self._end()

    @abstractmethod
    def _show(self, pieces: Sequence[Piece]) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...


def shows_styles(console: Console) -> bool:
    """Whether a console is a terminal that can do more than write lines."""
    return console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows


def make_view(console: Console, *, tinted: bool = False) -> ReplyView:
    """A view that suits the console.

    Args:
        tinted: underline what was drafted and accepted, where styles are shown.
    """
    if shows_styles(console):
        return MarkdownView(console, tinted=tinted)
    return PlainView(console)


class PlainView(ReplyView):
    """The text as it comes."""

    def __init__(self, console: Console):
        self._file = console.file
        self._is_terminal = console.is_terminal

    def _show(self, pieces: Sequence[Piece]) -> None:
        text = "".join(piece.text for piece in pieces)
        self._write(visible(text) if self._is_terminal else text)

    def _end(self) -> None:
        self._write("\n")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


class MarkdownView(ReplyView):
    """Markdown that grows: finished blocks are printed for good above the last one, which is drawn again and again.

    Of a last block that is taller than the screen, only its end is shown until it is finished.
    """

    def __init__(self, console: Console, *, tinted: bool = False):
        self._console = console
        self._is_tinted = tinted
        # redirected output would go to stdout
        self._live = Live(self, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._text = ""
        """What is not finished, and for each of its characters whether it was drafted."""
        self._marks: list[bool] = []
        self._growing: list[Text] = []
        """The lines of the last block."""
        self._is_first = True
        """Whether no block has been finished yet."""
        self._next_drawing = 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        is_over = not self._live.is_started
        yield Text("\n").join(self._growing if is_over else self._growing[-console.height :])

    def _show(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._text += visible(piece.text)
            self._marks += [piece.accepted] * len(piece.text)
        if monotonic() >= self._next_drawing:
            self._live.start()
            self._draw()
            self._next_drawing = monotonic() + _SECONDS_BETWEEN_DRAWINGS

    def _end(self) -> None:
        self._live.start()
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        count = num_finished(self._text)
        finished = self._lines(count)
        self._text, self._marks = self._text[count:], self._marks[count:]
        self._is_first = self._is_first and not finished
        self._growing = self._lines(len(self._text))
        if finished:
            self._console.print(Text("\n").join(finished))
        else:
            self._live.refresh()

    def _lines(self, count: int) -> list[Text]:
        """The lines of so many characters, with a blank one before it unless it is the first."""
        lines = render(self._text[:count], self._console)
        if self._is_tinted:
            tint(lines, self._text[:count], self._marks[:count], DRAFTED)
        return lines if self._is_first or not lines else [Text(), *lines]
