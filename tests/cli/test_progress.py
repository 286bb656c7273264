"""Progress of long commands: something is told all the time, wherever it is read."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from specdec.cli import progress
from specdec.cli.progress import Bars


def test_a_pipe_gets_lines_while_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    pipe = io.StringIO()
    with Bars(Console(file=pipe, width=40)) as bars:
        bars.add_task("collecting", total=None)
        _wait_for("collecting", pipe)
        task = bars.add_task("training", total=8)
        bars.update(task, completed=2, note="accepted 1.23, which is a line of more than forty")
        _wait_for("training: 25%", pipe)
        _wait_for("accepted 1.23, which is a line of more than forty\n", pipe)
    time.sleep(0.05)  # what was under way when it ended
    num_told = len(pipe.getvalue())
    time.sleep(0.05)
    assert len(pipe.getvalue()) == num_told


def test_a_terminal_gets_bars() -> None:
    terminal = io.StringIO()
    with Bars(Console(file=terminal, force_terminal=True, width=100)) as bars:
        bars.update(bars.add_task("training", total=8), completed=2, note="accepted 1.23")
    assert "2/8" in terminal.getvalue()
    assert "accepted 1.23" in terminal.getvalue()


def _wait_for(text: str, stream: io.StringIO) -> None:
    deadline = time.monotonic() + 30
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, f"{text!r} is not in {stream.getvalue()!r}"
        time.sleep(0.01)
