"""What `--help` and messages say, and that markup eats nothing of it."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from rich.markup import render
from typer.main import get_command

from specdec.cli.app import app
from tests.support.commands import specdec_command

ROOT = Path(__file__).parents[2]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
TEXTS = {
    f"{name} {' '.join(getattr(one, 'opts', []))}".strip(): text
    for name, command in COMMANDS.items()
    for one in (command, *command.params)
    if (text := getattr(one, "help", None))
}


@pytest.mark.parametrize("where", list(TEXTS))
def test_no_help_text_is_eaten_as_markup(where: str) -> None:
    text = TEXTS[where]
    assert render(text).plain == text.replace("\\[", "[")


def test_the_extra_of_the_server_is_named() -> None:
    shown = " ".join(specdec_command("serve", "--help").stdout.split())
    assert "'specdec-runtime[serve]'" in shown


def test_messages_are_texts() -> None:
    """A console reads markup in what it prints, file names and errors too: what is made of values is a `Text`."""
    found = []
    for path in (ROOT / "specdec" / "cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_print = isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "print"
            if is_print and any(isinstance(argument, ast.JoinedStr) for argument in node.args):
                found.append(f"{path.name}:{node.lineno}")
    assert not found


def test_extras_are_quoted() -> None:
    """zsh expands brackets."""
    for path in (ROOT / "specdec").rglob("*.py"):
        for match in re.finditer(r".specdec-runtime\\*\[", path.read_text()):
            assert match.group()[0] == "'", path


@pytest.mark.parametrize("name", ["bench", "chat", "doctor", "serve", "train-head", "train-router"])
def test_a_model_is_an_argument_or_an_option(name: str) -> None:
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {"model_argument", "--model", "-m"} <= options


def test_one_name_for_one_option() -> None:
    """The same letter means the same everywhere, and so does the same purpose."""
    letters: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            long = [option for option in parameter.opts if option.startswith("--")]
            for option in parameter.opts:
                if long and re.fullmatch("-[a-z]", option):
                    letters.setdefault(option, set()).add(long[0])
    assert {letter: names for letter, names in letters.items() if len(names) > 1} == {}


def test_help_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in COMMANDS:
        text = specdec_command(name, "--help").stdout
        assert max(map(len, text.splitlines())) <= 80
        assert "<int range>" not in text


def test_a_router_needs_a_model() -> None:
    result = specdec_command("train-router", "-d", "x", "--data", "x", "--out", "x")
    assert result.exit_code == 2
    assert "there is no model" in result.stderr


def test_every_command_says_what_it_is_for() -> None:
    assert all(inspect.cleandoc(command.help or "").strip() for command in COMMANDS.values())


def test_constant_messages_are_no_markup() -> None:
    for path in (ROOT / "specdec" / "cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("print", "notify", "add_row", "log"):
                for text in (one.value for one in node.args if isinstance(one, ast.Constant)):
                    assert not isinstance(text, str) or render(text).plain == text, f"{path.name}:{node.lineno}"


def test_the_doctor_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"name": "[red]x[/red]", "path": "/m/[bold]", "size_mib": 1}
    monkeypatch.setattr("specdec.cli.doctor._demo_models", lambda: [found])
    shown = "".join(specdec_command("doctor").stdout.split())
    assert "[red]x[/red]" in shown
    assert "/m/[bold]" in shown
