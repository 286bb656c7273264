"""A short soak of a server with a tiny model: honest clients get their own answers, whatever the others do."""

from __future__ import annotations

import json

import pytest

from bench import soak
from bench.hostile import KINDS

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

WITHOUT_BOMBS = [kind for kind in KINDS if kind != "schema-bomb"]


@pytest.mark.slow
def test_a_short_soak(words: str, capsys: pytest.CaptureFixture[str]):
    options = ["--model", words, "--drafter", "prompt-lookup", "--clients", "8", "--hostile", "0.4", "--json"]
    options += ["--seconds", "6", "--warm-up", "3", "--patience", "3", "--questions", "6", "--max-new-tokens", "12"]
    # what a process of this size keeps says nothing about growth: the figure is for long soaks of large models
    soak.main([*options, "--kinds", ",".join(WITHOUT_BOMBS), "--memory-share", "0.5"])
    document = json.loads(capsys.readouterr().out)
    assert document["failures"] == []
    assert document["verdicts"] == {"identical": document["answers"]}
    assert document["answers"] >= 5
    assert document["different_answers"] >= 2, "answers could be mixed up unseen"
    assert sum(bool(outcomes) for outcomes in document["hostile"].values()) >= 3
    assert document["left_over"]["rows"] == document["left_over"]["queue"] == 0


def test_what_a_soak_finds():
    alone = {"a?": "one two", "b?": "three"}
    said = {"one two": "identical", "three": "mixed up", "one": "truncated", "two": "different", None: "lost"}
    for text, verdict in said.items():
        assert soak.judge(soak.Answer(question="a?", text=text), alone) == verdict
    document = {
        "verdicts": {"identical": 5, "lost": 2},
        "answers": 7,
        "hostile": {"large-body": {"413": 3, "ConnectionResetError()": 1}, "leave": {"left": 2}},
        "left_over": {"rows": 1.0, "queue": 0.0},
        "same_afterwards": False,
        "memory_mib": {"before": 100.0, "after": 111.0},
        "tracebacks": 1,
    }
    found = soak.failures(document, memory_share=0.1)
    starts = ("2 answers are lost", "large-body: {'Conn", "1 left in rows", "a question", "memory has", "1 tracebacks")
    assert len(found) == len(starts)
    assert all(text.startswith(start) for text, start in zip(found, starts, strict=True))
    fine = {"verdicts": {"identical": 5}, "answers": 5, "hostile": {}, "left_over": {"rows": 0, "queue": 0}}
    fine |= {"same_afterwards": True, "memory_mib": {"before": 100.0, "after": 109.0}, "tracebacks": 0}
    assert soak.failures(fine, memory_share=0.1) == []
