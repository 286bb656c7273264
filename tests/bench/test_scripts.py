"""The scripts under `bench/` are run by hand, seldom: they must at least import, and tell how they are called."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from bench import _script

FOLDER = Path(_script.__file__).parent
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*SCRIPTS, "peers.__main__"])
def test_a_script_says_how_it_is_called(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("httpx2")
    script = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 0
    assert f"python -m bench.{name.removesuffix('.__main__')}" in capsys.readouterr().out


def test_a_report_says_how_it_was_made_and_not_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["x", "/home/somebody/models/small", "--limit", "2"])
    command = _script.command("trees")
    assert command == "python -m bench.trees small --limit 2"
    table = _script.pipe_table(("a", "b"), [(1, 2.5)])
    _script.write_report(tmp_path / "new" / "found", {"command": command}, f"    {command}", table)
    assert json.loads((tmp_path / "new" / "found.json").read_text()) == {"command": command}
    assert (tmp_path / "new" / "found.md").read_text() == f"    {command}\n\n| a | b |\n| --- | --- |\n| 1 | 2.5 |\n"
