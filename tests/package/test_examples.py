"""The scripts in examples/ run, on tiny models, and say what they should."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

SAYS = {
    "drop_in": r"the same as model\.generate\(\): True\n32 tokens in",
    "pipeline": r"one two three one two three one.",
    "batch": r"(?s)'one two three one two.*'a b a b a.*'red green .*\d\.\d\d tokens per round",
    "streaming": r"\S",
    "sampling": r"the same seed says the same: True; another seed: False",
    "early_exit": r"drafted \d+, accepted \d+ in \d+ rounds",
    "lm_eval_harness": r"the same score and answers: True",
    "own_drafter": r"the same as model\.generate\(\): True\ndrafted [1-9]\d*, accepted \d+",
    "own_tree": r"the same as model\.generate\(\): True\n(?!0\.0)\d+\.\d nodes a round",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAYS)
def test_example(
    name: str, tiny: str, tiny_draft: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "lm_eval_harness":
        pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval")
    monkeypatch.setattr(sys, "argv", [name, tiny, tiny_draft])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(SAYS[name], capsys.readouterr().out)
