"""One status line on stderr while a command is busy with something that has no output of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Timer

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from specdec.stages import logger

QUIET_SECONDS = 1.5
"""What is shorter is not told where a line cannot be taken back: in a file or a pipe."""


_SAVE, _RESTORE, _ERASE = "\x1b7", "\x1b8", "\x1b[K"
"""The cursor's place, and what stands right of it."""
_MOST_INLINE = 30
"""Characters beside text: a line that wraps would stay."""


class StatusLine(logging.Handler):
    """Shows stages: a line with a spinner on a terminal, elsewhere a line of text for each that takes long.

    Once there is output on the terminal, a stage stands right of its last character.
    """

    def __init__(self, console: Console):
        super().__init__()
        self._console = console
        self._stages: list[str] = []
        """Under way, the innermost last."""
        self._awaited: str | None = None
        """What goes on until there is output, if no stage does."""
        self._live: Live | None = None
        self._timer: Timer | None = None
        self._has_output = False
        self._is_beside = False
        """Whether something stands beside the output."""

    def emit(self, record: logging.LogRecord) -> None:
        what: str = vars(record)["stage"]
        if vars(record)["seconds"] is None:
            self._stages.append(what)
        elif what in self._stages:
            self._stages.remove(what)
        self._show()

    def await_output(self, what: str) -> None:
        """Show something until there is output."""
        self.acquire()
        try:
            self._awaited = what
            self._show()
        finally:
            self.release()

    def make_way(self) -> None:
        """From now on there is output."""
        self.acquire()
        try:
            self._has_output, self._awaited = True, None
            self._clear()
        finally:
            self.release()

    def close(self) -> None:
        self._clear()
        super().close()

    def _show(self) -> None:
        what = self._stages[-1] if self._stages else self._awaited
        if what is None:
            self._clear()
        elif self._has_output:
            self._write_beside(what)
        elif self._is_terminal:
            self._draw(Spinner("dots", Text(f"{what} ...", style="dim")))
        else:
            self._clear()
            self._timer = Timer(QUIET_SECONDS, self._write, [what])
            self._timer.daemon = True
            self._timer.start()

    @property
    def _is_terminal(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def _write_beside(self, what: str) -> None:
        self._clear()
        if self._is_terminal:
            self._put(f"{_SAVE} \x1b[2m{what[:_MOST_INLINE]} ...\x1b[22m{_RESTORE}")
            self._is_beside = True

    def _put(self, codes: str) -> None:
        with suppress(OSError):  # nobody reads any more
            self._console.file.write(codes)
            self._console.file.flush()

    def _draw(self, line: Spinner) -> None:
        if self._live is None:
            self._live = Live(line, console=self._console, transient=True, redirect_stdout=False)
            self._live.start()
        else:
            self._live.update(line, refresh=True)

    def _write(self, what: str) -> None:
        self._console.print(Text(f"{what} ...", style="dim"), soft_wrap=True)

    def _clear(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._live is not None:
            self._live.stop()
        if self._is_beside:
            self._put(_ERASE)
            self._is_beside = False
        self._timer = self._live = None


@contextmanager
def shown_stages(console: Console) -> Iterator[None]:
    """Show the stages of what is done within."""
    line, level = StatusLine(console), logger.level
    logger.addHandler(line)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(line)
        line.close()


def await_output(what: str) -> None:
    """Say what a command does until it has output: its status line shows it where no stage is under way."""
    for handler in logger.handlers:
        if isinstance(handler, StatusLine):
            handler.await_output(what)


def make_way() -> None:
    """Say that a command has output from now on, which its status line must not run into."""
    for handler in logger.handlers:
        if isinstance(handler, StatusLine):
            handler.make_way()
