"""One status line on stderr while a command is busy with something that has no output of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from specdec.stages import logger

QUIET_SECONDS = 1.5
"""What is shorter is not told where a line cannot be taken back: in a file or a pipe."""


class StatusLine(logging.Handler):
    """Shows stages: a line with a spinner on a terminal, elsewhere a line of text for each that takes long."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console
        self._stages: list[str] = []
        """Under way, the innermost last."""
        self._live: Live | None = None
        self._timer: Timer | None = None
        self.is_hidden = False
        """Whether the line would stand in the way of other output."""

    def emit(self, record: logging.LogRecord) -> None:
        what: str = vars(record)["stage"]
        if vars(record)["seconds"] is None:
            self._stages.append(what)
        elif what in self._stages:
            self._stages.remove(what)
        self._show()

    def hide(self) -> None:
        """Show nothing more: from now on there is output."""
        self.acquire()
        try:
            self.is_hidden = True
            self._clear()
        finally:
            self.release()

    def close(self) -> None:
        self._clear()
        super().close()

    def _show(self) -> None:
        if self.is_hidden or not self._stages:
            self._clear()
        elif self._console.is_terminal and not self._console.is_dumb_terminal:
            self._draw(Spinner("dots", Text(f"{self._stages[-1]} ...", style="dim")))
        else:
            self._clear()
            self._timer = Timer(QUIET_SECONDS, self._write, [self._stages[-1]])
            self._timer.daemon = True
            self._timer.start()

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


def hide_status() -> None:
    """Take the status line away for the rest of the command: there is output now, which it would run into."""
    for handler in logger.handlers:
        if isinstance(handler, StatusLine):
            handler.hide()
