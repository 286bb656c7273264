"""What `specdec bench` shows while it measures: rows as they are finished, or a line for every call."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from specdec.bench.harness import BatchResult, Call


class BenchProgress:
    """On a terminal the rows so far above a bar, which go when the table is printed; elsewhere text that stays."""

    def __init__(self, console: Console, num_calls: int):
        self._console = console
        self._num_calls = num_calls
        self._num_done = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns)
        self._task = self._bar.add_task("", total=num_calls)
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(self._bar, console=console, transient=True, refresh_per_second=1, redirect_stdout=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, call: Call) -> None:
        """A call begins, or is over."""
        name = f"{'warm-up: ' if call.is_warmup else ''}{call.category}, {call.method}"
        if call.is_over:
            self._num_done += 1
            self._bar.advance(self._task)
            if self._live is None:
                self._write(name, call)
        else:
            self._bar.update(self._task, description=name)

    def show(self, results: Sequence[BatchResult]) -> None:
        """What has been measured so far."""
        if self._live is not None:
            self._live.update(Group(self._rows(results), Text(), self._bar), refresh=True)

    def _write(self, name: str, call: Call) -> None:
        run = call.run
        what = "not available" if run is None else f"{run.num_tokens / run.seconds:.1f} tokens/s"
        line = f"{self._num_done}/{self._num_calls} {name}: {what}"
        self._console.print(Text(line, style="dim"), soft_wrap=True)

    def _rows(self, results: Sequence[BatchResult]) -> RenderableType:
        from specdec.bench.report import summarise
        from specdec.bench.tables import progress_grid, rich_parts

        return Group(*rich_parts(progress_grid(summarise(results)), self._console.width))
