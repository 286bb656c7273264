"""What is said while a command is busy, and how it ends when it is told to."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from rich.console import Console

import specdec
from specdec.cli import status
from specdec.cli.common import TERMINATED, friendly_errors, heeds_sigterm
from specdec.cli.status import await_output, make_way, shown_stages
from specdec.drafters import QuantizedSelf
from specdec.stages import OneOff, counted, logger, stage
from specdec.testing import random_prompts, tiny_model
from tests.support.commands import PROMPT, specdec_command


def console(*, is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=80, _environ={"TERM": "xterm"})


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# stages


def test_a_stage_is_logged_at_its_beginning_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "specdec")
    with stage("loading a model"):
        assert [record.getMessage() for record in caplog.records] == ["loading a model"]
    assert re.fullmatch(r"loading a model: \d+\.\d s", caplog.records[1].getMessage())


def test_stages_within_stages_are_counted_once() -> None:
    one_off = OneOff()
    with counted(one_off):
        with stage("outer"), stage("inner"):
            time.sleep(0.02)
        within = one_off.seconds
        with stage("another"):
            pass
    assert 0.02 <= within <= one_off.seconds < 2 * within


def test_a_failed_stage_ends_too() -> None:
    one_off = OneOff()
    with counted(one_off), pytest.raises(ValueError, match="no"), stage("failing"):
        raise ValueError("no")
    assert one_off.seconds > 0


def test_what_is_done_once_is_no_part_of_the_speed() -> None:
    model, prompts = tiny_model("llama"), random_prompts([6])
    options = {"max_new_tokens": 8, "do_sample": False, "drafter": QuantizedSelf(), "return_dict_in_generate": True}
    first = specdec.generate(model, **prompts, **options).stats
    again = specdec.generate(model, **prompts, **options).stats
    assert 0 < first.setup_seconds < first.total_seconds
    assert again.setup_seconds == 0
    assert first.tokens_per_second == pytest.approx(8 / (first.total_seconds - first.setup_seconds))


# the status line


def test_a_terminal_shows_the_innermost_stage_and_then_nothing() -> None:
    terminal = console(is_terminal=True)
    with shown_stages(terminal):
        with stage("loading"), stage("packing"):
            pass
        shown = text_of(terminal)
    assert "loading ..." in shown
    assert "packing ..." in shown
    assert shown.endswith("\x1b[2K")  # the line is erased
    assert not logger.handlers


def test_until_there_is_output_a_terminal_shows_what_is_awaited() -> None:
    """Again after a stage within, and no more once there is output."""
    terminal = console(is_terminal=True)
    with shown_stages(terminal):
        await_output("reading the prompt")
        with stage("timing forwards"):
            before = len(text_of(terminal))
        assert "reading the prompt ..." in text_of(terminal)[before:]
        make_way()
        before = len(text_of(terminal))
        with stage("timing forwards"):
            pass
        assert "reading the prompt" not in text_of(terminal)[before:]


def test_a_file_gets_a_line_of_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    file = console(is_terminal=False)
    monkeypatch.setattr(status, "QUIET_SECONDS", 0.05)
    with shown_stages(file):
        with stage("short"):
            pass
        with stage("long"):
            time.sleep(0.3)
    assert text_of(file) == "long ...\n"


def test_beside_output_a_stage_leaves_the_cursor_where_it_was() -> None:
    """And the text too: what is drawn right of it is erased."""
    terminal = console(is_terminal=True)
    with shown_stages(terminal):
        with stage("loading"):
            make_way()
        terminal.file.write("The")
        before = text_of(terminal)
        with stage("timing forwards"):
            pass
        assert text_of(terminal) == f"{before}\x1b7 \x1b[2mtiming forwards ...\x1b[22m\x1b8\x1b[K"


def test_beside_output_in_a_file_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    file = console(is_terminal=False)
    monkeypatch.setattr(status, "QUIET_SECONDS", 0.0)
    with shown_stages(file):
        make_way()
        with stage("timing forwards"):
            time.sleep(0.1)
    assert text_of(file) == ""


def test_generate_says_what_it_is_busy_with(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "QUIET_SECONDS", 0.0)
    awaited: list[str] = []
    monkeypatch.setattr("specdec.cli.generate.await_output", awaited.append)
    result = specdec_command("generate", PROMPT, "-m", tiny, "-n", "4", "--weights", "float")
    assert result.exit_code == 0, result.output
    assert f"loading {Path(tiny).name} ..." in result.stderr
    assert awaited == ["reading the prompt"]


# SIGTERM


def test_sigterm_ends_a_command_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    @friendly_errors
    @heeds_sigterm
    def command() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as end:
        command()
    assert end.value.exit_code == TERMINATED
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_bench_reports_what_was_measured_before_sigterm(tiny: str, tmp_path: Path) -> None:
    prompts = tmp_path / "few.jsonl"
    prompts.write_text(f'{{"prompt": "{PROMPT}", "category": "few"}}\n' * 400)
    command = [sys.executable, "-c", "from specdec.cli import main; main()", "bench", "-m", tiny]
    command += ["--prompts", str(prompts), "-n", "8", "--methods", "plain", "--warmup", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = [process.stderr.readline() for _ in range(30)]
        process.terminate()
        table, rest = process.communicate(timeout=120)
    assert any("tokens/s" in line for line in told)
    assert "interrupted" in rest
    assert "plain" in table


_STARTS = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))
from specdec.cli.common import starting
with starting():
    import triton
print(gc.get_freeze_count() > 0)
"""


def test_what_triton_would_report_as_leaks_is_looked_through_at_the_end(tmp_path):
    (tmp_path / "triton.py").touch()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(specdec.__file__).parents[1]}"}
    command = [sys.executable, "-c", _STARTS]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "True\n0\n"
