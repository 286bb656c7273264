"""The Python in the README and the docs runs, and says what it is shown to say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import specdec
from specdec.cli.chat.commands import COMMANDS
from specdec.drafters import Plain
from specdec.testing import random_prompts, tiny_model

ROOT = Path(__file__).parent.parent


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_screen(capsys: pytest.CaptureFixture[str]):
    program, shown = blocks("README.md", "python")[0], blocks("README.md", "text")[0]
    try:
        exec(program, {})
    except specdec.ModelError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")
    *text, stats = capsys.readouterr().out.strip().splitlines()
    *shown_text, shown_stats = shown.strip().splitlines()
    assert text == shown_text
    assert without_times(stats) == without_times(shown_stats)


def without_times(line: str) -> str:
    return re.sub(r"in .*? s \(.*? tokens/s\)", "", line)


def test_enable_and_disable():
    model = tiny_model("llama")
    exec(blocks("README.md", "python")[1], {"specdec": specdec, "model": model})
    assert "generate" not in vars(model)


def test_a_drafter_in_twenty_lines():
    (program,) = blocks("docs/structures.md", "python")
    assert len(program.splitlines()) <= 22
    names: dict = {}
    exec(program, names)
    model, prompts = tiny_model("llama"), random_prompts([6, 3])
    expected = model.generate(**prompts, max_new_tokens=16, do_sample=False)
    out = specdec.generate(model, **prompts, max_new_tokens=16, do_sample=False, drafter=names["RepeatLast"]())
    assert torch.equal(out, expected)


def test_a_streamer_that_is_told_of_rounds(capsys: pytest.CaptureFixture[str]):
    (program,) = blocks("docs/chat.md", "python")
    names: dict = {}
    exec(program, names)
    options = {"max_new_tokens": 4, "do_sample": False, "drafter": Plain(), "streamer": names["Rounds"]()}
    specdec.generate(tiny_model("llama"), **random_prompts([6]), **options)
    assert capsys.readouterr().out == "1 tokens, of these drafted: 0\n" * 4 + "end\n"


def test_the_commands_of_the_chat():
    """The page lists those that there are, as the help does."""
    table = re.findall(r"^\| `(/\w+)", (ROOT / "docs/chat.md").read_text(), re.MULTILINE)
    assert table == list(COMMANDS)
