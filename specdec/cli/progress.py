"""Progress bars; a line of text every two seconds where nothing can be drawn over: in a file or a pipe."""

from __future__ import annotations

from datetime import timedelta
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 2.0


class Bars(Progress):
    """A bar for each task, or lines about the newest one. A task may have a field `note`, which stands at its end.

    Args:
        counts: shows how much is done of how much; a share in percent if absent.
    """

    def __init__(self, console: Console, counts: ProgressColumn | None = None):
        self._is_drawn = console.is_terminal and not console.is_dumb_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), counts or MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, _Note(), console=console, disable=not self._is_drawn)
        self._is_over = Event()

    def start(self) -> None:
        super().start()
        if not self._is_drawn:
            Thread(target=self._tell, daemon=True).start()

    def stop(self) -> None:
        self._is_over.set()
        if self._is_drawn:  # else rich ends with an empty line
            super().stop()

    def _tell(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_LINES):
            for task in self.tasks[-1:]:
                self.console.print(Text(_line(task), style="dim"), soft_wrap=True)


class _Note(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("note", ""))


def _line(task: Task) -> str:
    elapsed, left = (
        None if seconds is None else timedelta(seconds=round(seconds))
        for seconds in (task.elapsed, task.time_remaining)
    )
    parts = [f"{task.description}: {task.percentage:.0f}%" if task.total else task.description]
    parts += [f"{elapsed} so far"] if elapsed else []
    parts += [f"{left} left"] if left else []
    return ", ".join(filter(None, [*parts, task.fields.get("note", "")]))
